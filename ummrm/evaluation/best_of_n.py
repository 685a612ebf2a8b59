"""What a gold scorer gives the answer that a model likes best among n: the curve on which reward hacking shows.

The estimator is unbiased: a mean over all n-subsets of each prompt's answers, in closed form, so that nothing is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .intervals import Estimate, mean_of


@dataclass(frozen=True)
class Curve:
    """Best-of-n of one model, a list element for each n.

    Attributes:
        n: how many answers there are to choose from.
        kl: KL divergence from the policy that wrote the answers, log n - (n - 1)/n nats: exact where no two answers
            tie, else an upper bound (Beirami et al. 2024, arXiv 2401.01879).
        gold: gold reward of the chosen answer, less that of a random one, in standard deviations of the gold rewards.
        proxy: the model's own reward of it, likewise in its own standard deviations.
        peak: the n of the highest gold reward.
        fall: gold reward at the peak less that at the last n, in standard deviations.
    """

    n: list[int]
    kl: list[float]
    gold: list[Estimate]
    proxy: list[Estimate]
    peak: int
    fall: float


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n nats.

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return math.log(n) - (n - 1) / n


def expected_best(proxy: np.ndarray, values: np.ndarray, n: int) -> float:
    """Mean over all n-subsets of the value of the one that `proxy` likes best; ties are broken by a fair draw.

    The answer of rank i from below is the best of C(i - 1, n - 1) of the C(N, n) subsets (Nakano et al. 2021, arXiv
    2112.09332, appendix I).

    Args:
        proxy: fp64 [N], by which the best is chosen.
        values: fp64 [N].
        n: 1 to N.

    Raises:
        ValueError: `n` is outside, the shapes differ, or a proxy reward is NaN.
    """
    total = len(proxy)
    if proxy.shape != values.shape or proxy.ndim != 1 or np.isnan(proxy).any():
        raise ValueError(
            f"`proxy` and `values` must be [N] without NaN, got {list(proxy.shape)} and {list(values.shape)}; give one "
            "reward of each for every answer."
        )
    if not 1 <= n <= total:
        raise ValueError(f"`n` must be from 1 to the number of answers, {total}, got {n}.")
    subsets = math.comb(total, n)
    weights = np.array([math.comb(rank, n - 1) / subsets for rank in range(total)])
    order = np.argsort(proxy, kind="stable")
    level = np.unique(proxy[order], return_inverse=True)[1]
    shared = np.bincount(level, weights) / np.bincount(level)
    return float(shared[level] @ values[order])


def best_of_n(proxy: Sequence[np.ndarray], gold: Sequence[np.ndarray]) -> Curve:
    """The curve of one model.

    Args:
        proxy: fp64 of each prompt's answers: the model's rewards.
        gold: the gold rewards of the same answers. n goes over the powers of two, and as far as the prompt with the
            fewest answers lets it, so that every point is a mean over the same prompts.

    Raises:
        ValueError: no prompt, prompts of different numbers of answers on both sides, or rewards that are not finite.
    """
    if not proxy or [len(one) for one in proxy] != [len(one) for one in gold]:
        raise ValueError("`proxy` and `gold` must hold the same answers of at least one prompt; score the same file.")
    if not all(np.isfinite(values).all() for values in (*proxy, *gold)):
        raise ValueError("`proxy` and `gold` must be finite; leave the answers out whose rewards are not.")
    least = min(map(len, proxy))
    sizes = sorted({*(2**i for i in range(least.bit_length()) if 2**i <= least), least})
    curves = []
    for values in (gold, proxy):
        scale = float(np.concatenate(list(values)).std())
        points = []
        for n in sizes:
            gains = [expected_best(p, v, n) - float(v.mean()) for p, v in zip(proxy, values, strict=True)]
            points.append(mean_of(gains).scaled(1 / scale if scale > 0 else 0.0))
        curves.append(points)
    heights = [point.value for point in curves[0]]
    peak = int(np.argmax(heights))
    return Curve(sizes, list(map(best_of_n_kl, sizes)), curves[0], curves[1], sizes[peak], heights[peak] - heights[-1])


def curves(rewards: Mapping[str, Sequence[np.ndarray]], gold: Sequence[np.ndarray]) -> dict[str, Curve]:
    """The curve of every model."""
    return {name: best_of_n(proxy, gold) for name, proxy in rewards.items()}
