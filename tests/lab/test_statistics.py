"""The laboratory's statistics against scipy, and against what they promise."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from lab import statistics
from lab.seeds import derive


@pytest.mark.parametrize("n", [2, 6, 9, 14])
def test_paired_comparison_is_scipys(n):
    first, second = torch.randn(n).tolist(), torch.randn(n).tolist()
    found = statistics.paired(first, second)
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(np.subtract(first, second)))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.t_p == pytest.approx(test.pvalue)
    exact = stats.permutation_test(
        (np.subtract(first, second),), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert found.p == pytest.approx(exact.pvalue)
    assert found.wins == sum(a > b for a, b in zip(first, second, strict=True))


def test_sign_flips_are_all_patterns_and_ties_count():
    x = [1.0, -2.0, 0.5, 3.0, 0.1]
    sums = [abs(sum(s * v for s, v in zip(signs, x, strict=True))) for signs in itertools.product((1, -1), repeat=5)]
    assert statistics.sign_flip_test(x) == np.mean([s >= abs(sum(x)) - 1e-12 for s in sums])
    assert statistics.sign_flip_test([0.1] * 6) == 2 / 64
    assert statistics.sign_flip_test([0.0, 0.0]) == 1.0


def test_many_pairs_are_tested_on_random_patterns_and_repeat():
    x = (torch.randn(24) + 0.5).tolist()
    p = statistics.sign_flip_test(x)
    assert p == statistics.sign_flip_test(x)
    assert p == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=0.02)


def test_holm_is_the_step_down_rule():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0] and statistics.holm([]) == []


def test_equal_arms_and_single_seeds_are_no_evidence():
    assert statistics.paired([1.0, 2.0], [1.0, 2.0]) == statistics.Paired(2, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
    one = statistics.paired([1.0], [0.0])
    assert one.p == 1.0 and np.isnan(one.low) and np.isnan(one.t_p)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.paired([1.0], [1.0, 2.0]), "must hold the same seeds, got 1 and 2"),
        (lambda: statistics.paired([], []), "values must be finite and at least one"),
        (lambda: statistics.mean_interval([1.0, float("nan")]), "values must be finite"),
    ],
)
def test_bad_input_is_a_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_seeds_are_named_and_do_not_meet():
    seeds = {derive(seed, *labels) for seed in range(20) for labels in (("data",), ("order", 1), ("order", 2), ())}
    assert len(seeds) == 80 and derive(3, "data") == derive(3, "data") and max(seeds) < 2**48
