"""From a row to a text that a reward model scores: a string, or a conversation.

Knows no tokenizer and no file: `hf/texts.py` makes tokens, `ummrm.data` reads rows and the messages in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.rows import RowProblem, parsed
from ..data.texts import messages_of, text_of, turns_of, whole_text
from ..hf.texts import Text

FORMS = "`text`, `prompt` and `response`, or `messages`"


def text_of_line(
    line: bytes | str, *, plain: bool = False, as_messages: bool = False, turns: tuple[str, str] | None = None
) -> Text:
    """The text in a line.

    Args:
        line: JSON, or under `plain` the text itself; its line break is no part of it.
        plain: take the line as it is.
        as_messages: make a user's and an assistant's message of `prompt` and `response` that are strings, so that the
            tokenizer's chat template applies. Otherwise the response stands directly behind the prompt, as TRL's
            RewardTrainer puts them.
        turns: what a user's and what an assistant's turn begins with in texts that are dialogues, as in
            `ummrm.data.PairSource`; they become conversations.

    Raises:
        ValueError: it is not UTF-8, no JSON object, or has none of the known columns; says why.
    """
    raw = line if isinstance(line, bytes) else line.encode("utf-8", "surrogatepass")
    if not plain:
        row = parsed(raw)
        if isinstance(row, RowProblem):
            raise row
        return text_of_row(row, as_messages=as_messages, turns=turns)
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RowProblem("malformed", f"not UTF-8 (byte {error.start + 1})") from None
    if not text.strip():
        raise RowProblem("empty", "an empty line, which is no text")
    return text if turns is None else turns_of(text, turns, "the text")


def text_of_row(row: Mapping[str, Any], *, as_messages: bool = False, turns: tuple[str, str] | None = None) -> Text:
    """The text of a row with `text`, `prompt` and `response` (or `completion`), or `messages`.

    Args:
        row: its columns.
        as_messages: as in `text_of_line`.
        turns: as in `text_of_line`.

    Raises:
        ValueError: none of these, or one that is neither text nor messages.
    """
    held = {key for key, value in row.items() if value is not None}
    answers = [name for name in ("response", "completion") if name in held]
    forms = [("text" in held, "`text`"), ("messages" in held, "`messages`"), ("prompt" in held, "`prompt`")]
    given = [name for there, name in forms if there]
    if len(given) != 1 or (given == ["`prompt`"]) != bool(answers):
        names = ", ".join(sorted(map(str, held))[:12]) or "nothing"
        raise RowProblem("malformed", f"must have {FORMS}, and one of them alone, got {names}")
    if "text" in held:
        text = text_of(row["text"], "text")
        return text if turns is None else turns_of(text, turns, "text")
    if "messages" in held:
        return messages_of(row["messages"], "messages")
    return whole_text(row["prompt"], row[answers[0]], turns=turns, as_messages=as_messages)


def flattened(text: Text) -> str:
    """A conversation's texts with an empty line between them, for a tokenizer without a chat template."""
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)
