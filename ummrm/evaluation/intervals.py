"""Shares, means and differences with 95% intervals, and the tests that compare two models on the same data.

Everything here takes numbers and knows no model. A difference of rewards that is 0 counts half wherever shares of
pairs are counted. scipy gives the distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 2000
_AT_ONCE = 4 << 20  # numbers of a part of the resamples


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Attributes:
        value: NaN where nothing was counted.
        low: lower end; NaN where the data tell of none.
        high: upper end.
        count: how many observations it stands on.
    """

    value: float
    low: float
    high: float
    count: int

    def scaled(self, factor: float) -> Estimate:
        """In other units; `factor` is positive."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.count)


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)
"""The estimate of no data."""


def wilson(successes: float, count: int) -> Estimate:
    """A share with Wilson's score interval (Wilson 1927), which stays inside [0, 1] and has a width at 0 and 1.

    Args:
        successes: 0 to `count`; halves where ties count half.
        count: independent observations; 0 gives `NOTHING`.

    Raises:
        ValueError: `successes` is outside.
    """
    if not 0 <= successes <= count:
        raise ValueError(f"`successes` must be from 0 to `count`, {count}, got {successes!r}; count each of them once.")
    if count == 0:
        return NOTHING
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    share = successes / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)), count)


def share_of(outcomes: Sequence[float] | np.ndarray, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of outcomes in [0, 1] with an interval.

    Wilson's, or, where a group has several outcomes, the wider of Wilson's and a bootstrap over groups: outcomes of one
    prompt are not independent, and an interval that takes them for it is too narrow.

    Args:
        outcomes: [N], 1 right, 0 wrong, 0.5 undecided.
        groups: what each belongs to, such as its prompt; None: each stands for itself.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    plain = wilson(float(values.sum()), len(values))
    if groups is None or len(set(groups)) == len(groups) or not len(values):
        return plain
    _, low, high = bootstrap(lambda weights: weights @ values / weights.sum(1), groups)
    return Estimate(plain.value, min(plain.low, low), max(plain.high, high), len(values))


def mean_of(values: Sequence[float] | np.ndarray, groups: Sequence[Hashable] | None = None) -> Estimate:
    """A mean with Student's t interval over groups.

    Args:
        values: [N]; none gives `NOTHING`.
        groups: what each belongs to; the mean is over the groups' means. None: each stands for itself.

    Returns:
        The interval's ends are NaN for a single group; `count` is that of groups.
    """
    x = np.asarray(values, dtype=np.float64)
    if groups is not None and len(x):
        order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        index = np.array([order[group] for group in groups])
        x = np.bincount(index, x) / np.bincount(index)
    if not len(x):
        return NOTHING
    mean = float(x.mean())
    if len(x) == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Estimate(mean, mean - half, mean + half, len(x))


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], groups: Sequence[Hashable], seed: int = 0
) -> tuple[float, float, float]:
    """A statistic with its percentile interval over resampled groups.

    Args:
        statistic: takes weights [R, N] of the observations, gives [R]; a row of ones is the data as they are.
        groups: [N], what each observation belongs to; groups are drawn with replacement, whole.
        seed: of the 2,000 draws.

    Returns:
        (value, low, high); the ends are NaN for a single group. Draws where the statistic is NaN are left out.
    """
    value = float(statistic(np.ones((1, len(groups))))[0])
    order = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    if len(order) < 2:
        return value, math.nan, math.nan
    index = np.array([order[group] for group in groups])
    generator = np.random.default_rng(seed)
    rows = max(1, min(_RESAMPLES, _AT_ONCE // len(groups)))
    found = []
    for start in range(0, _RESAMPLES, rows):
        draws = min(rows, _RESAMPLES - start)
        counts = generator.multinomial(len(order), np.full(len(order), 1 / len(order)), draws)
        found.append(statistic(counts[:, index].astype(np.float64)))
    drawn = np.concatenate(found)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return value, math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return value, float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Two models' outcomes on the same observations.

    Attributes:
        difference: mean of the first's outcomes less the second's, in shares.
        first_better: observations that the first does better on.
        second_better: and the second.
        p: two-sided exact sign test over these; McNemar's exact test where no outcome is a half.
    """

    difference: Estimate
    first_better: int
    second_better: int
    p: float


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compares outcomes [N] in [0, 1] of two models on the same N observations.

    The interval is Agresti and Min's (2005): Wald's with half an observation added to each cell, so that it has a width
    where the models never differ.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"`first` and `second` must be [N] of one N, got {list(first.shape)} and {list(second.shape)}; give the "
            "outcomes of both models on the same pairs."
        )
    differences = first.astype(np.float64) - second
    count = len(differences)
    if not count:
        return Paired(NOTHING, 0, 0, math.nan)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    total, squares = float(differences.sum()), float(np.square(differences).sum())
    shrunk = total / (count + 2)
    error = math.sqrt(squares + 1 - total * total / (count + 2)) / (count + 2)
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    estimate = Estimate(total / count, max(-1.0, shrunk - half), min(1.0, shrunk + half), count)
    return Paired(estimate, better, worse, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted
