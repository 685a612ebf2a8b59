"""`ummrm merge`: a saved upcycled model into one dense model of its original class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .errors import UserError, blaming
from .headers import DTYPES
from .outputs import check_output, check_space, replaced, save, streams
from .screen import Steps, note, quiet_libraries, say, size
from .source import Source, admit_code, open_source
from .weights import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(
    moe: Annotated[str, typer.Argument(help="Folder or hub name of an upcycled model, in its mixture or merge phase.")],
    out: Annotated[str, typer.Argument(help="Folder for the merged, dense model.")],
    shared_share: Annotated[
        float | None,
        typer.Option(
            help="lambda, the shared experts' share, for a model in its mixture phase; its merge weights are uniform "
            "(default: 0.5; by sequence the weight that shared experts had).",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16: merged as saved, then rounded once (default: that of MOE)."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda or cuda:N.")] = "cpu",
    revision: Annotated[
        str | None, typer.Option(help="Of a hub name: a branch, tag or commit (default: main).")
    ] = None,
    max_shard_size: Annotated[
        str,
        typer.Option(
            help="No weight file is larger, but for a single larger tensor (default: 5GB).", show_default=False
        ),
    ] = "5GB",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Allow an OUT that holds something: model files are replaced, others stay."),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Folds an upcycled model into one dense model of its original class, which needs no ummrm.

    A model saved in its merge phase brings its learned merge weights; one saved
    before gets uniform ones. The tokenizer and all else that is not weights or
    config comes along.

    On a CPU the weights go from file to file: a model that is larger than
    memory is merged too.

    Example: ummrm merge trained-rm merged
    """
    options.check_dtype(dtype)
    options.check_device(device)
    shard_size = options.read_shard_size(max_shard_size)
    more: dict[str, Any] = {
        "revision": revision,
        "shard_size": shard_size,
        "overwrite": overwrite,
        "trust_remote_code": trust_remote_code,
    }
    with quiet_libraries():
        run(moe, out, shared_share, dtype, device, **more)


def run(
    moe: str,
    out: str,
    shared_share: float | None,
    dtype: str | None,
    device: str,
    *,
    revision: str | None,
    shard_size: int,
    overwrite: bool,
    trust_remote_code: bool,
) -> None:
    """The command with its options read."""
    import torch

    import ummrm

    from ..hf.shards import NotStreamable
    from ..merge import write_merged

    with blaming("", ValueError):
        settings = ummrm.MergeConfig() if shared_share is None else ummrm.MergeConfig(shared_share=shared_share)
    source = open_source(moe, revision)
    admit_code(source, trust_remote_code)
    phase = check_upcycled(source)
    if phase == "merging" and shared_share is not None:
        raise UserError("--shared-share must be left out for a model in its merge phase: it has its own lambda.")
    target = check_output(out, source.folder, overwrite)
    streamed = streams(target, device)
    check_space(target, _merged_bytes(source, dtype))
    steps, was_there = Steps(3), replaced(target)
    with steps.step(f"loading {moe} ({size(source.num_bytes)})", own_bar=True):
        model: Any = load(source, expect="upcycled", out=target, streamed=streamed, trust_remote_code=trust_remote_code)
        model.to(device)
    rounded = None if dtype is None else getattr(torch, dtype)

    def write(folder: Path) -> PreTrainedModel:
        with steps.step("merging experts"), blaming(f"{moe} can't be merged", ValueError):
            if phase == "mixture":
                ummrm.prepare_merge(model, settings)
            if streamed:
                try:
                    return write_merged(model, folder, dtype=rounded, max_shard_size=shard_size)
                except NotStreamable as reason:
                    note(f"note: {reason}, so all of them are merged in memory first")
            dense: Any = ummrm.merge(model)  # of the model's stock class
            if rounded is not None:
                dense.to(rounded)
        dense.save_pretrained(folder, max_shard_size=shard_size)
        return dense

    dense = save(write, target, source, steps)
    how = "learned" if phase == "merging" else "uniform"
    say(f"{type(dense).__name__}, {how} merge weights, saved in {out}{was_there}; stock transformers loads it")


def check_upcycled(source: Source, *, own_code: bool = False) -> str:
    """The phase of a saved upcycled model.

    Args:
        source: the model.
        own_code: it comes with code, which is not run; its configuration is then taken as it stands.

    Raises:
        UserError: it is none, or of an ummrm that knows more than this one.
    """
    import transformers

    import ummrm

    name, config = source.name, source.config
    if not source.is_upcycled:
        raise UserError(f"{name} is no upcycled model (model_type {source.model_type!r}); `ummrm upcycle` it first.")
    if not own_code and source.model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"{name} is a {source.model_type} model, which ummrm {ummrm.__version__} does not know; upgrade ummrm, or "
            "register its family (docs/families.md)."
        )
    phase = config.get("umm_phase", "mixture")
    if phase not in ("mixture", "merging"):
        raise UserError(f"{name}: `umm_phase` must be mixture or merging, got {phase!r}; upgrade ummrm.")
    for section, cls in (("umm", ummrm.UpcycleConfig), ("umm_merge", ummrm.MergeConfig)):
        if section == "umm" or phase == "merging":
            fields = config.get(section)
            with blaming(f"{name}", ValueError):
                if not isinstance(fields, dict):
                    raise ValueError(f"its config.json must have a section `{section}`, got {fields!r}.")
                cls.from_dict(fields)
    if not own_code:
        with blaming(f"{name}: its configuration can't be used", Exception):
            transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    base = config.get("umm_base_model")
    if base is not None and not isinstance(base, str):
        raise UserError(f"{name}: `umm_base_model` must be the name of a model or null, got {base!r}.")
    return phase


def _merged_bytes(source: Source, dtype: str | None) -> int:
    """Bytes of the merged weights: one expert of each layer, no router, and all that are no experts."""
    if source.headers is None:
        return 0
    width = dict(DTYPES.values()).get(dtype or "")
    total = 0
    for name, header in source.headers.items():
        parts = name.split(".")
        if "shared_experts" in parts or "router" in parts or "alpha" in parts:
            continue
        num_bytes = header.elements * width if width else header.num_bytes
        stacked = "experts" in parts or parts[-1] in ("expert_weight", "expert_bias")
        total += num_bytes // max(header.shape[0], 1) if stacked and header.shape else num_bytes
    return total
