"""The command line: one file a command, thin over the library.

Parses, checks everything that can be checked before any work, calls the library, prints; an error of the user's is one
line and exit status 2. Nothing imports this package. A command imports what it uses when it runs.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any, NoReturn

import typer

from . import evaluate, info, inspect, merge, run, score, train, upcycle
from .errors import UserError, one_line
from .help import Command, Group
from .screen import note, say

# a traceback of ours is for a report: plain text
app = typer.Typer(
    cls=Group,
    name="ummrm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"color": False},
)
for _command in (
    run.run,
    upcycle.upcycle,
    train.train,
    merge.merge,
    score.score,
    evaluate.evaluate,
    inspect.inspect,
    info.info,
):
    app.command(cls=Command)(_command)

_log = logging.getLogger(__name__)
_WRONG_USE: Any = typer.BadParameter.__mro__[2]  # typer hands out no nearer name of all its errors of use
_INTERRUPTED = 130  # as shells have it


def _say_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        say(f"ummrm {__version__}")
        raise typer.Exit


@app.callback()
def ummrm(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from, beside its line.")
    ] = False,
) -> None:
    """Upcycles a dense reward model into a mixture of experts, trains it, and merges it back into one dense model.

    `ummrm run` does all of it from one file; the other commands are its stages one by one, and what looks at models.
    `ummrm COMMAND --help` says more of a command.

    Example: ummrm run recipe.yaml
    """
    if traceback:
        logging.basicConfig()
    _log.setLevel(logging.DEBUG if traceback else logging.WARNING)


def main() -> None:
    """Entry point: runs the command line and turns the user's errors into one line and exit status 2."""
    try:
        status = app(standalone_mode=False, prog_name="ummrm")
    except _WRONG_USE as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "ummrm")
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(error, f"{error.format_message().rstrip('.')}; see {where} --help")
    except UserError as error:
        _fail(error, str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, typer.Abort):
            status = _INTERRUPTED
        elif not _is_out_of_memory(error):
            raise
        else:
            what = f"out of memory ({one_line(error)})"
            _fail(error, f"{what}; free some, give --dtype bfloat16, or use a larger machine.")
    if status == _INTERRUPTED:
        note("interrupted")
    sys.exit(status)


def _fail(error: BaseException, line: str) -> NoReturn:
    _log.debug("where this came from", exc_info=error)
    note(f"error: {' '.join(line.split())}", "bold red")
    sys.exit(2)


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    # the CPU's allocator has no class of its own for it
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
