"""The folder that a command writes: whether it can be written, before any work, and the save into it.

Saving touches only the files that it writes (see `ummrm.hf.saving`). A folder that holds something already is taken
only with --overwrite, since a model in it would be replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, blaming
from .screen import Steps, note, size
from .source import TOKENIZER, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OTHER = "give another folder."
# what a save may write; anything but a plain file in its place would make it fail at its end
_WRITTEN = re.compile(r"(config|generation_config)\.json|README\.md|.*\.safetensors(\.index\.json)?")


def check_output(out: str, source: Path, overwrite: bool) -> Path:
    """Checks the folder to write.

    Args:
        out: as the user gave it.
        source: the folder that is read.
        overwrite: whether a folder that holds something is allowed.

    Returns:
        `out` as a path.

    Raises:
        UserError: it can't be written, holds something, or is the folder that is read or inside it; or a save into it
            was interrupted and can't be completed.
    """
    from ..hf.loading import settle

    if not out:
        raise UserError(f'OUT must be the name of a folder, got ""; {_OTHER}')
    shown = out if len(out) < 200 else f"{out[:200]}..."
    with blaming(f"{shown} can't be written", OSError, ValueError, RuntimeError, remedy=_OTHER):
        _check_place(out, Path(out), source)
        settle(out)  # of an interrupted save there config.json may not be in its place yet
        held = [name for name in os.listdir(out) if not name.startswith(".")] if os.path.isdir(out) else []
    if held and not overwrite:
        what = "a model" if "config.json" in held else min(held) + (f" and {len(held) - 1} more" if held[1:] else "")
        raise UserError(
            f"{out} holds {what} already; {_OTHER[:-1]}, or give --overwrite to replace the model files in it (other "
            "files stay)."
        )
    target = Path(out)
    for name in sorted(held):
        if _WRITTEN.fullmatch(name) and not (target / name).is_file():
            raise UserError(f"{target / name} is to be written, and {_kind(target / name)} stands there; {_OTHER}")
    return target


def check_report_folder(out: str, names: tuple[str, ...], overwrite: bool) -> Path:
    """Checks the folder that a report is written into.

    Args:
        out: as the user gave it; it may hold other things.
        names: of the files that will be written.
        overwrite: whether such files may be there.

    Raises:
        UserError: it can't be written, or holds such a file.
    """
    if not out:
        raise UserError(f'--output must be the name of a folder, got ""; {_OTHER}')
    shown = out if len(out) < 200 else f"{out[:200]}..."
    with blaming(f"{shown} can't be written", OSError, ValueError, RuntimeError, remedy=_OTHER):
        _check_place(out, Path(out), None)
        there = [name for name in names if (Path(out) / name).exists()]
    for name in there:
        if not (Path(out) / name).is_file():
            raise UserError(f"{Path(out) / name} must be a file, and {_kind(Path(out) / name)} stands there; {_OTHER}")
    if there and not overwrite:
        raise UserError(f"{out} holds {there[0]} already; {_OTHER[:-1]}, or give --overwrite to replace it.")
    return Path(out)


def _check_place(out: str, target: Path, source: Path | None) -> None:
    """Raises UserError or OSError if no folder can be at `target`, or be written there, or it touches `source`."""
    if target.is_symlink() and not target.exists():
        raise UserError(f"{out} is a symbolic link that leads nowhere; remove it, or {_OTHER}")
    resolved = target.resolve()
    for place in (resolved, *resolved.parents):
        if source is not None and place.exists() and place.samefile(source):
            where = "is" if place == resolved else "lies inside"
            raise UserError(f"{out} {where} the folder that is read ({source}); {_OTHER}")
    if target.exists() and not target.is_dir():
        raise UserError(f"{out} must be a folder, and {_kind(target)} stands there; remove it, or {_OTHER}")
    place = _existing(resolved)
    if not place.is_dir():
        raise UserError(f"{out} lies inside {_kind(place)} ({place}), not a folder; {_OTHER}")
    with tempfile.TemporaryFile(dir=place):  # has no name where the system can do so
        pass


def check_space(out: Path, num_bytes: int) -> None:
    """Raises UserError if the disk of `out` has fewer free bytes than are to be written."""
    free = shutil.disk_usage(_existing(out.resolve())).free
    if num_bytes > free:
        raise UserError(
            f"{out} needs {size(num_bytes)}, and its disk has {size(free)} free; make room, give a folder on another "
            "disk, or give --dtype bfloat16."
        )


def replaced(out: Path) -> str:
    """The end of a result's line where a model stood at `out` before; ask before writing."""
    return " (replaced the model that was there)" if (out / "config.json").exists() else ""


def streams(out: Path, device: str) -> bool:
    """Whether a model can be written into `out` tensor by tensor, beside little memory; else it is made in memory.

    Raises:
        UserError: nothing can be written there.
    """
    from ..hf.shards import can_map

    if device != "cpu":
        return False
    with blaming(f"{out} can't be written", OSError, remedy=_OTHER):
        if can_map(disk_of(out)):
            return True
    note(f"note: files on the disk of {out} can't be mapped into memory, so the whole model is made there first")
    return False


def disk_of(out: Path) -> Path:
    """A folder that is there and on the disk of `out`."""
    return _existing(out.resolve())


def save(write: Callable[[Path], PreTrainedModel], target: Path, source: Source, steps: Steps) -> PreTrainedModel:
    """Saves a model into a folder that was checked, and takes along what its source has beside weights and config.

    Args:
        write: writes the model into a new, empty folder, from which the files get into their places; returns it, maybe
            on the meta device.
        target: the folder that was checked.
        source: what was read.
        steps: the last one of which is this.

    Returns:
        What `write` returned.
    """
    from safetensors import SafetensorError

    from ..hf.saving import copy_companions, save_written

    with contextlib.ExitStack() as last_step:

        def written(folder: str | os.PathLike) -> PreTrainedModel:
            model = write(Path(folder))
            num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
            last_step.enter_context(steps.step(f"saving {target} ({size(num_bytes)})"))
            return model

        remedy = "make room or give another folder; a model that was there before is as it was."
        with blaming(f"{target} can't be written", OSError, ValueError, SafetensorError, remedy=remedy):
            model = save_written(written, target)
            copy_companions(source.folder, target)
            _warn_of_old_tokenizer(target, source)
    return model


def _warn_of_old_tokenizer(out: Path, source: Source) -> None:
    """Prints a warning where a tokenizer's files that the source lacks stayed in `out`."""
    old = sorted(path.name for path in out.iterdir() if TOKENIZER.fullmatch(path.name))
    old = [name for name in old if not (source.folder / name).exists()]
    if old:
        note(
            f"warning: {out} still holds tokenizer files of the model that was there, which {source.name} does not "
            f"have: {', '.join(old)}; remove them unless they are this model's.",
            "yellow",
        )


def _existing(path: Path) -> Path:
    """The nearest place at or above `path` that exists."""
    return next((place for place in (path, *path.parents) if os.path.lexists(place)), Path("."))


def _kind(path: Path) -> str:
    from ..hf.replacing import kind_of

    return kind_of(path.stat().st_mode)
