"""Upcycling a whole Hugging Face model: every chosen dense FFN becomes experts, the rest moves over unchanged.

In memory, or straight into the files of a checkpoint, by the same steps on the same random numbers.
"""

from __future__ import annotations

import contextlib
import copy as copy_module
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .config import UpcycleConfig
from .hf.detect import find_family
from .hf.head import head_name
from .hf.modeling import UmmPreTrainedMixin, ffn_sites
from .hf.proof import check_row, prove_layers
from .hf.registry import stock_config, umm_class, upcycled_config
from .hf.reward_head import draw_heads, reward_model, with_fresh_head
from .hf.sharding import is_sharded, whole
from .hf.shards import MAX_SHARD_SIZE, MappedShards, describe, emptied
from .nn.dense import Projection
from .nn.parallel import plain_name
from .nn.upcycled_ffn import UpcycledFFN
from .nn.upcycled_linear import UpcycledLinear, mixture_parts


class ConsumedModel:
    """What is left of a dense model whose tensors `ummrm.upcycle` took over: every use is a clear error."""

    def __getattribute__(self, name: str):
        if name.startswith("__") and name.endswith("__"):
            return object.__getattribute__(self, name)
        raise RuntimeError(
            f"this model's tensors were taken over by ummrm.upcycle, so `.{name}` is gone; use the upcycled model, or "
            "call ummrm.upcycle(model, config, copy=True) to keep the dense one."
        )

    def __call__(self, *args, **kwargs):
        self.forward  # noqa: B018  raises the error above

    def __repr__(self) -> str:
        return "ConsumedModel (its tensors were taken over by ummrm.upcycle)"


