"""What has become of a mixture's experts: how far apart they are, how routers use them, how they merge.

Looks without changing anything. Drawing and printing is the command line's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.merging_ffn import MergingFFN
from ..nn.merging_linear import MergingLinear, merging_parts
from ..nn.routing_statistics import record_routing_statistics
from ..nn.upcycled_ffn import UpcycledFFN
from ..nn.upcycled_linear import UpcycledLinear, mixture_parts
from .ensembles import score_texts


@dataclass(frozen=True)
class ExpertReport:
    """The routed experts of one FFN or linear layer.

    Attributes:
        name: the module's.
        distances: fp64 [E, E], between two experts' weights and biases together, in norms of the experts' mean.
        coefficients: of a model in its merge phase, fp64 [projections, S + E], shared experts first.
        slot_share: [E], each expert's share of the slots over given texts; by token alone.
        shared_weight: mean gate weight of the shared experts over these.
    """

    name: str
    distances: Tensor
    coefficients: Tensor | None = None
    slot_share: Tensor | None = None
    shared_weight: float | None = None

    @property
    def spread(self) -> float:
        """Root mean square distance of two different experts; 0 as upcycled."""
        experts = len(self.distances)
        return (self.distances.square().sum() / max(experts * (experts - 1), 1)).sqrt().item()

    @property
    def closest(self) -> tuple[int, int] | None:
        """The two experts that are nearest to each other; None of a single one."""
        experts = len(self.distances)
        if experts < 2:
            return None
        far = self.distances.clone()
        far[torch.eye(experts, dtype=torch.bool)] = float("inf")
        place = int(far.argmin())
        return place // experts, place % experts


@dataclass(frozen=True)
class MixtureReport:
    """A mixture.

    Attributes:
        experts: its modules with experts, in order.
        agreement: by sequence, over given texts: fp64 [E, E], correlations of the members' scores.
        shared_share: lambda of a model in its merge phase.
    """

    experts: tuple[ExpertReport, ...]
    agreement: Tensor | None = None
    shared_share: float | None = None


@torch.no_grad()
def inspect_mixture(model: Any, ids: Sequence[Sequence[int]] | None = None, *, batch_size: int = 16) -> MixtureReport:
    """Looks at a mixture, in either phase.

    Args:
        model: an upcycled model.
        ids: tokens of texts, for what only texts show: the load of experts by token, the agreement of members by
            sequence (of at least two texts; reward models). A model in its merge phase has neither.
        batch_size: texts a forward.

    Raises:
        TypeError: the model has no experts.
    """
    parts: dict[str, Any] = {**mixture_parts(model), **merging_parts(model)}
    if not parts:
        raise TypeError(f"`model` must have experts, got a dense {type(model).__name__}; upcycle it first.")
    merging = isinstance(next(iter(parts.values())), (MergingFFN, MergingLinear))
    shares: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    agreement = None
    if ids is not None and not merging:
        by_sequence = next(iter(parts.values())).config.by_sequence
        if by_sequence:
            scores = score_texts(model, ids, batch_size)
            agreement = torch.corrcoef(scores.t()) if len(ids) > 1 else None
        else:
            with record_routing_statistics(model) as statistics:
                score_texts(model, ids, batch_size)
            shares, weights = statistics.fractions, statistics.shared_weight
    reports = tuple(
        ExpertReport(
            name,
            expert_distances(part),
            part.coefficients().double().cpu() if merging else None,
            shares.get(name),
            weights.get(name),
        )
        for name, part in parts.items()
    )
    share = None
    if merging:
        shared = next((r.coefficients[0] for r in reports if r.coefficients is not None), None)
        experts = len(reports[0].distances)
        share = shared[: len(shared) - experts].sum().item() if shared is not None else None
    return MixtureReport(reports, agreement, share)


def expert_distances(part: nn.Module) -> Tensor:
    """As `ExpertReport.distances`, of an `UpcycledFFN`, an `UpcycledLinear`, or one of these in its merge phase."""
    if isinstance(part, (UpcycledFFN, MergingFFN)):
        tensors = list(part.experts.tensors().values())
    elif isinstance(part, (UpcycledLinear, MergingLinear)):
        tensors = [t for t in (part.expert_weight, part.expert_bias) if t is not None]
    else:
        raise TypeError(f"`part` must hold experts, got a {type(part).__name__}.")
    experts = len(tensors[0])
    squares, norm = torch.zeros(experts, experts, dtype=torch.float64), 0.0
    for tensor in tensors:
        mean = sum(one.double() for one in tensor) / experts
        norm += mean.square().sum().item()
        for a in range(experts):
            for b in range(a):
                squares[a, b] += (tensor[a].double() - tensor[b].double()).square().sum().item()
    return (squares + squares.t()).sqrt() / max(norm, 1e-300) ** 0.5
