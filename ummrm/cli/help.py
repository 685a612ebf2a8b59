"""What `--help` prints: plain text in one layout that stays legible in a narrow terminal and survives copying.

Names and texts of the options stand with the commands. Here they are only laid out: in two columns, or, where the
terminal is narrow, each text below its name. Nothing is cut off, and an example is broken as a shell takes it.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperCommand, TyperGroup

_WIDEST, _NARROWEST = 100, 24
_TWO_COLUMNS = 64  # below it a text beside its name would have a word or two a line
_NAMES = 26  # columns of names at most; a longer one has a line of its own
EXAMPLE = "Example: "
_ARGUMENTS, _OPTIONS, _COMMANDS = "Arguments", "Options", "Commands"


class _Laid:
    """Lays the help out; mixed into typer's classes, of which it knows what click documents: parameters."""

    def format_help(self: Any, ctx: Any, formatter: Any) -> None:
        formatter.write("\n".join(_page(self, ctx, _width())) + "\n")


class Command(_Laid, TyperCommand):
    """A command."""


class Group(_Laid, TyperGroup):
    """The program, which has commands."""


def examples(command: Any) -> list[str]:
    """The examples in a command's help, as one would type them."""
    return [part.removeprefix(EXAMPLE) for part in _paragraphs(command) if part.startswith(EXAMPLE)]


def _page(command: Any, ctx: Any, width: int) -> Iterator[str]:
    shown = [p for p in command.get_params(ctx) if not getattr(p, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    names = [_metavar(command, p) for p in arguments]
    commands = [(name, command.get_command(ctx, name)) for name in getattr(command, "commands", ())]
    needed = [_names(command, p) for p in shown if p.param_type_name == "option" and p.required]
    usage = [ctx.command_path, *needed, "[OPTIONS]", *(["COMMAND ..."] if commands else names)]
    yield from textwrap.wrap(f"Usage: {' '.join(usage)}", width, subsequent_indent="    ", **_WHOLE)
    before = ""
    for part in _paragraphs(command):
        if part.startswith(EXAMPLE):
            yield from () if before.startswith(EXAMPLE) else ("", EXAMPLE.rstrip())
            yield from _typed(part.removeprefix(EXAMPLE), width)
        else:
            yield ""
            yield from textwrap.wrap(part, width, **_WHOLE)
        before = part
    yield from _section(_ARGUMENTS, ((n, _text(p)) for n, p in zip(names, arguments, strict=True)), width)
    panels: dict[str, list[tuple[str, str]]] = {_OPTIONS: []}
    for one in shown:
        if one.param_type_name == "option":
            panel = getattr(one, "rich_help_panel", None) or _OPTIONS
            panels.setdefault(panel, []).append((_names(command, one), _text(one)))
    common = panels.pop(_OPTIONS)
    for title, rows in (*panels.items(), (_OPTIONS if not panels else "Other options", common)):
        yield from _section(title, rows, width)
    yield from _section(_COMMANDS, ((name, _paragraphs(one)[0]) for name, one in commands), width)


_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _section(title: str, rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    rows = list(rows)
    if not rows:
        return
    yield from ("", f"{title}:")
    column = min(max(len(name) for name, _ in rows), _NAMES) + 4 if width >= _TWO_COLUMNS else 6
    for name, text in rows:
        lines = textwrap.wrap(text, width - column, **_WHOLE) or [""]
        beside = len(name) + 4 <= column
        yield f"  {name}".ljust(column) + lines[0] if beside else f"  {name}"
        yield from (" " * column + line for line in (lines[1:] if beside else lines))


def _typed(command: str, width: int) -> Iterator[str]:
    """A command in lines that can be copied into a shell."""
    lines = textwrap.wrap(command, width - 4, initial_indent="  ", subsequent_indent="    ", **_WHOLE)
    yield from (f"{line} \\" for line in lines[:-1])
    yield lines[-1]


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(command.help or "").split("\n\n") if part.strip()]


def _names(command: Any, option: Any) -> str:
    """-e, --num-experts N"""
    given = sorted(option.opts, key=lambda name: name.startswith("--"))
    names = ", ".join(given) + "".join(f" / {name}" for name in option.secondary_opts)
    return names if option.is_flag else f"{names} {_metavar(command, option)}"


def _metavar(command: Any, parameter: Any) -> str:
    """What stands for a parameter's value: said with it, or by its type, or by the end of its name."""
    name = parameter.name or ""
    if parameter.param_type_name == "argument":
        shown = parameter.metavar or name.upper()
        shown += "..." if parameter.nargs == -1 else ""
        return shown if parameter.required else f"[{shown}]"
    if parameter.metavar:
        return parameter.metavar
    hint = typing.get_type_hints(command.callback).get(name) if command.callback else None
    kinds = typing.get_args(hint) or (hint,)
    for kind, shown in ((int, "N"), (float, "X"), (Path, "FILE")):
        if kind in kinds:
            return shown
    return name.rpartition("_")[2].upper()


def _text(parameter: Any) -> str:
    """A parameter's text, with its default where the text does not say it, and whether it can be left out."""
    text = " ".join((parameter.help or "").split())
    default = parameter.default
    if parameter.param_type_name == "option" and parameter.required:
        return _added(text, "required")
    known = parameter.show_default and isinstance(default, (str, int, float)) and not isinstance(default, bool)
    return _added(text, f"default: {default}") if known and "(default: " not in text else text


def _added(text: str, note: str) -> str:
    return f"{text.removesuffix('.')} ({note})."


def _width() -> int:
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns))
