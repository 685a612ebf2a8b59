"""Where `ummrm score` writes: standard output, or a file that the same command goes on with where it was cut off.

Beside the file stands what it was made with, so that it never holds rewards of two models or of two inputs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..files import write_json
from .errors import UserError, blaming
from .screen import note

if TYPE_CHECKING:
    from ..data.rows import Place


class Output:
    """The lines that a command writes, to standard output or to the end of a file.

    Args:
        path: the file; None is standard output.
        settings: plain data, all that the rewards depend on beside the content of the input.

    Raises:
        UserError: the file was made with other settings, or is none of this command's.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._stream: IO[str] = sys.stdout
        self._last: int | None = None  # the input's line that the last one is of
        self._done = 0
        if path is None:
            return
        beside, told = Path(f"{path}.settings.json"), json.loads(json.dumps(settings, default=str))
        if path.exists():
            with blaming(f"--out {path} can't be gone on with", OSError, ValueError):
                earlier = json.loads(beside.read_text(encoding="utf-8"))
            changed = [key for key in {**earlier, **told} if earlier.get(key) != told.get(key)]
            if changed:
                raise UserError(
                    f"--out {path} was made with another {', '.join(changed)}; give another file, or remove it and "
                    f"{beside.name}."
                )
            self._find_end(path)
        else:
            with blaming(f"--out {path} can't be written", OSError):
                path.touch()
                write_json(beside, told)

    def __enter__(self) -> Output:
        if self.path is not None:
            with blaming(f"--out {self.path} can't be written", OSError):
                self._stream = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self._stream.close()

    def rest(self, texts: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Any]]:
        """The texts that the file has no line of.

        Raises:
            UserError: the input is another one.
        """
        for count, (place, text) in enumerate(texts, 1):
            if count > self._done:
                yield place, text
            elif count == self._done and place.number != self._last:
                raise UserError(
                    f"--out {self.path} has {self._done:,} lines, the last of line {self._last} of its input, and here "
                    f"that is line {place.number}; the input has changed: give another file."
                )

    def write(self, line: str) -> None:
        self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()

    def _find_end(self, path: Path) -> None:
        """Cuts off a line that was not written whole, and counts the others."""
        end = 0
        with blaming(f"--out {path} can't be gone on with", OSError, ValueError, KeyError, TypeError):
            with open(path, "r+b") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._last, self._done, end = json.loads(line)["line"], self._done + 1, end + len(line)
                file.seek(end)
                file.truncate()
                os.fsync(file.fileno())
        if self._done:
            note(f"{self._done:,} texts were scored before")
