"""Saving a model folder whole or not at all.

The new folder is written beside the old one, flushed to disk, and put in its place by one atomic exchange, so that a
process killed at any moment leaves either the old folder or the new one, complete. Where the file system has no
exchange the old folder is moved aside first and moved back on failure. Files of the old folder that the new save does
not write (a tokenizer, a trainer's state) are carried over.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from . import card

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100
_ASIDE_SUFFIX = ".old"
# what a save may leave stale: weights of another sharding or format, and their index
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(\.[\w-]+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index.*\.json)?")
_INDEX_FILE = re.compile(r"(model|pytorch_model)\.(safetensors|bin)\.index(\.[\w-]+)?\.json")


def save_pretrained(
    model: PreTrainedModel, save_directory: str | os.PathLike, *, model_card: str | None = None, **kwargs
) -> None:
    """Saves any Hugging Face model like its own `save_pretrained`, but whole or not at all.

    Args:
        model: the model.
        save_directory: the folder; an existing one is replaced at once, when everything is on disk.
        model_card: text of its README.md; a card in the folder that ummrm did not write stays.
        kwargs: passed to the model class's `save_pretrained`.

    Raises:
        NotADirectoryError: a file stands at `save_directory`.
        ValueError: it is the current folder or a mount point, which can't be exchanged.
    """

    def save(path: str | os.PathLike, **kw) -> None:
        type(model).save_pretrained(model, path, **kw)
        if model_card is not None and kw.get("is_main_process", True):
            card.write(path, model_card, previous=save_directory)

    save_atomically(save, save_directory, **kwargs)


def save_atomically(save: Callable[..., None], save_directory: str | os.PathLike, **kwargs) -> None:
    """Runs `save(folder, **kwargs)` on a folder beside `save_directory`, then puts it in place in one step.

    Args:
        save: writes the files; called with a new, empty folder of the same name.
        save_directory: the folder to replace or make.
        kwargs: for `save`. A process that is not the main one (`is_main_process=False`) only takes part in what
            `save` does collectively; it writes nothing.
    """
    target = Path(os.path.abspath(save_directory))
    if target.is_file():
        raise NotADirectoryError(
            f"`save_directory` must be a folder, got the file {save_directory}; choose another path or remove it."
        )
    if target.is_symlink():  # replace what the link leads to, not the link
        target = target.resolve()
    if target.is_dir() and (target.samefile(os.curdir) or os.path.ismount(target)):
        what = "a mount point" if os.path.ismount(target) else "the current folder"
        raise ValueError(
            f"`save_directory` must be a folder that can be replaced as a whole, got {save_directory}, {what}; "
            "save into a folder below it."
        )
    if not kwargs.get("is_main_process", True):
        save(target, **kwargs)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # the staged folder bears the target's name: transformers derives a hub repository's name from it
    _clear_leftovers(target)
    staging = Path(tempfile.mkdtemp(prefix=f"{_staging_prefix(target)}{os.getpid()}-", dir=target.parent))
    staged = staging / target.name
    try:
        staged.mkdir()
        save(staged, **kwargs)
        if target.is_dir():
            shutil.copymode(target, staged)
            _carry_over(target, staged)
        _flush_tree(staged)
        _put_in_place(staged, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging_prefix(target: Path) -> str:
    return f".{target.name}.saving-{socket.gethostname()}-"


def _clear_leftovers(target: Path) -> None:
    """Removes what saves killed on this machine left beside `target`, moving an old folder back if one was aside."""
    prefix = _staging_prefix(target)
    for staging in target.parent.glob(glob.escape(prefix) + "*"):
        pid = staging.name[len(prefix) :].partition("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            aside = staging / (target.name + _ASIDE_SUFFIX)
            if aside.is_dir() and not target.exists():
                os.rename(aside, target)
            shutil.rmtree(staging, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _carry_over(old: Path, new: Path) -> None:
    """Brings what the new save did not write along, by hard link where possible; stale weights stay behind."""
    for entry in os.scandir(old):
        destination = new / entry.name
        if destination.exists() or _WEIGHT_FILE.fullmatch(entry.name) or _INDEX_FILE.fullmatch(entry.name):
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), destination)
        elif entry.is_dir():
            shutil.copytree(entry.path, destination, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry.path, destination)


def _link_or_copy(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)


def _put_in_place(staged: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staged, target)
        return
    if _exchange(staged, target):  # the old folder is now at `staged`, and goes with the staging folder
        return
    aside = staged.with_name(staged.name + _ASIDE_SUFFIX)
    os.rename(target, aside)
    try:
        os.rename(staged, target)
    except BaseException:
        os.rename(aside, target)
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two paths atomically (Linux renameat2). False where the system can't."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _flush_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _flush(Path(root) / name)
        _flush(Path(root))


def _flush(path: Path) -> None:
    """fsync of a file or folder, so that the exchange never reaches the disk before what it exchanges."""
    if path.is_symlink():
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
