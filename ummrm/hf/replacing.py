"""Replacing files of a folder by staged ones: killed at any moment, the folder loads as the old ones, the new, or not.

Works file by file, inside the folder, on names that the save writes and on shards of the checkpoint that it replaces or
an adapter on it; nothing else in the folder is moved, copied or deleted. What is written is `saving.py`'s business.

The new files lie in a private subfolder. Renaming that subfolder to one fixed name announces the replacement; setting
config.json aside decides it: before, what is there is the old checkpoint, and an interrupted save is forgotten; after,
no reader finds a checkpoint until config.json, the last file, is in place, and an interrupted save is completed by
`settle`, which every load and save of ours calls first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..files import flush

PENDING = ".ummrm-save"  # the announced replacement; a staging folder has an owner and a random part behind
ABANDONED = "ummrm-interrupted-save"  # what an interrupted save had, where somebody else wrote the folder since
_ADAPTER = "adapter_config.json"  # transformers puts an adapter beside a config.json on the weights that it finds there
_ADAPTERS_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_GATES = ("config.json", _ADAPTER)
_INDEX = re.compile(r"model\.safetensors\.index(\.[\w-]+)?\.json")
_SHARD = re.compile(r"model(\.[\w-]+)?-\d{5}-of-\d{5}\.safetensors")
_SINGLE = re.compile(r"model(\.[\w-]+)?\.safetensors")
_LOCK, _JOURNAL, _NEW, _OLD = "lock", "journal.json", "new", "old"
_PATIENCE = 60.0  # seconds to wait for another process, which holds the folder for a few renames
# A lock may hold on one machine alone (Lustre's localflock): what another one announced is left to it for so long.
_FOREIGN_GRACE = 10.0
_FOREIGN_AGE = 24 * 3600.0


class Staging:
    """A private subfolder of `target` for new files, locked while its owner lives.

    Attributes:
        files: the folder to write into; it bears `name`.
    """

    def __init__(self, target: Path, name: str) -> None:
        self.target = target
        self.path = target / f"{PENDING}-{_owner()}-{secrets.token_hex(4)}"
        self.files = self.path / _NEW / name
        self._keep = False
        os.mkdir(self.path)
        # locked before it has its name, so that a lock file that nobody holds belongs to nobody
        unnamed = self.path / f"{_LOCK}.new"
        try:
            self._descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.write(self._descriptor, _owner().encode())
            with contextlib.suppress(OSError):  # a file system without locks: the owner's name has to do
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(unnamed, self.path / _LOCK)
            os.makedirs(self.files)
            os.mkdir(self.path / _OLD)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def commit(self) -> None:
        """Puts the staged files into the folder, all or none.

        Raises:
            OSError: one can't be put in its place; the folder is as it was.
        """
        names = sorted(os.listdir(self.files))
        if not names:  # a process that only takes part in gathering has written nothing
            return
        check_names(self.target, names)
        for name in names:
            if not stat.S_ISREG(os.lstat(self.files / name).st_mode):
                raise ValueError(
                    f"the model's save must write plain files alone to be atomic, and wrote {name}, which is none; "
                    "save it with its own class's `save_pretrained`."
                )
            self._copy_mode(name)
            flush(self.files / name)
        gate = next((name for name in _GATES if name in names), None)
        journal = {"name": self.files.name, "files": names, "stale": _stale(self.target, names), "gate": gate}
        with open(self.path / _JOURNAL, "x", encoding="utf-8") as file:
            json.dump(journal, file)
        for path in (self.path / _JOURNAL, self.files, self.path / _NEW, self.path):
            flush(path)
        pending = self.target / PENDING
        while True:
            settle(self.target)
            try:
                os.rename(self.path, pending)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another save came first
                    continue
                raise
            break
        self.path, self.files = pending, pending / _NEW / self.files.name
        try:
            flush(self.target)
            _move_in(self.target, pending, journal)
        except BaseException:
            self._keep = True  # should moving back fail too, the next load or save has what it needs
            _move_back(self.target, pending, journal)
            self._keep = False
            raise

    def close(self) -> None:
        """Removes the subfolder with what is left in it: files that were replaced, or that were not wanted.

        Where it can't be removed it stays, for the next load or save to try: the save itself has not failed by that.
        """
        if not self._keep:
            with contextlib.suppress(OSError):
                _discard(self.target, self.path)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)

    def _copy_mode(self, name: str) -> None:
        try:
            info = os.lstat(self.target / name)
        except FileNotFoundError:
            info = None
        new = info is None or not stat.S_ISREG(info.st_mode)
        # safetensors makes its files private; the lock file was made with the mode that a new file gets here
        wanted = stat.S_IMODE(os.fstat(self._descriptor).st_mode if new or info is None else info.st_mode)
        if stat.S_IMODE(os.stat(self.files / name).st_mode) != wanted:
            with contextlib.suppress(OSError):  # a file system without modes
                os.chmod(self.files / name, wanted)


def check_names(target: Path, names: list[str]) -> None:
    """Raises ValueError or OSError if a staged file is no plain one or what stands at its place can't be replaced."""
    for name in names:
        try:
            mode = os.stat(target / name).st_mode  # of what a link leads to; the link itself is replaced
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(mode):
            raise FileExistsError(
                f"`save_directory` must hold a plain file or nothing at {name}, which the save writes; {target / name} "
                f"is {kind_of(mode)}. Remove it or save into another folder."
            )


