"""What transformers' distributed engine (`DistributedConfig`) shards of a registered class, and what is refused.

Beside that how FSDP2, accelerate's too, cuts stacks of experts.

Plans alone: sharding, communication and loading are the engines'. FSDP2 gets each layer and the embeddings, expert
parallelism the routed experts (shared experts and routers stay whole on every rank), tensor parallelism what the stock
class has a plan for, without the dense FFN that is no longer there. docs/scaling.md says which is for whom.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn.experts import Experts
from ..nn.merging_linear import MergingLinear
from ..nn.upcycled_linear import UpcycledLinear
from .families import Family

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard

    from .modeling import UmmPreTrainedMixin

_STACKED = (Experts, UpcycledLinear, MergingLinear)
_LAYERS = "layers.*"  # the rule of transformers' own plans, whatever a family calls its layers


def fsdp_plan(row: Family, stock: dict[str, str] | None) -> dict[str, str]:
    """The stock plan with the family's own name of its layers."""
    return {name: style for name, style in (stock or {}).items() if name != _LAYERS} | {
        f"{row.layers}.*": "free_full_weight"
    }


def ep_plan(row: Family) -> dict[str, str]:
    """Whole routed experts on each rank, biases with them; rules that name nothing are dropped by `declare_plans`."""
    experts = f"{row.layers}.*.{row.site}.experts"
    up = "up_proj" if row.paths.gate is None else "gate_up_proj"
    held = (up, "down_proj", f"{up}_bias", "down_proj_bias")
    return {f"{experts}.{name}": "grouped_gemm" for name in held} | {experts: "ep_dispatch_experts"}


def tp_plan(row: Family, stock: dict[str, str] | None, linear_experts: bool) -> dict[str, str] | None:
    """The stock plan without the linear layers that have been exchanged."""
    if not stock:
        return stock
    if linear_experts:  # attention's are gone too, and a plan for embeddings alone would be none
        return {}
    dense = {f"{row.layers}.*.{path}" for path in row.paths.modules}
    return {name: style for name, style in stock.items() if name not in dense}


def declare_plans(model: UmmPreTrainedMixin) -> None:
    """Makes the plans of a model those of its modules as they are now, the embeddings by the name that they have.

    transformers makes them before the experts are there, and once more for a decoder that holds a backbone's layers.
    """
    if not hasattr(model, "init_parallel_plans"):  # before transformers 5.20
        return
    holder: Any = model
    holder.init_parallel_plans()
    if holder.base_model is model:
        embeddings = _name_of(model, _input_embeddings(model))
        if embeddings is not None and getattr(holder, "_fsdp_plan", None) is not None:
            holder._fsdp_plan.setdefault(embeddings, "free_full_weight")
    known = {_generic(name) for name, _ in chain(model.named_modules(), model.named_parameters())}
    for name in ("_tp_plan", "_ep_plan", "_fsdp_plan"):
        if plan := getattr(holder, name, None):
            setattr(holder, name, {rule: style for rule, style in plan.items() if rule in known})


