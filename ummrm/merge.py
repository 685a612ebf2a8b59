"""Merging: freeze the experts, learn merge weights, fold the experts back into one dense model.

`prepare_merge` and `merge` serve Hugging Face models and any other network with `UpcycledFFN` modules alike;
`write_merged` merges a Hugging Face model straight into the files of a checkpoint.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from .config import MergeConfig
from .hf import card
from .hf.merge_share import SHARE_NAME
from .hf.modeling import UmmPreTrainedMixin, ffn_sites, freeze_for_merge
from .hf.registry import stock_config
from .hf.saving import save_pretrained, save_written
from .hf.sharding import gathered, is_sharded, reshard, unpartitioned, whole
from .hf.shards import MAX_SHARD_SIZE, MappedShards, NotStreamable, check_streamable, describe, emptied
from .nn.dense import Projection
from .nn.experts import Experts
from .nn.merge_weights import LEARNED, MergeShare
from .nn.merging_ffn import MergingFFN
from .nn.merging_linear import MergingLinear, merging_parts
from .nn.routing_statistics import RoutingStatistics
from .nn.upcycled_ffn import UpcycledFFN, upcycled_ffns
from .nn.upcycled_linear import UpcycledLinear, mixture_parts
from .upcycle import transplant

_SHARE_FLOOR = 1e-4  # an expert that was never used still starts with a finite alpha


def prepare_merge(
    moe: nn.Module, config: MergeConfig | None = None, statistics: RoutingStatistics | None = None
) -> nn.Module:
    """Puts an upcycled network into its merge phase, in place: experts frozen, merge weights learnable.

    Every `UpcycledFFN` becomes a `MergingFFN`, which merges its experts on every forward and runs the merged dense FFN
    (an `UpcycledLinear` a `MergingLinear`).
    Afterwards only alpha (and lambda, if `learn_shared_share`) requires a gradient; train it on the same preference
    data, with any loop: `[p for p in moe.parameters() if p.requires_grad]`. Routers are dropped.

    Args:
        moe: a model from `ummrm.upcycle`, or any network with `UpcycledFFN` modules.
        config: lambda, granularity and start of alpha; the default is `MergeConfig()`.
        statistics: measured routing statistics (`record_routing_statistics`), required by `alpha_init="routing"`.

    Returns:
        `moe` itself.

    Raises:
        TypeError: `moe` holds no `UpcycledFFN`, or `config` is of another type.
        ValueError: `alpha_init="routing"` without a fitting `statistics`, `moe` is an `UpcycledFFN` alone, or it holds
            adapters. `moe` is then unchanged.
    """
    config = MergeConfig() if config is None else config
    if not isinstance(config, MergeConfig):
        raise TypeError(f"`config` must be a MergeConfig, got {type(config).__name__}.")
    parts = mixture_parts(moe)
    if not parts:
        raise TypeError(
            f"`moe` must hold UpcycledFFN modules, got a {type(moe).__name__} with none"
            + ("; it is in its merge phase already." if merging_parts(moe) else "; call ummrm.upcycle first.")
        )
    if "" in parts:
        raise ValueError(
            "`moe` must hold its UpcycledFFN modules, got one alone, which can't be exchanged in place; wrap it: "
            "torch.nn.Sequential(ffn)."
        )
    _check_no_adapters(moe, parts)
    config = config.resolved(next(iter(parts.values())).config)
    shares = _routed_shares(upcycled_ffns(moe), statistics) if config.alpha_init == "routing" else {}
    share, merged = _merging(parts, config)
    for name, gate_share in shares.items():
        alpha = merged[name].alpha
        alpha.data.copy_(gate_share.clamp_min(_SHARE_FLOOR).log().to(alpha).expand_as(alpha))

    replacement = {id(part): merged[name] for name, part in parts.items()}
    for name, module in list(moe.named_modules(remove_duplicate=False)):  # an FFN may be used in several places
        if id(module) in replacement:
            moe.set_submodule(name, replacement[id(module)])
    # One lambda for the network. An arbitrary root may run its children one by one (nn.Sequential does), so there the
    # first FFN holds it.
    holder = moe.base_model if isinstance(moe, UmmPreTrainedMixin) else next(iter(merged.values()))
    setattr(holder, SHARE_NAME, share)
    freeze_for_merge(moe)
    if isinstance(moe, UmmPreTrainedMixin):
        model_config: Any = moe.config
        model_config.umm_phase = "merging"
        model_config.umm_merge = config.to_dict()
    return moe


def merge(moe: nn.Module, *, card_notes: str = "") -> nn.Module:
    """Folds the experts of a network in its merge phase into one dense network of the original architecture.

    Args:
        moe: a network after `prepare_merge` (and, normally, after alpha was trained), or one assigned by sequence
            in its mixture phase, whose merge has nothing to learn: uniform over its members, its shared experts with
            the weight that they had. It is left as it is.
        card_notes: Markdown about training data and metrics for the model card.

    Of a model that processes share (FSDP2, ZeRO-3) every process must call this, and gets the whole merged model; the
    experts are whole for one layer at a time. `write_merged` has nowhere more than that.

    Returns:
        For a Hugging Face model: a model of the original, stock class, in eval mode with every parameter trainable;
        `ummrm.save_pretrained(model, folder)` saves it atomically, with a model card (README.md) that says how it was
        made. For any other network: a copy with each `MergingFFN` replaced by a module of the class that
        `UpcycledFFN.from_dense` was given. Merged weights are bit for bit those that the merge phase's forward used.

    Raises:
        TypeError: `moe` is not in its merge phase.
        ValueError: a merged tensor is not finite; names the layer, the tensor and what is wrong in it. Or `moe` is
            sharded, and no Hugging Face model.
    """
    reshard(moe)
    parts, share = _merge_parts(moe)
    if not isinstance(moe, UmmPreTrainedMixin):
        if is_sharded(moe):
            raise ValueError(
                f"`moe` must hold whole weights, or be a Hugging Face model, got a sharded {type(moe).__name__}; put "
                "its state dict together and load that into a network that no engine has sharded."
            )
        merged = {name: part.to_dense() for name, part in parts.items()}
        for name, module in merged.items():
            _check_finite(name, parts[name], dict(module.named_parameters()))
        held = dict(moe.named_modules())
        other = copy.deepcopy(moe, {id(held[name]): module for name, module in merged.items()})
        return other.requires_grad_(True).eval()
    dense = _stock_model(moe)
    for _ in _fold(moe, parts, dense, share, in_place=False):
        pass
    transplant(moe, dense, clone=True)
    card.remember(dense, _card(moe, parts, share, card_notes))  # beside the model, which stays a stock object
    return dense.requires_grad_(True).eval()


def write_merged(
    moe: nn.Module,
    folder: str | os.PathLike | None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    card_notes: str = "",
) -> PreTrainedModel:
    """Merges straight into weight files, for a model whose merged weights would not fit into memory beside it.

    The files are, tensor by tensor, those that `merge` and then `ummrm.save_pretrained` write. Beside the memory that
    `moe` takes (none, for one that was just loaded from safetensors in its own dtype on a CPU), it needs room for one
    dense FFN a few times. Of a model that processes share (FSDP2, ZeRO-3) every process must call this; the first one
    writes, and each has one layer's experts at a time.

    Args:
        moe: as in `merge`; a Hugging Face model.
        folder: an empty one, written file by file: `ummrm.hf.saving.save_written` calls this for a folder in use. None
            in a process that does not write.
        dtype: that everything is rounded to, once, after merging; None keeps the dtypes of `moe`.
        max_shard_size: bytes, or a text such as `"5GB"`: a weight file holds no more, but for a single larger tensor.
        card_notes: as in `merge`.

    Returns:
        The merged model on the meta device: its class, its configuration, its shapes; and its card for `save_written`.

    Raises:
        TypeError: `moe` is no Hugging Face model in its merge phase.
        ValueError: as `merge`; what is in the folder is then incomplete.
        NotStreamable: transformers converts the tensors of such a model when it saves them.
        OSError: the files can't be written.
    """
    reshard(moe)
    parts, share = _merge_parts(moe)
    if not isinstance(moe, UmmPreTrainedMixin):
        raise TypeError(f"`moe` must be a Hugging Face model, got a {type(moe).__name__}; call ummrm.merge(moe).")
    dense = _stock_model(moe)
    writes = not is_sharded(moe) or dist.get_rank() == 0
    homes = {name: _homes(moe, name, part) for name, part in parts.items()}
    for name, part in parts.items():
        experts = part.experts.down_proj if isinstance(part, MergingFFN) else part.expert_weight
        for home in homes[name]:
            dense.get_submodule(home).to(experts.dtype)
    transplant(moe, dense, clone=False, complete=False)
    kept = emptied(dense, dtype)
    check_streamable(dense)  # in every process, before one of them waits for another
    shards = None
    if writes:
        assert folder is not None, "the process that writes has a folder"
        describe(dense, folder)
        shards = MappedShards(folder, dense, max_shard_size)
        shards.lend(dense)
    for name in _fold(moe, parts, dense, share, in_place=writes):
        for home in homes[name]:
            merged = dense.get_submodule(home)
            if shards is not None:
                shards.take({f"{home}.{key}": tensor for key, tensor in merged.named_parameters(recurse=False)})
            else:
                emptied(merged, None)
    for name, tensor in kept.items():
        value = tensor if tensor.is_meta else whole(tensor)
        if shards is not None:
            shards.take({name: value})
    if shards is not None:
        shards.check_complete()
    emptied(dense, None)
    card.remember(dense, _card(moe, parts, share, card_notes))
    return dense.requires_grad_(True).eval()


def save_merged(moe: nn.Module, save_directory: str | os.PathLike, *, card_notes: str = "") -> None:
    """Merges into a folder, atomically; the merged model's card comes along, a tokenizer does not.

    Every process calls it, and the first one writes: `merge` of a whole model, `write_merged` of one that is shared.

    Args:
        moe: as in `merge`; a Hugging Face model.
        save_directory: as in `ummrm.save_pretrained`.
        card_notes: as in `merge`.

    Raises:
        as `merge` and `ummrm.save_pretrained`.
    """
    first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    merged: Any = None
    if is_sharded(moe):
        try:
            if first:
                save_written(lambda folder: write_merged(moe, folder, card_notes=card_notes), save_directory)
            else:
                write_merged(moe, None, card_notes=card_notes)
            return
        except NotStreamable:  # in every process, before anything is written
            merged = merge(moe, card_notes=card_notes)
    if first:
        merged = merge(moe, card_notes=card_notes) if merged is None else merged
        save_pretrained(merged, save_directory)


def _stock_model(moe: UmmPreTrainedMixin) -> Any:
    """The stock model of a merge, on the meta device."""
    config: Any = stock_config(moe.config)
    # loading the mixture has written its own class and folder there
    config.architectures, config.name_or_path = [moe.stock_class.__name__], moe.config.umm_base_model or ""
    with torch.device("meta"), unpartitioned():
        return moe.stock_class(config)


def _fold(
    moe: UmmPreTrainedMixin,
    parts: Mapping[str, MergingFFN | MergingLinear],
    dense: PreTrainedModel,
    share: MergeShare,
    *,
    in_place: bool,
) -> Iterator[str]:
    """Gives a stock model the merged tensors, one part after the other; yields the name of each when it is done.

    In place where the model has parameters of its own: beside the merged tensors nothing is allocated, since a heap of
    many layers' leftovers was seen to grow to the size of the model.
    """
    layers = moe.family.layer_list(dense.base_model)
    homes: dict[str, Any] = {
        site: moe.family.dense_ffn(layers[index], dense.config) for index, site in ffn_sites(moe).items()
    }
    homes |= {name: Projection(dense.get_submodule(name)) for name, p in parts.items() if isinstance(p, MergingLinear)}
    for name, home in homes.items():
        with gathered(parts[name], share):  # one layer's experts at a time are whole, as in a forward
            tensors = parts[name].merged_tensors()
            _check_finite(name, parts[name], tensors)
        given = {"tensors": tensors} if isinstance(parts[name], MergingFFN) else tensors
        (home.fill if in_place else home.write)(**given)
        del tensors, given
        yield name


def _homes(moe: UmmPreTrainedMixin, name: str, part: MergingFFN | MergingLinear) -> list[str]:
    """Names of the stock modules that a part's merged tensors go to."""
    if isinstance(part, MergingLinear):
        return [name]
    layer = name.removesuffix(moe.family.site)
    return [f"{layer}{path}" for path in moe.family.paths.modules]


