"""Best-of-n as an optimiser: what the proxy's favourite among n answers is worth to the gold reward.

The estimator is unbiased, over all n-subsets of the samples in closed form. Demo and studies measure by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BestOfN:
    """Means over prompts under best-of-n, a list element for each n.

    Attributes:
        n: sample counts.
        kl: KL divergence from the policy, ln n - (n - 1) / n nats: exact where no two answers tie, else an upper bound
            (Beirami et al. 2024, arXiv 2401.01879).
        proxy: proxy reward of the selected answer, in the proxy's own units.
        gold: its gold reward.
        gold_error: standard error of `gold` over prompts; NaN for a single one.
        shortcut: amount of the shortcut in it.
    """

    n: list[int]
    kl: list[float]
    proxy: list[float]
    gold: list[float]
    gold_error: list[float]
    shortcut: list[float]


def best_of_n(
    proxy: torch.Tensor, gold: torch.Tensor, shortcut: torch.Tensor, sizes: Sequence[int] | None = None
) -> BestOfN:
    """Expected outcome when the answer that the proxy likes best among n is taken.

    Args:
        proxy: [prompts, samples], the selecting model's rewards.
        gold: [prompts, samples].
        shortcut: [prompts, samples].
        sizes: values of n, each 1 to samples; by default the powers of two.

    Returns:
        A row for each n.

    Raises:
        ValueError: shapes differ, a proxy reward is NaN, or an n is outside.
    """
    if proxy.dim() != 2 or proxy.shape != gold.shape or proxy.shape != shortcut.shape:
        shapes = ", ".join(str(list(values.shape)) for values in (proxy, gold, shortcut))
        raise ValueError(f"`proxy`, `gold` and `shortcut` must all be [prompts, samples], got {shapes}.")
    if bool(proxy.isnan().any()):
        raise ValueError("`proxy` must hold no NaN: it has no best answer then.")
    prompts, samples = proxy.shape
    sizes = list(sizes) if sizes is not None else [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    selected = [best_of_n_mean(proxy, gold, n) for n in sizes]
    return BestOfN(
        n=sizes,
        kl=[best_of_n_kl(n) for n in sizes],
        proxy=[best_of_n_mean(proxy, proxy, n).mean().item() for n in sizes],
        gold=[values.mean().item() for values in selected],
        gold_error=[values.std().item() / math.sqrt(prompts) if prompts > 1 else math.nan for values in selected],
        shortcut=[best_of_n_mean(proxy, shortcut, n).mean().item() for n in sizes],
    )


def best_of_n_kl(n: int) -> float:
    """KL divergence of best-of-n from the policy in nats, ln n - (n - 1) / n: exact where answers never tie."""
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    return math.log(n) - (n - 1) / n


def best_of_n_mean(proxy: torch.Tensor, values: torch.Tensor, n: int) -> torch.Tensor:
    """Mean over all n-subsets of the value of each subset's best sample (Nakano et al., arXiv 2112.09332, appendix I).

    Args:
        proxy: [prompts, samples], by which the best is chosen; ties go to the later sample.
        values: [prompts, samples].
        n: 1 to samples.

    Returns:
        fp64 [prompts].

    Raises:
        ValueError: `n` is outside.
    """
    samples = proxy.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"`n` must be 1 to the number of samples, {samples}, got {n}.")
    rank = torch.arange(1, samples + 1, dtype=torch.float64)
    # the sample of rank i is the best of a subset if the n - 1 others come from the i - 1 below: C(i-1, n-1) / C(N, n)
    log_weight = _log_binomial(rank - 1, n - 1) - _log_binomial(torch.tensor(samples, dtype=torch.float64), n)
    weight = log_weight.masked_fill(rank < n, -math.inf).exp()
    ordered = values.double().gather(1, proxy.argsort(dim=1, stable=True))
    return ordered @ weight


def standardised(values: torch.Tensor) -> torch.Tensor:
    """In standard deviations from the mean, over all elements, fp64."""
    values = values.double()
    return (values - values.mean()) / values.std().clamp_min(torch.finfo(torch.float64).tiny)


def _log_binomial(n: torch.Tensor, k: int) -> torch.Tensor:
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma((n - k).clamp_min(0) + 1)
