"""How several members' scores become one: the mean, the worst case, or the mean less the members' disagreement.

The only place of these formulas (Coste et al. 2023, arXiv 2310.02743, eqs. 3 to 5): a reward function, a distillation's
teacher and the laboratory's ensembles all combine by them. Knows scores alone, neither models nor texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
