"""Saving a model into a folder: atomic, and touching only the files that the save itself writes.

What a model's own `save_pretrained` writes goes to a private subfolder, is flushed to disk, and is then put in place by
`replacing.py`, so that a process killed at any moment leaves a folder with the old checkpoint, the new one, or one that
no reader takes for a checkpoint until our next load or save completes it. Everything else that lies in the folder,
below it or mounted on it stays as it is. `copy_companions` brings along what is neither weights nor configuration.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from . import card, replacing
from .remote_code import copy_code
from .sharding import reshard, whole
from .shards import NotStreamable, write_shared

# what nearly every save writes: checked before the work begins, the rest when it is known
_USUAL_FILES = ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", card.FILE]
# what is of the model that was read and not of the one that was saved: weights in any format and their index, adapters,
# configuration, the state and the results of its training
_NOT_COMPANIONS = [
    *(f"*.{kind}" for kind in ("safetensors", "bin", "pt", "pth", "pkl", "ckpt", "h5", "msgpack", "ot", "npz", "gguf")),
    *("*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.index.json", "*.index.*.json", "adapter_config.json"),
    *("config.json", "trainer_state.json", "distillation.json", "*_results.json", "*.tfevents.*"),
    *("zero_to_fp32.py", "latest", ".*"),
]
_OF_THE_SAVE = {"generation_config.json", card.FILE}  # kept where the folder has them


def save_pretrained(
    model: PreTrainedModel, save_directory: str | os.PathLike, *, model_card: str | None = None, **kwargs
) -> None:
    """Saves any Hugging Face model like its own `save_pretrained`, but atomically.

    Args:
        model: the model.
        save_directory: the folder; made if it is not there. Files of it that the save does not write stay as they are;
            weights of a checkpoint that is replaced go, an adapter on them too.
        model_card: text of its README.md, by default the one that `ummrm.merge` made for the model; a card in the
            folder that ummrm did not write stays.
        kwargs: passed to the model class's `save_pretrained`.

    Raises:
        NotADirectoryError: something that is no folder stands at `save_directory`.
        FileExistsError: something that is no file stands at the name of a file that is written.
        OSError: the files can't be written; the folder is as it was.

    Warns:
        UserWarning: an interrupted save into the folder was found, and completed or forgotten.
    """
    text = card.recall(model) if model_card is None else model_card
    stock = getattr(type(model), "stock_class", type(model))  # an upcycled class's own method is atomic already

    def save(path: str | os.PathLike, **kw) -> None:
        stock.save_pretrained(model, path, **kw)
        if kw.get("is_main_process", True):
            copy_code(model, path)
        if text is not None and kw.get("is_main_process", True) and os.listdir(path):
            card.write(path, text, previous=save_directory)

    save_atomically(save, save_directory, **kwargs)


def save_written(
    write: Callable[[str | os.PathLike], PreTrainedModel], save_directory: str | os.PathLike
) -> PreTrainedModel:
    """Saves, atomically, a model that is in no memory: a function writes its files (`ummrm.upcycle.write_upcycled`).

    Args:
        write: called with a new, empty folder; returns a model that may be on the meta device, whose card is written.
        save_directory: as in `save_pretrained`.

    Returns:
        What `write` returned.

    Raises, and warns, as `save_pretrained`.
    """
    made: list[PreTrainedModel] = []

    def save(path: str | os.PathLike) -> None:
        made.append(write(path))
        text = card.recall(made[0])
        if text is not None:
            card.write(path, text, previous=save_directory)

    save_atomically(save, save_directory)
    return made[0]


def save_shared(model: Any, save_directory: str | os.PathLike) -> None:
    """`save_pretrained` of a model that processes share (FSDP2, ZeRO-3), by all of them; the first one writes.

    No process holds more of it than a tensor, unless transformers converts what it writes for such a model.

    Raises, and warns, as `save_pretrained`.
    """
    first = dist.get_rank() == 0
    reshard(model)
    try:
        if first:
            save_written(lambda folder: write_shared(model, folder), save_directory)
        else:
            write_shared(model, None)
    except NotStreamable:  # in every process
        state = {name: whole(tensor).cpu() for name, tensor in model.state_dict(keep_vars=True).items()}
        if first:
            save_pretrained(model, save_directory, state_dict=state)


def copy_companions(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> list[str]:
    """Brings along what a checkpoint has beside its weights and configuration: tokenizer, chat templates, licence, ...

    Call it after the save. Atomic, as a save is; replaces files of the same names, but neither a README.md nor a
    generation_config.json that the folder has. Links are followed; what is no file is left out with a warning. Of
    subfolders only the one with further chat templates is read.

    Args:
        source: the folder or hub name that the model came from.
        target: the folder that it was saved into.
        revision: of a hub name.
        local_files_only: take a hub name from the cache alone, as it is done offline anyway.

    Returns:
        The names of the copied files.

    Raises:
        OSError: a file can't be read or written, or the hub name can't be reached and is not in the cache.
    """
    if not os.path.isdir(source):
        source = snapshot_download(
            os.fspath(source), revision=revision, local_files_only=local_files_only, ignore_patterns=_NOT_COMPANIONS
        )
    origin, folder = Path(source), Path(target)
    if folder.exists() and os.path.samefile(origin, folder):
        return []
    kept = {name for name in _OF_THE_SAVE if os.path.lexists(folder / name)}
    copied = _copy_files(origin, folder, kept)
    if (origin / CHAT_TEMPLATE_DIR).is_dir():
        templates = _copy_files(origin / CHAT_TEMPLATE_DIR, folder / CHAT_TEMPLATE_DIR, set())
        copied += [f"{CHAT_TEMPLATE_DIR}/{name}" for name in templates]
    return copied


def _copy_files(origin: Path, folder: Path, kept: set[str]) -> list[str]:
    names = [n for n in sorted(os.listdir(origin)) if not any(fnmatch.fnmatch(n, p) for p in _NOT_COMPANIONS)]
    files = []
    for name in names:
        try:
            mode = os.stat(origin / name).st_mode
        except FileNotFoundError:
            mode = 0
        if stat.S_ISREG(mode) and name not in kept:
            files.append(name)
        elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            what = replacing.kind_of(mode) if mode else "a link to nothing"
            warnings.warn(f"{origin / name} is {what}, and is not copied to {folder}.", stacklevel=3)

    def copy(staged: str | os.PathLike) -> None:
        for name in files:
            shutil.copyfile(origin / name, os.path.join(staged, name))

    if files:
        save_atomically(copy, folder)
    return files


def save_atomically(save: Callable[..., None], save_directory: str | os.PathLike, **kwargs) -> None:
    """Runs `save(folder, **kwargs)` on a private subfolder of `save_directory`, then puts its files in place.

    Args:
        save: writes the files, no folders; called with a new, empty folder of the same name, from which transformers
            derives a hub repository's name.
        save_directory: the folder for the files.
        kwargs: for `save`. A process that is not the main one (`is_main_process=False`) only takes part in what
            `save` does collectively; it writes nothing.

    Raises:
        as `save_pretrained`.
    """
    if not kwargs.get("is_main_process", True) or kwargs.get("distributed_checkpoint"):
        # the latter is transformers' format for resuming a run, which every process writes into the same folder
        save(save_directory, **kwargs)
        return
    name = os.path.basename(os.path.abspath(save_directory)) or "model"
    target = Path(os.path.realpath(save_directory))
    made = _make(target, save_directory)
    staging = None
    try:
        replacing.check_names(target, _USUAL_FILES)
        replacing.settle(target)
        replacing.clear_leftovers(target)
        staging = _staging(target, name, save_directory)
        save(staging.files, **kwargs)
        staging.commit()
    except BaseException:
        if staging is not None:
            staging.close()
        for folder in made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise
    staging.close()


def _make(target: Path, save_directory: str | os.PathLike) -> list[Path]:
    """Makes the folder; those that had to be made, the deepest first."""
    if os.path.lexists(target) and not target.is_dir():
        raise NotADirectoryError(
            f"`save_directory` must be a folder, got {replacing.kind_of(os.lstat(target).st_mode)}: {save_directory}; "
            "choose another path or remove it."
        )
    made = [folder for folder in (target, *target.parents) if not folder.exists()]
    target.mkdir(parents=True, exist_ok=True)
    for folder in made:
        replacing.flush(folder.parent)
    return made


def _staging(target: Path, name: str, save_directory: str | os.PathLike) -> replacing.Staging:
    try:
        return replacing.Staging(target, name)
    except PermissionError as error:
        raise PermissionError(
            f"`save_directory` must be a folder that may be written, got {save_directory} ({error.strerror}); change "
            "its permissions or save into another folder."
        ) from error
