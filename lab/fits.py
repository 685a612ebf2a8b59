"""Over-optimisation curves: the forms of Gao et al., reward at a fixed divergence, the drop from the peak.

Gao, Schulman and Hilton 2022 (arXiv 2210.10760) write gold reward as a function of d = sqrt(KL), counted from the
reference's reward: d (a - b d) for best-of-n, d (a - b log d) for RL. Both are linear in a and b, so that least squares
has one answer. Whether the form fits is for r2 to say: a curve may well have another shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Fit:
    """A fitted curve.

    Attributes:
        a: slope of the gain.
        b: weight of over-optimisation.
        r2: share of the rewards' variance about their mean that the curve explains; below 0 a constant does better.
    """

    a: float
    b: float
    r2: float

    def __iter__(self):
        return iter((self.a, self.b, self.r2))


class Measured(Protocol):
    """What `gold_at_kl` reads of a record; `PPORecord` is one."""

    kl: float
    gold: float


def fit_best_of_n(sqrt_kl: Sequence[float], reward: Sequence[float]) -> Fit:
    """Fits reward = d (a - b d).

    Args:
        sqrt_kl: d, at least 0, two or more different values above 0.
        reward: gain over the reference's reward, which the form takes for 0 at d = 0.

    Raises:
        ValueError: lengths differ, a number is not finite, d is negative, or there are too few points.
    """
    return _fit(sqrt_kl, reward, lambda d: d * d)


def fit_rl(sqrt_kl: Sequence[float], reward: Sequence[float]) -> Fit:
    """Fits reward = d (a - b log d), natural logarithm, 0 at d = 0; arguments and errors as `fit_best_of_n`."""
    return _fit(sqrt_kl, reward, lambda d: d * np.log(np.where(d > 0, d, 1.0)))


def _fit(sqrt_kl: Sequence[float], reward: Sequence[float], penalty: Callable[[np.ndarray], np.ndarray]) -> Fit:
    d, y = np.asarray(sqrt_kl, dtype=np.float64), np.asarray(reward, dtype=np.float64)
    if d.ndim != 1 or d.shape != y.shape:
        raise ValueError(
            f"`sqrt_kl` and `reward` must be two lists of one length, got {list(d.shape)} and {list(y.shape)}."
        )
    if not (np.isfinite(d).all() and np.isfinite(y).all()):
        raise ValueError("`sqrt_kl` and `reward` must be finite; drop the points that were not measured.")
    if (d < 0).any():
        raise ValueError(f"`sqrt_kl` must be at least 0, got {d.min()}.")
    if len(np.unique(d[d > 0])) < 2:
        raise ValueError("`sqrt_kl` must hold two different values above 0: there are two coefficients to find.")
    (a, b), *_ = np.linalg.lstsq(np.stack([d, -penalty(d)], axis=1), y, rcond=None)
    total = ((y - y.mean()) ** 2).sum()
    residual = ((y - d * a + penalty(d) * b) ** 2).sum()
    return Fit(float(a), float(b), float(1 - residual / total) if total > 0 else math.nan)


def gold_at_kl(records: Sequence[Measured], kl: float, window: int = 1) -> float:
    """Gold reward when the policy first was `kl` nats away: `value_at_kl` of records in order of their steps."""
    return value_at_kl([r.kl for r in records], [r.gold for r in records], kl, window)


def value_at_kl(kls: Sequence[float], values: Sequence[float], kl: float, window: int = 1) -> float:
    """A value at a given divergence, interpolated linearly in sqrt(KL) where the path first crosses it.

    Args:
        kls: divergences along a path, in its order; they may fall again.
        values: measured at the same points.
        kl: where to read the path, at least 0.
        window: points that are averaged, values and sqrt(KL) alike, before the path is read: noise of single batches
            would otherwise choose the crossing.

    Returns:
        The value; NaN where the path starts beyond `kl` or never gets there: a missing value, for the reader to count.

    Raises:
        ValueError: lengths differ, `kl` is negative, or the window does not fit.
    """
    if kl < 0:
        raise ValueError(f"`kl` must be at least 0, got {kl}.")
    if len(kls) != len(values):
        raise ValueError(f"`kls` and `values` must be of one length, got {len(kls)} and {len(values)}.")
    target = math.sqrt(kl)
    distances = smoothed([math.sqrt(max(k, 0.0)) for k in kls], window)
    levels = smoothed(values, window)
    if distances[0] == target:
        return levels[0]
    for i in range(1, len(distances)):
        before, after = distances[i - 1], distances[i]
        if before < target <= after:
            share = (target - before) / (after - before)
            return levels[i - 1] + share * (levels[i] - levels[i - 1])
    return math.nan


def drop_from_peak(values: Sequence[float], window: int = 1) -> float:
    """How far a path's end lies below its highest point, at least 0.

    Args:
        values: in the path's order.
        window: points that are averaged first. The highest of many noisy points is too high by chance, and the drop
            with it; compare paths of equal length and window.

    Raises:
        ValueError: the window does not fit.
    """
    levels = smoothed(values, window)
    return max(levels) - levels[-1]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over every `window` neighbours: len(values) - window + 1 of them.

    Raises:
        ValueError: `window` is below 1 or beyond the number of values.
    """
    if not 1 <= window <= len(values):
        raise ValueError(f"`window` must be 1 to the number of points, {len(values)}, got {window}.")
    return np.convolve(np.asarray(values, dtype=np.float64), np.full(window, 1 / window), mode="valid").tolist()