def kind_of(mode: int) -> str:
    """What `stat` found, in words."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe (FIFO)",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something that is no file")


def settle(target: Path) -> None:
    """Completes or forgets a save into `target` that was interrupted; waits for one that is being put in place.

    Warns:
        UserWarning: there was one; says what became of it.

    Raises:
        OSError: it can't be completed here (a folder without write permission), or another process keeps the folder.
        ValueError: the folder holds something of that name that ummrm did not write.
    """
    pending = target / PENDING
    start = time.monotonic()
    while _is_folder(pending):
        waited = time.monotonic() - start
        with _held(pending) as held:
            if held and (_host_of(pending) == socket.gethostname() or waited > _FOREIGN_GRACE):
                _settle(target, pending)
                return
        if waited > _PATIENCE:
            raise TimeoutError(
                f"{target} is being written by another process ({pending} is locked for {_PATIENCE:.0f} s); wait until "
                "it ends."
            )
        time.sleep(0.05)


def clear_leftovers(target: Path) -> None:
    """Removes the staging folders of saves that were killed before they touched anything."""
    for entry in os.scandir(target):
        path = target / entry.name
        if entry.name.startswith(f"{PENDING}-") and _is_folder(path):
            with _held(path) as held:
                ours = _host_of(path) == socket.gethostname()
                if held and (ours or time.time() - entry.stat().st_mtime > _FOREIGN_AGE):
                    shutil.rmtree(path, ignore_errors=True)


# ---- the moves -------------------------------------------------------------------------------------------------


def _move_in(target: Path, pending: Path, journal: dict) -> None:
    """Sets aside what goes, the gate first, and puts the new files in, the gate last; picks up where a kill cut it."""
    new, old, gate = pending / _NEW / journal["name"], pending / _OLD, journal["gate"]
    goes = [name for name in journal["files"] if os.path.lexists(new / name)] + journal["stale"]
    for name in sorted(goes, key=lambda name: (name != gate, name not in _GATES, not _starts_a_checkpoint(name))):
        if os.path.lexists(target / name) and not os.path.lexists(old / name):
            os.rename(target / name, old / name)
        if name in _GATES:
            flush(old)
            flush(target)
    for name in sorted(journal["files"], key=lambda name: (name == gate, _starts_a_checkpoint(name))):
        if name == gate:
            flush(target)
        if os.path.lexists(new / name):
            os.rename(new / name, target / name)
    flush(target)


def _move_back(target: Path, pending: Path, journal: dict) -> None:
    """The reverse of `_move_in`, from wherever it got."""
    new, old, gate = pending / _NEW / journal["name"], pending / _OLD, journal["gate"]
    for name in sorted(journal["files"], key=lambda name: (name != gate, not _starts_a_checkpoint(name))):
        if not os.path.lexists(new / name):
            os.rename(target / name, new / name)
    for name in sorted(os.listdir(old), key=lambda name: (name == gate, name in _GATES, _starts_a_checkpoint(name))):
        if name in _GATES:
            flush(target)
        os.rename(old / name, target / name)
    flush(target)


def _settle(target: Path, pending: Path) -> None:
    """What `settle` does once nobody else works on it."""
    try:
        journal = _read_journal(pending)
    except PermissionError:
        if any(os.path.lexists(target / gate) for gate in _GATES):
            return  # another user's folder, in which nothing is missing
        raise
    new, old, gate = pending / _NEW / journal["name"], pending / _OLD, journal["gate"]
    staged = [name for name in journal["files"] if os.path.lexists(new / name)]
    if (gate in staged) if gate else staged:
        if gate and os.path.lexists(target / gate):
            if os.listdir(old) or len(staged) < len(journal["files"]):
                _abandon(target, pending, gate)
                return
            what = "was interrupted before it changed anything, and is forgotten; the folder is as it was before"
        elif _ADAPTER in journal["stale"] and all(os.path.lexists(place / _ADAPTER) for place in (target, old)):
            _abandon(target, pending, _ADAPTER)
            return
        else:
            try:
                _move_in(target, pending, journal)
            except OSError as error:
                raise type(error)(
                    f"a save into {target} was interrupted and can't be completed: {error}. Give write permission, or "
                    "load a copy of the folder (with its hidden files) in a place with one."
                ) from error
            what = "was interrupted, and is completed now; the folder holds what was being saved"
        warnings.warn(f"a save into {target} {what}.", stacklevel=4)
    with contextlib.suppress(OSError):  # the checkpoint is whole; where it can't be written, the rest may lie
        _discard(target, pending)


def _abandon(target: Path, pending: Path, gate: str) -> None:
    kept = target / f"{ABANDONED}-{secrets.token_hex(4)}"
    try:
        os.rename(pending, kept)
    except OSError:
        kept = pending
    warnings.warn(
        f"a save into {target} was interrupted, and somebody else has written {gate} there since: the folder is left "
        f"as it is. What the interrupted save replaced and what it did not put in place lies in {kept}; remove it if "
        "nothing there is needed.",
        stacklevel=5,
    )


def _discard(target: Path, path: Path) -> None:
    """Removes a staging folder; an announced one loses its name first, so that it is never half there."""
    if path.name == PENDING:
        garbage = target / f"{PENDING}-{_owner()}-{secrets.token_hex(4)}"
        os.rename(path, garbage)
        path = garbage
    shutil.rmtree(path, ignore_errors=True)


def _read_journal(pending: Path) -> dict:
    """The journal, trusted no further than to names in the folder: it may have come with a download."""
    try:
        journal = json.loads((pending / _JOURNAL).read_text(encoding="utf-8"))
        names = [*journal["files"], *journal["stale"], journal["name"]]
        if not all(isinstance(name, str) and name not in ("", "..") and Path(name).name == name for name in names):
            raise ValueError("it names what is not in the folder")
        if not all(_is_folder(pending / part) for part in (_NEW, f"{_NEW}/{journal['name']}", _OLD)):
            raise ValueError("its folders are missing")
        if journal["gate"] not in {None, *journal["files"]}:
            raise ValueError("its last file is not among its files")
        return journal
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{pending} is no record of a save that ummrm can read ({error}); remove it if nothing there is needed, "
            "and save the model again."
        ) from error


def _starts_a_checkpoint(name: str) -> bool:
    """Whether readers that are given a configuration find the weights by this file."""
    return bool(_INDEX.fullmatch(name) or (_SINGLE.fullmatch(name) and not _SHARD.fullmatch(name)))


def _stale(target: Path, names: list[str]) -> list[str]:
    """Weights of the checkpoint that is replaced and not written again, which a reader would mix with the new ones.

    Those that have a standard name of one variant that is written, and the shards that such an index names; an adapter,
    where a whole model is written. Nobody's other `.bin` files: they are not what a save of safetensors writes, and
    every reader prefers the new files.
    """
    adapter = []
    if "config.json" in names and _ADAPTER not in names and _is_plain(target / _ADAPTER):
        adapter = [name for name in (_ADAPTER, *_ADAPTERS_WEIGHTS) if name not in names and _is_plain(target / name)]
    weights = [name for name in names if _SHARD.fullmatch(name) or _SINGLE.fullmatch(name)]
    if not weights:
        return adapter
    variants = {(match := _SHARD.fullmatch(name) or _SINGLE.fullmatch(name)) and match[1] for name in weights}
    stale = set()
    for variant in variants:
        tag = variant or ""
        index = f"model.safetensors.index{tag}.json"
        stale |= {index, f"model{tag}.safetensors"}
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not a checkpoint that anybody could load
            shards = json.loads((target / index).read_text(encoding="utf-8"))["weight_map"].values()
            stale |= {shard for shard in shards if isinstance(shard, str) and _SHARD.fullmatch(shard)}
    return adapter + sorted(name for name in stale - set(names) if _is_plain(target / name))


# ---- who works on it -------------------------------------------------------------------------------------------


def _owner() -> str:
    return f"{os.getpid()}-{socket.gethostname()}"


def _owner_of(folder: Path) -> tuple[int, str]:
    """Process and machine of a staging folder."""
    try:
        text = (folder / _LOCK).read_text()
    except OSError:
        text = folder.name.removeprefix(f"{PENDING}-").rpartition("-")[0]
    pid, _, host = text.partition("-")
    return (int(pid) if pid.isdigit() else 0), host


def _host_of(folder: Path) -> str:
    return _owner_of(folder)[1]


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """True while we hold the lock of a staging folder, False where its owner lives or it has just gone."""
    descriptor = None
    for flags in (os.O_RDWR, os.O_RDONLY):
        try:
            descriptor = os.open(folder / _LOCK, flags)
            break
        except OSError:
            continue
    try:
        if descriptor is None:  # just made, or made by another user
            yield not _is_alive(folder)
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            if _is_alive(folder):
                yield False
                return
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(folder / _LOCK))
        except FileNotFoundError:
            same = False
        yield same
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_alive(folder: Path) -> bool:
    pid, host = _owner_of(folder)
    if host != socket.gethostname() or pid <= 0:
        return False  # settle and clear_leftovers leave it to the other machine for a while
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