def _card(
    moe: UmmPreTrainedMixin, parts: Mapping[str, MergingFFN | MergingLinear], share: MergeShare, notes: str
) -> str:
    config = moe.config
    return card.merged_card(
        moe.stock_class.__name__,
        config.umm_base_model,
        config.umm,
        share.merge_config.to_dict(),
        _coefficients(parts, share),
        config.upcycle_config.num_shared_experts,
        notes,
    )


def merge_coefficients(moe: nn.Module) -> dict[str, torch.Tensor]:
    """The merge coefficients of each layer, detached.

    Args:
        moe: a network in its merge phase; one that processes share is asked in all of them.

    Returns:
        FFN name to [projections, S + E] (gate, up, down or up, down; shared experts first); rows sum to one.

    Raises:
        TypeError: `moe` is not in its merge phase.
    """
    parts = merging_parts(moe)
    if not parts:
        raise TypeError(f"`moe` must be in its merge phase (ummrm.prepare_merge), got a {type(moe).__name__}.")
    reshard(moe)
    return _coefficients(parts, next(iter(parts.values()))._share[0])


def _coefficients(parts: Mapping[str, MergingFFN | MergingLinear], share: MergeShare) -> dict[str, torch.Tensor]:
    with gathered(*parts.values(), share, names=LEARNED):
        return {name: part.coefficients().detach() for name, part in parts.items()}


