"""The command line: one file a command, thin over the library.

Parses, calls the library, prints; an error of the user's is one line and a non-zero exit. Nothing imports this package.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from . import info, merge, upcycle

app = typer.Typer(
    name="ummrm",
    help="Upcycle a dense reward model into a mixture of experts, train it, merge it back into one dense model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(upcycle.upcycle)
app.command()(merge.merge)
app.command()(info.info)

# what a user's input can cause; anything else is a bug and shows its traceback
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, NotADirectoryError, PermissionError)


def main() -> None:
    """Entry point: runs the command line and turns the user's errors into one line and exit status 2."""
    try:
        app()
    except USER_ERRORS as error:
        console = Console(stderr=True)
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
