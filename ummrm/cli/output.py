"""What the commands print: plain lines on standard output."""

from __future__ import annotations

from rich.console import Console


def say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