def _merging(
    parts: Mapping[str, UpcycledFFN | UpcycledLinear], config: MergeConfig
) -> tuple[MergeShare, dict[str, MergingFFN | MergingLinear]]:
    """Modules of the merge phase that hold the experts of `parts`, which are left as they are, and their lambda."""
    share = MergeShare(config, next(next(iter(parts.values())).parameters()).device)
    merged: dict[str, MergingFFN | MergingLinear] = {}
    for name, part in parts.items():
        if isinstance(part, UpcycledFFN):
            merged[name] = MergingFFN.from_upcycled(part, config, share)
        else:
            merged[name] = MergingLinear(part, config, share)
    return share, merged


def _merge_parts(moe: nn.Module) -> tuple[dict[str, MergingFFN | MergingLinear], MergeShare]:
    """What is merged: the parts of the merge phase, or those that a mixture assigned by sequence would get."""
    parts = merging_parts(moe)
    if parts:
        return parts, next(iter(parts.values()))._share[0]
    mixture = mixture_parts(moe)
    upcycling = next((part.config for part in mixture.values()), None)
    if upcycling is None or not upcycling.by_sequence:
        raise TypeError(
            f"`moe` must be in its merge phase, got a {type(moe).__name__}"
            + ("; call ummrm.prepare_merge(moe, MergeConfig()) first." if mixture else " with no experts.")
        )
    _check_no_adapters(moe, mixture)
    share, merged = _merging(mixture, MergeConfig().resolved(upcycling))
    return merged, share


