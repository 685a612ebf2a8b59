"""Do experts specialise? Mutual information of gate and instruction regime, and what ablating an expert costs where.

The paper says that the shared expert is instruction-agnostic and that routed ones follow instruction regimes. Looks at
a mixture without changing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ummrm import record_routing_statistics
from ummrm.nn.upcycled_ffn import upcycled_ffns
from ummrm.ops import RouteOutput

from .demo.measure import rewards_of
from .tasks import PreferencePairs, Sequences, Task, concatenate

SHARED = -1
"""In place of an expert's index: the shared experts."""
_PERMUTATIONS = 20


def measure_specialisation(moe: nn.Module, task: Task, pairs: int, batch_size: int, seed: int) -> list[dict]:
    """Every measure of one mixture at one moment.

    Args:
        moe: a network with `UpcycledFFN` modules, in eval mode.
        task: gives held-out pairs and the regime of each.
        pairs: how many pairs to look at.
        batch_size: sequences a forward.
        seed: of the permutations behind `mutual_information_null`.

    Returns:
        Rows of layer, measure, expert, regime (empty where a measure has none) and value. Measures: `slot_share` and
        `shared_weight` (over all regimes); `mutual_information`, in bits, of regime and a token's first expert, and
        `mutual_information_null`, what it is when regimes are dealt out to sequences at random; `ablation_cost`, by
        which the preference loss on a regime's pairs rises without an expert, in all layers at once.
    """
    held_out = task.test.select(slice(0, pairs))
    regimes = task.regime_of(held_out.chosen)
    sequences = concatenate([held_out.chosen, held_out.rejected])
    layers = {name: f"layer {i}" for i, name in enumerate(upcycled_ffns(moe))}
    rows = []

    def add(layer: str, measure: str, value: float, expert: int | str = "", regime: str = "") -> None:
        rows.append({"layer": layer, "measure": measure, "expert": expert, "regime": regime, "value": value})

    with record_routing_statistics(moe) as statistics:
        first = first_expert_counts(moe, sequences, batch_size)
    for name, layer in layers.items():
        for expert, share in enumerate(statistics.fractions[name].tolist()):
            add(layer, "slot_share", share, expert)
        add(layer, "shared_weight", statistics.shared_weight[name], SHARED)
        both = torch.cat([regimes, regimes])
        add(layer, "mutual_information", mutual_information(first[name], both, len(task.regimes)))
        add(layer, "mutual_information_null", _chance(first[name], both, len(task.regimes), seed))
    costs = ablation_costs(moe, held_out, regimes, len(task.regimes), batch_size)
    for expert, by_regime in costs.items():
        for regime, cost in zip(task.regimes, by_regime, strict=True):
            add("all", "ablation_cost", cost, expert, regime)
    return rows


