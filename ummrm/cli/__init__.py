"""The command line: one file a command, thin over the library.

Parses, checks everything that can be checked before any work, calls the library, prints; an error of the user's is one
line and exit status 2. Nothing imports this package. A command imports what it uses when it runs.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from . import evaluate, info, inspect, merge, run, score, train, upcycle
from .errors import UserError, one_line
from .screen import note, say

# a traceback of ours is for a report: plain text
app = typer.Typer(name="ummrm", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(upcycle.upcycle)
app.command()(merge.merge)
app.command()(run.run)
app.command()(train.train)
app.command()(score.score)
app.command()(evaluate.evaluate)
app.command()(info.info)
app.command()(inspect.inspect)

_log = logging.getLogger(__name__)


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
    """Upcycle a dense reward model into a mixture of experts, train it, merge it back into one dense model."""
    if traceback:
        logging.basicConfig()
    _log.setLevel(logging.DEBUG if traceback else logging.WARNING)


def main() -> None:
    """Entry point: runs the command line and turns the user's errors into one line and exit status 2."""
    try:
        app()
    except UserError as error:
        _fail(error, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(error, f"out of memory ({one_line(error)}); free some, give --dtype bfloat16, or use a larger machine.")


def _fail(error: BaseException, line: str) -> None:
    _log.debug("where this came from", exc_info=error)
    note(f"error: {' '.join(line.split())}", "bold red")
    sys.exit(2)


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    # the CPU's allocator has no class of its own for it
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