def _check_no_adapters(moe: nn.Module, parts: Mapping[str, UpcycledFFN | UpcycledLinear]) -> None:
    experts = [e for p in parts.values() if isinstance(p, UpcycledFFN) for e in (p.experts, p.shared_experts)]
    if hasattr(moe, "peft_config") or not all(e is None or isinstance(e, Experts) for e in experts):
        raise ValueError(
            f"`moe` must hold no adapters, got a {type(moe).__name__} whose experts are wrapped; fold them into the "
            "experts first: `moe = peft_model.merge_and_unload()`."
        )


def _check_finite(site: str, ffn: MergingFFN | MergingLinear, tensors: Mapping[str, torch.Tensor]) -> None:
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not wrong:
        return
    what = f"the merged tensor {wrong[0]!r} of {site} is not finite"
    if not ffn.coefficients().isfinite().all():
        raise ValueError(
            f"{what}: its merge weights are not, alpha is {ffn.alpha.detach().tolist()}. The training of alpha has "
            "diverged: train it again with a smaller learning rate, or from a checkpoint with finite values."
        )
    held = [(name, tensor) for name, tensor in ffn.named_parameters() if name != "alpha"]
    bad = [name for name, tensor in held if not tensor.isfinite().all()]
    raise ValueError(
        f"{what}: {', '.join(bad) or 'the weighted sum'} holds NaN or infinity. The training of the mixture has "
        "diverged: go back to a checkpoint with finite values."
    )


def _routed_shares(ffns: dict[str, UpcycledFFN], statistics: RoutingStatistics | None) -> dict[str, torch.Tensor]:
    remedy = "measure it first: `with record_routing_statistics(moe) as statistics: ...forwards...`."
    if statistics is None:
        raise ValueError(f'`statistics` must be given for alpha_init="routing", got None; {remedy}')
    shares, tokens = statistics.gate_shares, statistics.tokens
    for name, ffn in ffns.items():
        if name not in shares or shares[name].numel() != ffn.config.num_experts or tokens[name] == 0:
            raise ValueError(
                "`statistics` must have been recorded on this network with live tokens; it has none for "
                f"{name}; {remedy}"
            )
    return {name: shares[name] for name in ffns}
