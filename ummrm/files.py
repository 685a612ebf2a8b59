"""Small files written atomically, and what reaches the disk when: knows files alone, and every room may import it.

A model's folder, of many files that belong together, is `hf/saving.py`'s business.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | os.PathLike, content: str | Callable[[BinaryIO], Any]) -> Path:
    """Writes a file beside its place, syncs it, and renames it: a reader finds the old file or the new one, in whole.

    Args:
        path: the file; its folder is made where it is missing.
        content: text, written as UTF-8 (a lone surrogate as its escape), or a function that writes into the open
            binary file.

    Returns:
        The file.

    Raises:
        OSError: it can't be written; what was there before is as it was, and nothing is left beside it. So it is with
            whatever `content` raises.
    """
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode("utf-8", "backslashreplace"))
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)
    flush(place.parent)
    return place


def write_json(path: str | os.PathLike, data: Any, *, indent: int = 1) -> Path:
    """Writes plain data as JSON, atomically.

    Args:
        path: as in `write_atomically`.
        data: what `json.dumps` takes.
        indent: spaces a level.

    Returns:
        The file.

    Raises:
        OSError: as `write_atomically`.
        TypeError, ValueError: `data` is no plain data; nothing was written.
    """
    return write_atomically(path, json.dumps(data, indent=indent) + "\n")


def flush(path: Path) -> None:
    """fsync of a file or folder, so that no rename reaches the disk before what it renames."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that can't flush folders
            raise
    finally:
        os.close(descriptor)
