"""Atomic files, digests by which damage is noticed, and output folders that are checked before any work.

What is written goes beside its place, is synced, and is renamed; then its folder is synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what stands there at the end takes its place. An error changes nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, atomically."""
    with atomic(path) as beside:
        beside.write_text(text, newline="")


def digest(value: Any) -> str:
    """SHA-256 of plain data and tensors in mappings, lists and tuples; the same for what was written and read back."""
    found = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            take([str(part.dtype), list(part.shape)])
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, Mapping):
            found.update(b"{")
            for name in sorted(part):
                take(name)
                take(part[name])
            found.update(b"}")
        elif isinstance(part, list | tuple):
            found.update(b"[")
            for one in part:
                take(one)
            found.update(b"]")
        else:
            found.update(json.dumps(part).encode() + b",")

    take(value)
    return found.hexdigest()


def warn_damaged(path: Path, why: object) -> None:
    """Says that a file is damaged and will be made again."""
    said = " ".join(str(why).split()) or type(why).__name__
    warnings.warn(f"{path} is damaged ({said[:120]}); it is made again.", stacklevel=3)


def kept(path: Path, make: Callable[[], dict], device: str = "cpu") -> dict:
    """What `make` gives, mappings of tensors and plain data, from its file where there is a sound one."""
    if path.is_file():
        try:
            found = torch.load(path, map_location=device, weights_only=True)
            if found.pop("digest") == digest(found):
                return found
            warn_damaged(path, "its content is not what was written")
        except Exception as error:  # what torch raises depends on where the file was cut
            warn_damaged(path, error)
    made = make()
    with atomic(path) as beside:
        torch.save({**made, "digest": digest(made)}, beside)
    return made


def prepare_output(folder: str | Path, folders: Iterable[str] = (), files: Iterable[str] = ()) -> Path:
    """Makes an output folder and checks that what will be written can be, so that no work is lost to it.

    Args:
        folder: made if missing, its parents too.
        folders: names of folders that will be written within.
        files: names of files that will be.

    Raises:
        ValueError: it is no folder, or cannot be written to, or something else stands where a file or folder will be.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise ValueError(
            f"`output` must be a folder that can be made and written to, got {folder}: {error.strerror}; "
            "choose another one."
        ) from error
    wanted = {**dict.fromkeys(folders, stat.S_ISDIR), **dict.fromkeys(files, stat.S_ISREG)}
    for name, fits in wanted.items():
        path = folder / name
        if os.path.lexists(path) and not (path.exists() and fits(path.stat().st_mode)):
            what = "folder" if fits is stat.S_ISDIR else "file"
            raise ValueError(
                f"`output` must hold nothing in the way of what is written, and {path} is no {what}; "
                "remove it, or choose another folder."
            )
    return folder


def _sync(path: Path) -> None:
    """Asks the system to put a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
