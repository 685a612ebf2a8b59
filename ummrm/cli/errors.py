"""Errors that a user can mend: one line and exit status 2; anything else is a bug and shows its traceback.

Where a library works on what the user gave (a configuration, weights, a disk), a command says so with `blaming`, and
what the library raises there becomes one line. `ummrm --traceback COMMAND` shows where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 600  # characters of a library's message


class UserError(Exception):
    """What is wrong and how to mend it, in one line."""


@contextmanager
def blaming(what: str, *kinds: type[BaseException], remedy: str = "") -> Iterator[None]:
    """Turns exceptions of these kinds into a `UserError` that opens with `what`; "" takes the message as it is."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError((f"{what}: " if what else "") + one_line(error) + (f"; {remedy}" if remedy else "")) from error


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; with its kind where the message alone would not be understood."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)) or not text:
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
