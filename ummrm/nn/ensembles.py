"""How several members' scores become one (mean, worst case, mean less disagreement), and it a target on a scale.

The only place of these formulas (Coste et al. 2023, arXiv 2310.02743, eqs. 3 to 5): a reward function, a distillation's
teacher and the laboratory's ensembles all combine by them. Knows scores alone, neither models nor texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RULES = ("mean", "worst", "uwo")
UNCERTAINTY = 0.5  # the source's weight for best-of-n


def check_rule(combine: object, uncertainty: Any) -> None:
    """Raises ValueError unless both are what `combine_scores` takes."""
    if combine not in RULES:
        raise ValueError(f"`combine` must be one of {', '.join(map(repr, RULES))}, got {combine!r}.")
    number = isinstance(uncertainty, (int, float)) and not isinstance(uncertainty, bool)
    if not number or not 0 <= uncertainty < math.inf:
        raise ValueError(f"`uncertainty` must be a finite number of at least 0, got {uncertainty!r}.")


def combine_scores(
    scores: Tensor,
    combine: str = "mean",
    *,
    uncertainty: float = UNCERTAINTY,
    scales: Sequence[tuple[float, float]] | None = None,
) -> Tensor:
    """An ensemble's scores, each member normalised first (Coste et al. 2023, arXiv 2310.02743).

    Args:
        scores: [N, E], one column a member, any floating dtype.
        combine: `"mean"` (eq. 3), `"worst"` (the smallest, eq. 4) or `"uwo"` (uncertainty-weighted: the mean minus
            `uncertainty` times the variance over the members, eq. 5).
        uncertainty: of `"uwo"`, at least 0; the other rules leave it unread.
        scales: mean and standard deviation of each member's scores over reference texts; None takes the scores as
            normalised already.

    Returns:
        [N] in the dtype of `scores`.

    Raises:
        ValueError: an unknown rule, a negative weight, no members, or not one scale for each.
    """
    check_rule(combine, uncertainty)
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"`scores` must be [texts, members] with at least one member, got {list(scores.shape)}.")
    if scales is not None:
        if len(scales) != scores.shape[1]:
            raise ValueError(
                f"`scales` must hold one (mean, std) for each of the {scores.shape[1]} members, got {len(scales)}."
            )
        means, stds = torch.tensor(scales, dtype=torch.float64, device=scores.device).to(scores.dtype).unbind(1)
        scores = (scores - means) / stds
    if combine == "worst":
        return scores.min(1).values
    mean = scores.mean(1)
    return mean - uncertainty * scores.var(1, correction=0) if combine == "uwo" else mean


@dataclass(frozen=True)
class TargetScale:
    """How a teacher's scores become targets: what the training texts fix, for every other set too.

    Attributes:
        members: mean and standard deviation of each member's scores.
        mean: of the combined scores.
        std: of the combined scores; targets are standard: mean 0, std 1 over the training texts.
    """

    members: tuple[tuple[float, float], ...]
    mean: float
    std: float

    @classmethod
    def measured(cls, scores: Tensor, combine: str, uncertainty: float, names: Sequence[str]) -> TargetScale:
        """From the training texts' scores [N, members]; sums are exact, so that no order of texts changes a bit.

        Raises:
            ValueError: fewer than two texts, or a member (one of `names`) that scores all of them the same.
        """
        if len(scores) < 2:
            raise ValueError(f"`train_dataset` must hold at least two texts to learn scores from, got {len(scores)}.")
        members = tuple(_mean_and_std(column.tolist()) for column in scores.unbind(1))
        flat = [name for name, (mean, std) in zip(names, members, strict=True) if _is_flat(mean, std)]
        if flat:
            raise ValueError(
                f"`teacher` must score the training texts differently, and {flat[0]} gives all {len(scores)} the same "
                "score: there is nothing to learn from it; leave it out, or give other texts."
            )
        combined = combine_scores(scores, combine, uncertainty=uncertainty, scales=members)
        mean, std = _mean_and_std(combined.tolist())
        if _is_flat(mean, std):
            raise ValueError(
                f"`teacher` must score the training texts differently, and its members combined by {combine!r} give "
                f"all {len(scores)} the same score; choose another rule or other texts."
            )
        return cls(members, mean, std)

    def targets(self, scores: Tensor, combine: str, uncertainty: float) -> Tensor:
        """Standard targets fp64 [N] of scores [N, members]."""
        combined = combine_scores(scores, combine, uncertainty=uncertainty, scales=self.members)
        return (combined - self.mean) / self.std


def _mean_and_std(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _is_flat(mean: float, std: float) -> bool:
    """A spread of no more than what rounding in fp32 leaves of equal scores."""
    return std <= 1e-6 * abs(mean)
