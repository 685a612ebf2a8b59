"""How often the chosen answer gets the higher reward: over all pairs and by subset, with intervals.

A tie counts half, as it would under a coin; how many there are is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import Estimate, share_of
from .reading import LabelledPair


@dataclass(frozen=True)
class Accuracy:
    """Of one model on one set of pairs.

    Attributes:
        share: accuracy, with its interval; `count` pairs.
        ties: pairs whose rewards are equal.
        prompts: different prompts among the pairs.
    """

    share: Estimate
    ties: int
    prompts: int


def outcomes_of(differences: np.ndarray) -> np.ndarray:
    """1, 0 or, for a tie, 0.5 of differences of reward [N], chosen less rejected."""
    return (np.sign(differences) + 1) / 2


def accuracy(pairs: Sequence[LabelledPair], differences: np.ndarray) -> Accuracy:
    """Accuracy on pairs.

    Args:
        pairs: N.
        differences: fp64 [N], reward of the chosen answer less that of the rejected one, finite.
    """
    keys = [pair.key for pair in pairs]
    return Accuracy(share_of(outcomes_of(differences), keys), int((differences == 0).sum()), len(set(keys)))


def accuracy_by_subset(pairs: Sequence[LabelledPair], differences: np.ndarray) -> dict[str, Accuracy]:
    """Accuracy by subset, in the order in which subsets first occur."""
    names = np.array([pair.subset for pair in pairs], dtype=object)
    found = {}
    for name in dict.fromkeys(names.tolist()):
        index = np.flatnonzero(names == name)
        found[name] = accuracy([pairs[i] for i in index.tolist()], differences[index])
    return found