def check_distributed(config: Any, settings: Any) -> None:
    """Refuses what the engine can't do for an upcycled model, before processes meet or a weight is read.

    Args:
        config: the model's.
        settings: the `DistributedConfig`, or a dict of one.

    Raises:
        ValueError: says which size can't be used, why, and which can.
    """
    if isinstance(settings, dict):
        from transformers.distributed import DistributedConfig  # not in every version

        settings = DistributedConfig.from_dict(settings)
    name, experts = f"model of type {config.model_type}", config.upcycle_config.num_experts
    ep, tp = settings.ep_size, settings.tp_size
    if settings.pp_size > 1:
        raise ValueError(
            f"`pp_size` must be 1 for an upcycled model, got {settings.pp_size}: the routers' losses of all layers "
            "belong to one forward. Use fsdp_size, ep_size and tp_size."
        )
    if ep > 1 and config.umm_phase != "mixture":
        raise ValueError(
            f"`ep_size` must be 1 for a {name} in its merge phase, got {ep}: all experts of a layer are folded on "
            f"every forward, which expert parallelism keeps apart. Use fsdp_size={settings.fsdp_size * tp} instead: "
            "it gathers one layer at a time."
        )
    if ep > 1 and experts % ep:
        sizes = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        raise ValueError(
            f"`ep_size` must divide the number of routed experts, num_experts={experts}, got {ep}; choose one of "
            f"{sizes}, or upcycle with a multiple: UpcycleConfig(num_experts={-(-experts // ep) * ep}, ...)."
        )
    if ep > 1 and settings.ep_implementation == "all_reduce" and ep != tp:
        raise ValueError(
            f'`ep_implementation="all_reduce"` needs ep_size == tp_size, got {ep} and {tp}; use "all_to_all" or "auto" '
            "where ranks have batches of their own."
        )
    if tp > 1 and settings.tp_plan in (None, "auto") and not config.base_model_tp_plan:
        why = f"transformers has no plan for {config.model_type.removeprefix('umm_')}"
        if config.upcycle_config.has_linear_experts:
            why = f"experts_in={config.upcycle_config.experts_in!r} makes attention's linear layers experts"
        raise ValueError(
            f"`tp_size` must be 1 for a {name}, got {tp}: {why}, so there is nothing to cut. Use fsdp_size={tp} (and "
            "ep_size for the experts), or give a tp_plan of your own."
        )


@contextlib.contextmanager
def balanced_shards() -> Iterator[None]:
    """Inside the `with` block transformers' engine and accelerate give every rank of FSDP2 an equal part of every stack
    of experts.

    FSDP2 cuts a parameter by its first dimension, and a stack of E experts has E: of 4 experts on 64 ranks 4 would hold
    a whole one of each layer and 60 nothing, of one shared expert the first rank all of it, and the buffers of every
    exchange are as large as if all held what the fullest does. Stacks that do not divide are cut by their rows instead.
    """
    if not torch.distributed.is_available():
        yield
        return
    from torch.distributed import fsdp  # where accelerate reads it from, each time

    holders: list[Any] = [fsdp]
    with contextlib.suppress(ImportError):  # not in every version
        from transformers.distributed import fsdp as engine

        holders.append(engine)
    shard = fsdp.fully_shard

    @functools.wraps(shard)
    def balanced(module: Any, *, mesh: Any = None, **kwargs: Any):
        ranks = torch.distributed.get_world_size() if mesh is None else mesh.size(-1)
        kwargs.setdefault(
            "shard_placement_fn", stack_placement(module if isinstance(module, list) else [module], ranks)
        )
        return shard(module, mesh=mesh, **kwargs)

    for holder in holders:
        holder.fully_shard = balanced
    try:
        yield
    finally:
        for holder in holders:
            holder.fully_shard = shard


def stack_placement(modules: Iterable[nn.Module], ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """FSDP2's `shard_placement_fn` for `ranks` ranks: stacks of experts in `modules` as `shard_of_stack` says."""
    parts = [part for one in modules for part in one.modules() if isinstance(part, _STACKED)]
    stacks = {id(parameter) for part in parts for parameter in part.parameters(recurse=False)}
    return lambda parameter: shard_of_stack(parameter, ranks) if id(parameter) in stacks else None


def shard_of_stack(stack: torch.Tensor, ranks: int) -> Shard | None:
    """By which dimension FSDP2 cuts a stack of experts [n, ...] for `ranks` ranks; None: by the first, as any other.

    By the first where each rank gets equally many experts, which costs no copy; else by the first other one that
    divides. alpha of a merge phase, [E] or a few times that, is left as it is.
    """
    from torch.distributed.tensor import DTensor, Shard

    local = stack.to_local() if isinstance(stack, DTensor) else stack  # expert parallelism has cut it already
    if local.shape[0] % ranks == 0:
        return None
    return next((Shard(dim) for dim in range(1, stack.dim()) if stack.shape[dim] % ranks == 0), None)


def _generic(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _input_embeddings(model: Any) -> nn.Module | None:
    """None for a model without any, of which transformers' own function says so by one of two errors."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, held in model.named_modules() if held is module), None)
