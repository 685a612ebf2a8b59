"""Best-of-n as the laboratory sees it, against every subset of the samples."""

import math
from itertools import combinations

import pytest
import torch

from lab.best_of_n import best_of_n, best_of_n_kl


def test_rewards_are_the_means_over_all_subsets_and_prompts():
    proxy, gold, shortcut = torch.randn(3, 3, 7, dtype=torch.float64)
    result = best_of_n(proxy, gold, shortcut, range(1, 8))
    assert result.n == list(range(1, 8))
    for row, n in enumerate(result.n):
        best = [
            (prompt, max(subset, key=lambda i, p=prompt: proxy[p, i]))
            for prompt in range(3)
            for subset in combinations(range(7), n)
        ]
        assert result.gold[row] == pytest.approx(sum(gold[b].item() for b in best) / len(best))
        assert result.proxy[row] == pytest.approx(sum(proxy[b].item() for b in best) / len(best))
        assert result.shortcut[row] == pytest.approx(sum(shortcut[b].item() for b in best) / len(best))
    alone = [best_of_n(p[None], g[None], g[None], [3]).gold for p, g in zip(proxy, gold, strict=True)]
    of_prompts = torch.tensor(alone).squeeze(1)
    assert result.gold_error[2] == pytest.approx(of_prompts.std().item() / math.sqrt(3))
    assert best_of_n(proxy, gold, shortcut).n == [1, 2, 4], "by default the powers of two"


def test_the_divergence_is_that_of_the_best_of_n_distribution():
    """Best of n without ties among many equally likely answers has an explicit distribution: compare with its KL."""
    answers = 20_000
    rank = torch.arange(1, answers + 1, dtype=torch.float64)
    for n in (1, 2, 5, 64):
        probability = (rank / answers) ** n - ((rank - 1) / answers) ** n
        exact = (probability * (probability * answers).clamp_min(1e-300).log()).sum().item()
        assert best_of_n(*torch.randn(3, 1, 64), [n]).kl == [pytest.approx(exact, abs=1e-4)]
    assert best_of_n(*torch.randn(3, 1, 2), [2]).kl == [math.log(2) - 0.5]


def test_scale_and_shift_of_the_proxy_change_no_selection():
    proxy, gold = torch.randn(4, 16), torch.randn(4, 16)
    assert best_of_n(proxy, gold, gold, [4]).gold == best_of_n(8 * proxy + 1, gold, gold, [4]).gold


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"\[prompts, samples\], got \[3\], \[3\], \[3\]"):
        best_of_n(*torch.randn(3, 3), [1])
    for shapes in (((2, 3), (3, 2), (2, 3)), ((2, 3), (2, 3), (3, 2))):
        with pytest.raises(ValueError, match=r"got \[2, 3\], \[\d, \d\], \[\d, \d\]"):
            best_of_n(*(torch.randn(shape) for shape in shapes), [1])
    with pytest.raises(ValueError, match="no NaN"):
        best_of_n(torch.tensor([[1.0, math.nan]]), torch.zeros(1, 2), torch.zeros(1, 2), [1])
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"`n` must be 1 to the number of samples, 3, got {n}"):
            best_of_n(*torch.randn(3, 2, 3), [n])
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        best_of_n_kl(0)