def upcycle(
    dense: PreTrainedModel,
    config: UpcycleConfig,
    *,
    copy: bool = False,
    new_head: bool = False,
    tokenizer: Any = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Turns a dense model into its mixture-of-experts counterpart; at this moment both compute the same.

    Every FFN of the chosen layers becomes `num_experts` routed experts and `num_shared_experts` shared ones, all copies
    of it, and a new router (UMM-RM, arXiv 2512.00724; sparse upcycling, arXiv 2212.05055). By sequence there is no
    router: whole sequences go through one expert (`groups` in the forward), and the experts may be all linear layers,
    the reward head's last one too. Fresh heads of experts are the one thing that differs at first: the first member
    computes what the dense model under its fresh head did, and the others with heads of their own.
    All other parameters keep their values, dtypes, devices, ties and `requires_grad`; experts and routers are
    trainable.

    That every layer computes the same, upcycled and merged back, is proven on a tiny random batch before `dense` loses
    anything: one forward of each model over ten tokens, up to the rounding of the model's dtype.

    Args:
        dense: a stock transformers model of a known family (`ummrm.hf.families.FAMILIES`) or of one whose
            structure leaves no doubt, any task.
        config: experts, gate, router, layers, auxiliary losses.
        copy: False takes the dense model's tensors over, with no second copy in memory, and leaves `dense` unusable
            (any use raises); True copies them and leaves `dense` as it is.
        new_head: make a reward model of a causal or masked language model, or of a backbone alone: `reward_model` says
            how its fresh head starts, and warns that it is fresh. With `experts_in="all"` each expert's is drawn anew
            by the same initialisation: expert 0's is the one that `reward_model(dense, seed=seed)` has, expert e's
            comes from the splitmix64 mix of `seed` and e; without `new_head` all are copies. There `dense` may be a
            reward model too, whose head (one that transformers has made up, say) makes way for fresh ones.
        tokenizer: for `new_head`: names the padding token.
        seed: for `new_head`: of what is fresh.

    Returns:
        A model of the registered class (`UmmLlamaForSequenceClassification`, ...), in the same training mode.

    Raises:
        TypeError: `dense` or `config` is of another type.
        ValueError: the model can't be upcycled (unknown family or class, a row that does not fit it, upcycled already,
            quantised, on several devices, not finite) or the configuration does not fit it (`experts_in="all"` and no
            reward head with one output). `dense` is then unchanged.
    """
    job = _prepare(dense, config, new_head, tokenizer, seed)
    _carry_out(job)
    if copy:
        transplant(job.dense, job.moe, clone=True)
    _keep_checkpointing(job.dense, job.moe)
    if not copy:
        dense.__dict__.clear()
        dense.__class__ = ConsumedModel  # type: ignore[assignment]
    return job.moe


def write_upcycled(
    dense: PreTrainedModel,
    folder: str | os.PathLike,
    config: UpcycleConfig,
    *,
    new_head: bool = False,
    tokenizer: Any = None,
    seed: int = 0,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> PreTrainedModel:
    """Upcycles straight into weight files, for a model whose experts would not fit into memory.

    The files are, tensor by tensor, those that `upcycle` and then the model's `save_pretrained` write from the same
    random state. Each layer's experts are made and proven in the files. Beside the memory that `dense` takes (none, for
    one that was just loaded from safetensors in its own dtype on a CPU), it needs room for one dense FFN a few times.

    Args:
        dense: as in `upcycle`, on the CPU; it is left as it is.
        folder: an empty one, written file by file: `ummrm.hf.saving.save_written` calls this for a folder in use.
        config: as in `upcycle`.
        new_head: as in `upcycle`.
        tokenizer: as in `upcycle`.
        seed: as in `upcycle`.
        max_shard_size: bytes, or a text such as `"5GB"`: a weight file holds no more, but for a single larger tensor.

    Returns:
        The upcycled model on the meta device: its class, its configuration, its shapes.

    Raises:
        TypeError, ValueError: as `upcycle`; what is in the folder is then incomplete.
        NotStreamable: transformers converts the tensors of such a model when it saves them.
        OSError: the files can't be written.
    """
    job = _prepare(dense, config, new_head, tokenizer, seed)
    transplant(job.dense, job.moe, clone=False, complete=False)  # so that it has the dtypes, and the ties
    describe(job.moe, folder)
    shards = MappedShards(folder, job.moe, max_shard_size)
    shards.lend(job.moe)
    _carry_out(job)
    shards.take(job.moe.state_dict())
    shards.check_complete()
    emptied(job.moe, None)
    return job.moe


class _Job(NamedTuple):
    """What is upcycled, and into what."""

    dense: PreTrainedModel
    moe: Any
    stock: PreTrainedModel
    indices: tuple[int, ...]
    config: UpcycleConfig
    fresh_heads: bool
    seed: int


def _prepare(dense: PreTrainedModel, config: UpcycleConfig, new_head: bool, tokenizer: Any, seed: int) -> _Job:
    """Checks what can be checked; the upcycled model and the stock one of a later merge are on the meta device."""
    if not isinstance(config, UpcycleConfig):
        raise TypeError(f"`config` must be an UpcycleConfig, got {type(config).__name__}.")
    _check_upcyclable(dense)
    if new_head:
        make = with_fresh_head if config.has_head_experts else reward_model
        dense = make(dense, tokenizer, seed=seed)
    elif tokenizer is not None:
        raise ValueError("`tokenizer` must be None without new_head=True, which alone reads it; leave it out.")
    elif seed:
        raise ValueError(
            f"`seed` must be 0 without new_head=True, which alone reads it, got {seed!r}; routers and expert_noise go "
            "by torch.manual_seed."
        )
    family = find_family(dense)
    family.check(dense.config)
    indices = check_row(family, dense, config)
    if config.has_head_experts:
        head_name(dense)
    with torch.device("meta"):
        moe: Any = umm_class(type(dense))(upcycled_config(dense.config, config, family))
        stock = moe.stock_class(stock_config(moe.config))
    _check_nothing_added(dense, stock)
    for experts, dtype in _experts(dense, moe):
        experts.to(dtype)
    return _Job(dense, moe, stock, indices, config, new_head and config.has_head_experts, seed)


def _carry_out(job: _Job) -> None:
    """Fills and proves the upcycled model; it shares the other tensors with the dense one."""
    dense, moe, noisy = job.dense, job.moe, job.config.expert_noise > 0
    # Proven without noise, on shared tensors: nothing is copied, and a refusal leaves the dense model as it was.
    with _random_state_kept(dense) if noisy else contextlib.nullcontext():
        _fill(dense, moe, noise=False)
    transplant(dense, moe, clone=False)
    transplant(moe, job.stock, clone=False, complete=False)
    prove_layers(dense, moe, job.stock, job.indices)
    if noisy:
        _fill(dense, moe, noise=True)
    if job.fresh_heads:
        draw_heads(moe, dense, job.seed)


def _experts(dense: PreTrainedModel, moe: UmmPreTrainedMixin) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The modules of a model that hold experts, and the dtype of what they are copies of."""
    layers = moe.family.layer_list(dense.base_model)
    for index, site in ffn_sites(moe).items():
        ffn: Any = moe.get_submodule(site)
        dtype = moe.family.dense_ffn(layers[index], dense.config).up.weight.dtype
        yield from ((experts, dtype) for experts in (ffn.experts, ffn.shared_experts) if experts is not None)
    for name, part in mixture_parts(moe).items():
        if isinstance(part, UpcycledLinear):
            yield part, Projection(dense.get_submodule(name)).weight.dtype


