"""The weight files of a checkpoint, made before their content and filled through memory that the files back.

A model that is larger than memory is written so: its tensors are views of its files from the start, and the system
writes them back as it needs room. What stands in the files, under which names and in which file, is what the model's
own `save_pretrained` would write; tests hold the two together. Who fills the files, and how a folder gets them
atomically, is the business of others (`ummrm/upcycle.py`, `ummrm/merge.py`, `saving.py`).
"""

from __future__ import annotations

import copy
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel

# The one place that knows these internal names; tests/hf/test_shards.py says when they go or change.
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from ..nn.parallel import shape_of
from .merge_share import follow_share
from .remote_code import copy_code
from .sharding import class_of, unpartitioned, whole

MAX_SHARD_SIZE = "5GB"  # nobody's readers like larger files; the hub's own default
_INDEX, _PATTERN = "model.safetensors.index.json", "model{suffix}.safetensors"
_KINDS = {  # torch's dtypes by safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class NotStreamable(Exception):
    """The model's save would write other tensors than the model has; only its own `save_pretrained` can."""


class MappedShards:
    """The weight files that a model's save would write, as tensors that the files back.

    Memory that they take is the file system's cache, which the system gives back by itself; the process has none of its
    own for them. Disk space is reserved at once.

    Args:
        folder: where the files are made; holds no weights yet.
        model: names, shapes and dtypes of its tensors count, which may be on the meta device.
        max_shard_size: bytes, or a text such as `"5GB"`: a file holds no more, but for a single larger tensor.

    Attributes:
        places: the tensors in the files by their names in `model`; of tied ones the name that is saved.

    Raises:
        NotStreamable: transformers converts what it writes for this model.
        OSError: the files can't be made, or their file system can't map them (`can_map`).
    """

    def __init__(self, folder: str | os.PathLike, model: PreTrainedModel, max_shard_size: int | str) -> None:
        self.places: dict[str, Tensor] = {}
        self._filled: set[str] = set()
        names, tensors = _saved(model)
        meta = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items()}
        split = split_torch_state_dict_into_shards(meta, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
        for file, keys in split.filename_to_tensors.items():
            views = _make(Path(folder) / file, {key: meta[key] for key in keys})
            self.places |= {names[key]: view for key, view in views.items()}
        if split.is_sharded:
            total = {"total_parameters": model.num_parameters(), **split.metadata}
            index = json.dumps({"metadata": total, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
            (Path(folder) / _INDEX).write_text(f"{index}\n", encoding="utf-8")

    def lend(self, model: nn.Module) -> None:
        """Puts parameters of the files in the place of those that a model has on the meta device."""
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta and name in self.places:
                holder, _, key = name.rpartition(".")
                owner = model.get_submodule(holder)
                owner.register_parameter(key, nn.Parameter(self.places[name], parameter.requires_grad))

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors into the files, each rounded to the dtype that it has there.

        Args:
            tensors: by their names in the model; those that are not saved, and those on the meta device, are left out.
        """
        for name, tensor in tensors.items():
            place = self.places.get(name)
            if place is None or tensor.is_meta:
                continue
            if tensor.data_ptr() != place.data_ptr():
                place.copy_(tensor)
            self._filled.add(name)

    def check_complete(self) -> None:
        """Raises RuntimeError if a tensor of the files was never given."""
        lacking = sorted(self.places.keys() - self._filled)
        if lacking:
            raise RuntimeError(f"{len(lacking)} tensors were never written, first {lacking[0]!r}; please report it.")


def check_streamable(model: PreTrainedModel) -> None:
    """Raises NotStreamable where making `MappedShards` of a model would; writes nothing."""
    for key, tensor in _saved(model)[1].items():
        if tensor.dtype not in _KINDS:
            raise NotStreamable(f"{key} is of {tensor.dtype}")


def describe(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Writes what a model's save writes beside the weights: configuration, generation configuration.

    Call it before the weight files are made: a save removes weight files that it did not write.
    """
    stock: Any = getattr(type(model), "stock_class", type(model))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of no files
    try:
        stock.save_pretrained(model, folder, state_dict={})
        copy_code(model, folder)
    finally:
        if bars:
            logging.enable_progress_bar()


def write_shared(model: Any, folder: str | os.PathLike | None, max_shard_size: int | str = MAX_SHARD_SIZE) -> Any:
    """Writes a model that processes share (FSDP2, ZeRO-3) tensor by tensor, as its `save_pretrained` would as a whole.

    Every process calls it; none holds more than one whole tensor.

    Args:
        model: the model.
        folder: an empty one; None in a process that does not write.
        max_shard_size: as in `MappedShards`.

    Returns:
        A model of its class on the meta device.

    Raises:
        NotStreamable: in every process, with nothing written.
        OSError: the files can't be written.
    """
    follow_share(model)
    config = copy.copy(model.config)
    vars(config).pop("distributed_config", None)  # of transformers' engine, whose saves all processes take part in
    with torch.device("meta"), unpartitioned():
        twin = class_of(model)(config)
    held = model.state_dict(keep_vars=True)
    for name, tensor in twin.state_dict(keep_vars=True).items():
        tensor.data = torch.empty(tensor.shape, dtype=held[name].dtype, device="meta")
    check_streamable(twin)
    shards = None
    if folder is not None:
        if getattr(model, "generation_config", None) is not None:
            twin.generation_config = model.generation_config
        describe(twin, folder)
        shards = MappedShards(folder, twin, max_shard_size)
    for name, tensor in held.items():
        value = whole(tensor)
        if shards is not None:
            shards.take({name: value})
    if shards is not None:
        shards.check_complete()
    return twin


def emptied(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Puts all tensors of a model on the meta device, ties kept, and hands out what it had by name.

    Args:
        model: the model.
        dtype: that its floating-point tensors have afterwards; None leaves each its own.
    """
    held = model.state_dict(keep_vars=True)
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for attribute in ("_parameters", "_buffers"):
            tensors = getattr(module, attribute)
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    new = torch.empty(shape_of(tensor), dtype=kind, device="meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                tensors[key] = made[id(tensor)]
    return held


@torch.no_grad()
def cast_on_disk(model: nn.Module, dtypes: Iterable[torch.dtype], folder: str | os.PathLike) -> None:
    """Rounds the floating-point parameters of a model as `model.to(dtype)` does, into a file instead of memory.

    Args:
        model: on the CPU.
        dtypes: one after the other.
        folder: on whose disk the file lies, as large as the result; it has no name, and is gone with the model.

    Raises:
        OSError: the disk is full, or its file system can't map files.
    """
    dtypes = list(dtypes)
    for parameter in dict.fromkeys(model.parameters()):
        if not parameter.is_floating_point() or not dtypes or parameter.dtype == dtypes[-1] == dtypes[0]:
            continue
        size = parameter.numel() * dtypes[-1].itemsize
        # A mapping each: transformers takes views of one storage for tied tensors.
        with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
            _reserve(file.fileno(), max(size, 1))
            place = _mapped(file.fileno(), max(size, 1))
        old = parameter.detach()
        for dtype in dtypes[:-1]:
            old = old.to(dtype)
        parameter.data = place[:size].view(dtypes[-1]).view(parameter.shape).copy_(old)


def can_map(folder: str | os.PathLike) -> bool:
    """Whether files on the file system of a folder can be written through memory; some network ones have no such way.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
        os.truncate(file.fileno(), mmap.PAGESIZE)
        try:
            _mapped(file.fileno(), mmap.PAGESIZE).fill_(1)
        except (OSError, ValueError):
            return False
    return True


def _saved(model: PreTrainedModel) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The tensors that a model's save writes, in its order, by their names there; and these by the model's own."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in ignored}
    with torch.no_grad():
        state = remove_tied_weights_from_state_dict(state, model)
        own = {id(tensor): name for name, tensor in state.items()}
        tensors = revert_weight_conversion(model, dict(state))
    if {id(tensor) for tensor in tensors.values()} != own.keys():
        raise NotStreamable(f"transformers converts the tensors of a {type(model).__name__} when it saves them")
    return {key: own[id(tensor)] for key, tensor in tensors.items()}, tensors


def _make(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Makes a safetensors file of tensors of these shapes and dtypes; the tensors in it, which hold zeros."""
    # widest first, so that each starts at a multiple of its width
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _KINDS:
            raise NotStreamable(f"{key} is of {tensor.dtype}")
        end = start + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    with open(path, "x+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        _reserve(file.fileno(), base + start)
        whole = _mapped(file.fileno(), base + start)
    views = {}
    for key in order:
        first, last = (base + offset for offset in header[key]["data_offsets"])
        views[key] = whole[first:last].view(tensors[key].dtype).view(tensors[key].shape)
    return views


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Gives a file its length and its disk space: a page that finds no room later would end the process."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except AttributeError:  # macOS
        os.truncate(descriptor, num_bytes)


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    """A file's bytes [num_bytes] as a tensor; writing to it writes to the file."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)
