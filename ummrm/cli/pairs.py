"""The options that say how rows become pairs and texts, the same in every command that reads some, and their source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UserError, blaming

if TYPE_CHECKING:
    from ..data.config import PairSource

_PANEL = "The data"
_ESCAPES = {"\\n": "\n", "\\t": "\t"}

Columns = Annotated[
    str | None,
    typer.Option(
        help="Columns of other names, such as prompt=question,chosen=good.", show_default=False, rich_help_panel=_PANEL
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of a data set (default: train).", rich_help_panel=_PANEL)]
Answers = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="COLUMN COLUMN",
        help="Instead of chosen and rejected: the columns of two answers, of which --scores says the better one.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Scores = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="COLUMN COLUMN",
        help="The columns of the scores of --answers, the higher is better.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Turns = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="USER ASSISTANT",
        help=r"Texts are dialogues whose turns begin with these marks, such as '\n\nHuman:' '\n\nAssistant:'; they "
        "become messages, for the chat template.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
AsMessages = Annotated[
    bool,
    typer.Option(
        "--as-messages",
        help="Make a user's and an assistant's message of prompt and answer, for the chat template.",
        rich_help_panel=_PANEL,
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="A row that makes no pair is an error.", rich_help_panel=_PANEL)]


def fields_of(
    *,
    columns: str | None = None,
    split: str | None = None,
    answers: tuple[str, str] | None = None,
    scores: tuple[str, str] | None = None,
    turns: tuple[str, str] | None = None,
    as_messages: bool = False,
) -> dict[str, Any]:
    """What options say, as fields of `PairSource`; without those that say nothing.

    Raises:
        UserError: `--columns` is of another form.
    """
    given = {
        "columns": read_columns(columns),
        "split": split,
        "answers": answers,
        "scores": scores,
        "turns": read_turns(turns),
        "as_messages": as_messages,
    }
    return {name: value for name, value in given.items() if value}


def source_of(path: str, fields: dict[str, Any]) -> PairSource:
    """A source of rows.

    Raises:
        UserError: options that don't fit together.
    """
    from ..data.config import PairSource

    with blaming("", ValueError):
        return PairSource(path, **fields)


def read_columns(text: str | None) -> dict[str, str]:
    """`--columns` as a mapping.

    Raises:
        UserError: it is of another form.
    """
    found = {}
    for part in (text or "").split(","):
        name, mark, column = part.partition("=")
        if part.strip() and not (mark and name.strip() and column.strip()):
            raise UserError(f"--columns must be of the form prompt=question,chosen=good, got {text!r}.")
        if part.strip():
            found[name.strip()] = column.strip()
    return found


def read_turns(marks: tuple[str, str] | None) -> tuple[str, str] | None:
    """`--turns` with the line breaks and tabs that a shell leaves as backslash and letter."""
    if marks is None:
        return None
    for escape, character in _ESCAPES.items():
        marks = (marks[0].replace(escape, character), marks[1].replace(escape, character))
    return marks
