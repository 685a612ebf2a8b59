"""The weights of the model that a command reads: checked by their headers, and loaded without a copy in memory.

Weights in safetensors that keep their dtype are read from their files when they are used. Others are rounded into a
file without a name on the disk of the output, or in memory where that can't be done.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import blaming
from .headers import DTYPES
from .outputs import disk_of
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def load(
    source: Source,
    *,
    expect: Literal["dense", "upcycled"],
    out: Path,
    streamed: bool,
    new_head: bool = False,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a model on the CPU.

    Args:
        source: the model.
        expect: what it must be.
        out: the output, on whose disk there is room for weights in another dtype.
        streamed: whether that disk may be used.
        new_head: as in `ummrm.hf.loading.load_checkpoint`.
        dtype: that the model is rounded to once it is loaded.
        trust_remote_code: run the code that comes with it.

    Raises:
        UserError: it can't be loaded.
    """
    import torch

    from ..hf.loading import check_headers, load_checkpoint
    from ..hf.shards import cast_on_disk

    with blaming(f"{source.name} can't be loaded", Exception):
        if source.headers is not None:
            held_there = {name: (h.dtype, h.shape) for name, h in source.headers.items()}
            check_headers(source.folder, held_there, trust_remote_code=trust_remote_code)
        held = held_dtype(source) if streamed and expect == "dense" else None
        options: dict[str, Any] = {"expect": expect, "new_head": new_head, "trust_remote_code": trust_remote_code}
        as_held = {} if held is None else {"dtype": getattr(torch, held)}
        model: Any = load_checkpoint(source.folder, **options, **as_held)
        if held and (model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict):
            held = None  # only transformers knows which ones it rounds
            model = load_checkpoint(source.folder, **options)
        wanted = [getattr(torch, name) for name in (held and source.config_dtype, dtype) if name]
        if streamed:
            cast_on_disk(model, wanted, disk_of(out))
        return model.to(wanted[-1]) if dtype else model  # the buffers, and what could not be rounded on disk


def scratch_bytes(source: Source, dtype: str | None) -> int:
    """Bytes of disk that weights take for a while which are rounded to another dtype than they have."""
    final = dtype or (held_dtype(source) and source.config_dtype)
    headers = [] if source.headers is None or final is None else list(source.headers.values())
    if all(header.dtype == final for header in headers if header.dtype in _FLOATS):
        return 0
    return sum(header.elements for header in headers) * dict(DTYPES.values())[str(final)]


def held_dtype(source: Source) -> str | None:
    """The dtype that weights should be loaded in, where it is not the one that config.json names and all have another.

    transformers would round them in memory.
    """
    if source.headers is None or source.config_dtype is None:
        return None
    kinds = Counter(header.dtype for header in source.headers.values() if header.dtype in _FLOATS)
    return next(iter(kinds)) if len(kinds) == 1 and source.config_dtype not in kinds else None
