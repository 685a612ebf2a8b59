"""Best-of-n as an optimiser: what the proxy's favourite among n answers is worth to the gold reward.

A view of the recipe's estimator, which is unbiased (over all n-subsets of the samples, in closed form).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .demo.measure import best_of_n_kl, best_of_n_mean


@dataclass(frozen=True)
class BestOfN:
    """Rewards under best-of-n, a list element for each n.

    Attributes:
        n: sample counts.
        kl: KL divergence from the policy, ln n - (n - 1) / n nats: exact where no two answers tie, else an upper bound
            (Beirami et al. 2024, arXiv 2401.01879).
        proxy: mean proxy reward of the selected answer, in the proxy's own units.
        gold: its mean gold reward.
    """

    n: list[int]
    kl: list[float]
    proxy: list[float]
    gold: list[float]


def best_of_n(proxy: torch.Tensor, gold: torch.Tensor, ns: Sequence[int]) -> BestOfN:
    """Expected rewards when the answer that the proxy likes best among n is taken.

    Args:
        proxy: [prompts, samples].
        gold: [prompts, samples].
        ns: sample counts, each 1 to samples.

    Returns:
        A row for each n, averaged over prompts.

    Raises:
        ValueError: shapes differ, a proxy reward is NaN, or an n is outside.
    """
    if proxy.dim() != 2 or proxy.shape != gold.shape:
        raise ValueError(
            f"`proxy` and `gold` must both be [prompts, samples], got {list(proxy.shape)} and {list(gold.shape)}."
        )
    if bool(proxy.isnan().any()):
        raise ValueError("`proxy` must hold no NaN: it has no best answer then.")
    return BestOfN(
        n=list(ns),
        kl=[best_of_n_kl(n) for n in ns],
        proxy=[best_of_n_mean(proxy, proxy, n).mean().item() for n in ns],
        gold=[best_of_n_mean(proxy, gold, n).mean().item() for n in ns],
    )
