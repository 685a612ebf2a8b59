"""What the stages of a folder were made with and whether they are done: one JSON file a stage, written atomically.

A stage's settings hold everything that its result depends on, what it was made from included. Settings that differ from
those of an earlier start are an error that names them: a folder never holds stages of two recipes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import write_json
from .recipe import RecipeError

_SHOWN = 6  # differences in an error


class Record:
    """The stages of a folder.

    Args:
        folder: of the run.
        writes: whether this process does; of several one.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.folder, self.writes = folder / "stages", writes

    def path(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints and its record."""
        return self.folder / stage

    def start(self, stage: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Notes that a stage is about to run.

        Args:
            stage: its name.
            settings: plain data, all that its result depends on.

        Returns:
            What it found, if it is done.

        Raises:
            RecipeError: it was started with other settings, which are named; or its record is damaged.
        """
        settings = json.loads(json.dumps(settings))
        earlier = self._read(stage)
        if earlier is None:
            self._write(stage, {"settings": settings})
            return None
        changed = differences(earlier["settings"], settings)
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise RecipeError(
                f"{self.folder.parent} was made with other settings of the stage {stage}: {'; '.join(changed[:_SHOWN])}"
                f"{more}. Give another `output`, or undo the change; removing {self.path(stage)} and the stages after "
                "it starts from there again."
            )
        return earlier.get("found")

    def finish(self, stage: str, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Notes that a stage is done and what it found."""
        self._write(stage, {"settings": settings, "found": found})

    def _read(self, stage: str) -> dict[str, Any] | None:
        path = self.path(stage) / "stage.json"
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"{path} is damaged ({error}); remove the folder {path.parent} to run it again."
            ) from error
        return data

    def _write(self, stage: str, data: Mapping[str, Any]) -> None:
        if self.writes:
            write_json(self.path(stage) / "stage.json", data)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two pieces of plain data, each by its path, before and now."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            one
            for key in dict.fromkeys((*before, *now))
            for one in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name} was {_shown(before)}, is {_shown(now)}"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a run's folder for one command.

    Raises:
        RecipeError: another one is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(
                f"another process is at work in {folder}; wait for it, or give another `output`."
            ) from None
        yield