def _fill(dense: PreTrainedModel, moe: UmmPreTrainedMixin, *, noise: bool) -> None:
    """Gives the FFNs of a model built on the meta device their values: copied experts and fresh routers.

    The parameters that it has been given already are written to.
    """
    family, layers = moe.family, moe.family.layer_list(dense.base_model)
    for index, site in ffn_sites(moe).items():
        ffn, source = moe.get_submodule(site), family.dense_ffn(layers[index], dense.config)
        assert isinstance(ffn, UpcycledFFN)
        _make_real(ffn, source.up.weight.device)
        if ffn.router is not None:
            ffn.router.reset_parameters()
        ffn.copy_experts(source, ffn.config.expert_noise if noise else 0.0)
    for name, linear in mixture_parts(moe).items():
        if isinstance(linear, UpcycledLinear):
            origin = dense.get_submodule(name)
            _make_real(linear, Projection(origin).weight.device)
            linear.copy_from(origin, linear.config.expert_noise if noise else 0.0)


def _make_real(module: nn.Module, device: torch.device) -> None:
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device=device)


def _random_state_kept(dense: PreTrainedModel) -> contextlib.AbstractContextManager:
    device = next(dense.parameters()).device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def transplant(source: nn.Module, target: nn.Module, *, clone: bool, complete: bool = True) -> None:
    """Gives `target` the parameters, buffers and modes of the equally named modules of `source`.

    FFN sites, which have no counterpart, are the caller's.

    Args:
        source: holds the tensors.
        target: a model of the other structure, built on the meta device.
        clone: copy tensors rather than share them; ties are kept either way.
        complete: raise RuntimeError if `target` has tensors left on the meta device.
    """
    clones: dict[int, torch.Tensor] = {}

    def take(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or not clone:
            return tensor
        if id(tensor) not in clones:
            # of a sharded model every process gets whole tensors
            new = whole(tensor).clone()
            clones[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return clones[id(tensor)]

    sources = {plain_name(name): m for name, m in source.named_modules(remove_duplicate=False)}
    for name, module in target.named_modules(remove_duplicate=False):
        origin = sources.get(name)
        if origin is None:
            continue
        if isinstance(module, (UpcycledFFN, UpcycledLinear)):
            module.train(origin.training)
            continue
        for attribute in ("_parameters", "_buffers"):
            ours, theirs = getattr(module, attribute), getattr(origin, attribute)
            for key in ours.keys() & theirs.keys():
                ours[key] = take(theirs[key])
        module.training = origin.training
        if isinstance(module, nn.Dropout) and isinstance(origin, nn.Dropout):
            module.p = origin.p  # which a user may have changed since the configuration was read
    if getattr(source, "generation_config", None) is not None:
        target.generation_config = copy_module.deepcopy(source.generation_config)
    leftover = [n for n, t in [*target.named_parameters(), *target.named_buffers()] if t.is_meta]
    if leftover and complete:
        raise RuntimeError(
            f"{type(target).__name__} has tensors that {type(source).__name__} lacks, first {leftover[0]!r}: this "
            "version of transformers builds them differently; please report it with both class names."
        )


def _check_nothing_added(dense: PreTrainedModel, stock: PreTrainedModel) -> None:
    """Raises ValueError if `dense` holds a tensor that a model of its class and configuration has no place for."""
    places = dict(stock.named_modules(remove_duplicate=False))
    for name, module in dense.named_modules(remove_duplicate=False):
        place = places.get(name)
        known = () if place is None else {*place._parameters, *place._buffers}
        held = {**module._parameters, **module._buffers}
        added = [k for k, t in held.items() if t is not None and k not in module._non_persistent_buffers_set]
        added = [key for key in added if key not in known]
        if added:
            raise ValueError(
                f"`dense` must hold what a {type(dense).__name__} of its configuration holds, got another tensor, "
                f"{'.'.join(filter(None, (name, added[0])))!r}, which the upcycled model has no place for; remove it, "
                "or replace FFN modules yourself with UpcycledFFN.from_dense(ffn, config)."
            )


def _keep_checkpointing(dense: PreTrainedModel, moe: PreTrainedModel) -> None:
    """Leaves activation checkpointing as it was in each layer."""
    sources = dict(dense.named_modules())
    for name, module in moe.named_modules():
        for key in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if name in sources and key in vars(sources[name]):
                setattr(module, key, vars(sources[name])[key])


def _check_upcyclable(dense: object) -> None:
    if isinstance(dense, ConsumedModel):
        raise ValueError(
            "`dense` was upcycled already and its tensors taken over; load it again or use upcycle(..., copy=True)."
        )
    if not isinstance(dense, PreTrainedModel):
        hint = (
            "merge the adapter first (merge_and_unload)"
            if hasattr(dense, "peft_config")
            else "for your own network replace its FFN modules with UpcycledFFN.from_dense(ffn, config)"
        )
        raise TypeError(f"`dense` must be a transformers PreTrainedModel, got {type(dense).__name__}; {hint}.")
    if isinstance(dense, UmmPreTrainedMixin):
        raise ValueError(f"`dense` must be a dense model, got a {type(dense).__name__}, which is upcycled already.")
    if getattr(dense, "hf_quantizer", None) is not None or getattr(dense, "is_quantized", False):
        raise ValueError(
            f"`dense` must hold plain float weights, got a quantised {type(dense).__name__}; load it without "
            "quantization_config, upcycle, and quantise the merged model."
        )
    if getattr(dense, "_hf_peft_config_loaded", False):
        raise ValueError("`dense` must hold no adapters; merge and unload them before upcycling.")
    if is_sharded(dense):
        raise ValueError(
            "`dense` must hold whole weights, and processes share them: an engine (ZeRO-3, FSDP2) has them already. "
            "Upcycle into a folder first (`ummrm upcycle`, or ummrm.upcycle.write_upcycled) and load that, or load and "
            "upcycle before the arguments are made that name the engine."
        )
    meta = [name for name, p in dense.named_parameters() if p.is_meta]
    if meta:
        raise ValueError(
            f"`dense` must hold its weights, and {len(meta)} parameters are on the meta device, first {meta[0]!r}; "
            "load it without offloading."
        )
    devices = sorted({str(p.device) for p in dense.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"`dense` must be on one device, got parameters on {', '.join(devices)}; load it without device_map, "
            "upcycle on one device, then distribute the upcycled model."
        )