@torch.no_grad()
def expert_distances(moe: nn.Module, start: nn.Module) -> list[dict]:
    """How far routed experts have gone, together and apart.

    Args:
        moe: a network with `UpcycledFFN` modules.
        start: the same network as it was upcycled, without expert noise.

    Returns:
        Rows as of `measure_specialisation`, of each layer: `expert_travel`, the distance of the routed experts' mean
        from where they started, and `expert_spread`, their root mean squared distance from that mean; over all weights
        and biases, relative to the norm of those at the start.
    """
    rows = []
    before = upcycled_ffns(start)
    for i, (name, ffn) in enumerate(upcycled_ffns(moe).items()):
        now, then = (_flat(layer.experts.tensors()) for layer in (ffn, before[name]))
        mean, norm = now.mean(0), then[0].norm()
        found = {"expert_travel": (mean - then[0]).norm(), "expert_spread": (now - mean).square().sum(1).mean().sqrt()}
        for measure, value in found.items():
            relative = (value / norm).item()
            rows.append({"layer": f"layer {i}", "measure": measure, "expert": "", "regime": "", "value": relative})
    return rows


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All parameters of each expert, fp64 [E, parameters]."""
    return torch.cat([tensor.double().flatten(1) for tensor in tensors.values()], dim=1)


@torch.no_grad()
def first_expert_counts(moe: nn.Module, sequences: Sequences, batch_size: int) -> dict[str, torch.Tensor]:
    """How many live tokens of each sequence have each routed expert as their most probable: FFN name to fp64 [N, E]."""
    ffns = upcycled_ffns(moe)
    counts: dict[str, list[torch.Tensor]] = {name: [] for name in ffns}
    width = 0

    def keep(name: str, experts: int) -> Callable:
        def hook(router: nn.Module, args: tuple, output: RouteOutput) -> None:
            top = output.expert_indices[:, 0].view(-1, width).long()
            one_hot = F.one_hot(top.clamp_min(0), experts) * (top >= 0)[..., None]
            counts[name].append(one_hot.sum(1).double().cpu())

        return hook

    handles = [f.router.register_forward_hook(keep(name, f.config.num_experts)) for name, f in ffns.items()]
    device = next(moe.parameters()).device
    try:
        for index in torch.arange(len(sequences)).split(batch_size):
            inputs = sequences.select(index).inputs(device)
            width = inputs["input_ids"].shape[1]
            moe(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in counts.items()}


def mutual_information(counts: torch.Tensor, regimes: torch.Tensor, num_regimes: int) -> float:
    """Mutual information in bits of expert and regime over tokens, by the plug-in estimate.

    Args:
        counts: [N, E], tokens of each sequence by expert.
        regimes: int64 [N], each sequence's regime.
        num_regimes: how many there are.
    """
    joint = torch.zeros(num_regimes, counts.shape[1], dtype=torch.float64).index_add_(0, regimes, counts.double())
    joint = joint / joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    live = joint > 0
    return (joint[live] * (joint[live] / independent[live]).log2()).sum().item()


def _chance(counts: torch.Tensor, regimes: torch.Tensor, num_regimes: int, seed: int) -> float:
    """Mean mutual information over random permutations of the regimes: the estimate's bias without any dependence."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(_PERMUTATIONS):
        order = torch.randperm(len(regimes), generator=generator)
        total += mutual_information(counts, regimes[order], num_regimes)
    return total / _PERMUTATIONS


def ablation_costs(
    moe: nn.Module, pairs: PreferencePairs, regimes: torch.Tensor, num_regimes: int, batch_size: int
) -> dict[int, list[float]]:
    """By how much the preference loss rises, in nats a pair, when an expert is left out of every layer.

    Args:
        moe: in eval mode.
        pairs: held-out pairs.
        regimes: int64 [N], each pair's regime.
        num_regimes: how many there are.
        batch_size: sequences a forward.

    Returns:
        Expert (`SHARED`: all shared ones) to the rise in each regime; NaN for a regime without pairs.
    """

    def losses() -> torch.Tensor:
        margin = rewards_of(moe, pairs.chosen, batch_size) - rewards_of(moe, pairs.rejected, batch_size)
        each = F.softplus(-margin)
        return torch.stack([each[regimes == r].mean() for r in range(num_regimes)])

    intact = losses()
    experts = max(ffn.config.num_experts for ffn in upcycled_ffns(moe).values())
    costs = {}
    for expert in (SHARED, *range(experts)):
        with ablated(moe, expert):
            costs[expert] = (losses() - intact).tolist()
    return costs


@contextmanager
def ablated(moe: nn.Module, expert: int) -> Iterator[None]:
    """Leaves an expert out of every layer inside the `with` block; the gate weights still sum to one.

    A routed expert's weight goes to the shared experts; the shared experts' (`SHARED`) to the token's routed ones, in
    proportion. Padding stays with the shared experts.
    """

    def hook(router: nn.Module, args: tuple, output: RouteOutput) -> RouteOutput:
        if expert == SHARED:
            total = output.routed_weights.sum(-1, keepdim=True)
            live = total > 0
            routed = torch.where(live, output.routed_weights / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
            return output._replace(
                shared_weight=torch.where(live.squeeze(-1), 0.0, output.shared_weight), routed_weights=routed
            )
        lost = torch.where(output.expert_indices == expert, output.routed_weights, 0.0)
        return output._replace(
            shared_weight=output.shared_weight + lost.sum(-1), routed_weights=output.routed_weights - lost
        )

    handles = [ffn.router.register_forward_hook(hook) for ffn in upcycled_ffns(moe).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
