"""Several models on the same pairs: how often they order the answers alike, and whether one is better."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .accuracy import outcomes_of
from .intervals import Estimate, Paired, holm, paired, share_of

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """Two models on the same pairs.

    Attributes:
        first: a model.
        second: another one.
        agreement: share of the pairs whose answers both put in the same order; half where one of them has a tie.
        both_right: pairs that both order rightly.
        both_wrong: pairs that both order wrongly.
        paired: difference in accuracy, first less second, and its test.
        adjusted_p: Holm's, over all pairs of models.
    """

    first: str
    second: str
    agreement: Estimate
    both_right: int
    both_wrong: int
    paired: Paired
    adjusted_p: float

    @property
    def better(self) -> str | None:
        """The better model where the adjusted p value is below 0.05; None says that no difference is shown."""
        if not self.adjusted_p < LEVEL:
            return None
        return self.first if self.paired.first_better > self.paired.second_better else self.second


def compare_models(differences: Mapping[str, np.ndarray], keys: Sequence[str]) -> list[Comparison]:
    """Every two models.

    Args:
        differences: by model, fp64 [N], chosen less rejected, on the same N pairs.
        keys: [N], the same for pairs of one prompt.
    """
    found = []
    for first, second in itertools.combinations(differences, 2):
        one, other = np.sign(differences[first]), np.sign(differences[second])
        alike = np.where((one == 0) != (other == 0), 0.5, one == other)
        found.append(
            (
                first,
                second,
                share_of(alike, keys),
                int(((one > 0) & (other > 0)).sum()),
                int(((one < 0) & (other < 0)).sum()),
                paired(outcomes_of(differences[first]), outcomes_of(differences[second])),
            )
        )
    adjusted = holm([row[-1].p for row in found])
    return [Comparison(*row, p) for row, p in zip(found, adjusted, strict=True)]
