"""What the commands print: results on standard output, everything else on standard error, whole lines in a log.

On a terminal a long step shows the bars of the library that does it, or a spinner; elsewhere only its line.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

_UNITS = ("B", "kB", "MB", "GB", "TB")


def say(text: str) -> None:
    """A result."""
    _print(Console(), text)


def note(text: str, style: str | None = None) -> None:
    """What a reader of results does not need."""
    _print(Console(stderr=True), text, style)


def _print(console: Console, text: str, style: str | None = None) -> None:
    # what strangers wrote into a configuration, or bytes that are no text, must not reach a terminal as they are
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    # never wrapped: a path or a command in the text must survive copying, and a log keeps one line
    console.print(plain, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


class Steps:
    """Numbered lines for the steps of a command.

    Args:
        total: how many there will be.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    @contextmanager
    def step(self, text: str, *, own_bar: bool = False) -> Iterator[None]:
        """Announces a step; on a terminal a spinner turns while it runs.

        Args:
            text: what is done.
            own_bar: the library that does it draws a bar itself.
        """
        self.done += 1
        line = f"[{self.done}/{self.total}] {text}"
        console = Console(stderr=True)
        if own_bar or not console.is_terminal:
            _print(console, line, "dim")
            yield
            return
        with console.status(line):
            yield
        _print(console, line, "dim")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Libraries' warnings become lines of ours, their logs are left out, their bars are for terminals alone."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    logging.set_verbosity_error()  # what loading leaves out or makes up is an error of ours, which names it
    hub_logging.set_verbosity_error()  # six lines for each file of a network that is gone
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"ummrm(\.|$)")
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}", "yellow")
        try:
            yield
        finally:
            logging.set_verbosity(level)
            hub_logging.set_verbosity(hub_level)
            if bars:
                logging.enable_progress_bar()


def size(num_bytes: float) -> str:
    """A number of bytes with its unit: 1.5 GB."""
    for unit in _UNITS:
        if num_bytes < 1000 or unit == _UNITS[-1]:
            break
        num_bytes /= 1000
    return f"{num_bytes:.3g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
