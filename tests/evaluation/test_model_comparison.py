"""Several models on the same pairs, and best-of-n by taking every subset."""

import itertools
import math

import numpy as np
import pytest

from ummrm.evaluation.agreement import compare_models
from ummrm.evaluation.best_of_n import best_of_n, best_of_n_kl, expected_best


def test_agreement_by_a_loop():
    generator = np.random.default_rng(0)
    models = {name: generator.integers(-2, 3, 60).astype(float) for name in "abc"}
    found = compare_models(models, [str(i) for i in range(60)])
    assert [(one.first, one.second) for one in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    for one in found:
        total = right = wrong = 0
        for x, y in zip(models[one.first], models[one.second], strict=True):
            alike = (x > 0) == (y > 0) and (x < 0) == (y < 0)
            total += 0.5 if (x == 0) != (y == 0) else float(alike)
            right += x > 0 and y > 0
            wrong += x < 0 and y < 0
        assert one.agreement.value == pytest.approx(total / 60)
        assert (one.both_right, one.both_wrong) == (right, wrong) and one.adjusted_p >= one.paired.p


def test_the_better_model_is_named_only_where_it_is_shown():
    good, bad = np.ones(30), np.array([1.0] * 15 + [-1.0] * 15)
    (found,) = compare_models({"bad": bad, "good": good}, [str(i) for i in range(30)])
    assert found.better == "good" and found.paired.second_better == 15 and found.paired.difference.value == -0.5
    (same,) = compare_models({"one": good, "other": good * 2}, [str(i) for i in range(30)])
    assert same.better is None and same.agreement.value == 1 and same.paired.p == 1
    assert compare_models({"one": good}, []) == []


def by_subsets(proxy, values, n):
    """The mean over all subsets, where a tie goes to each of its answers alike."""
    total = 0.0
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        tied = [values[i] for i in subset if proxy[i] == best]
        total += sum(tied) / len(tied)
    return total / math.comb(len(proxy), n)


@pytest.mark.parametrize("levels", [1000, 3])
def test_best_of_n_is_the_mean_over_all_subsets(levels):
    generator = np.random.default_rng(levels)
    proxy, values = generator.integers(0, levels, 7).astype(float), generator.normal(size=7)
    for n in range(1, 8):
        assert expected_best(proxy, values, n) == pytest.approx(by_subsets(proxy, values, n), abs=1e-12)


def test_the_curve():
    generator = np.random.default_rng(4)
    gold = [generator.normal(size=size) for size in (6, 5, 8)]
    noise = [generator.normal(size=len(g)) for g in gold]
    found = best_of_n(gold, gold)
    assert found.n == [1, 2, 4, 5], "as far as the prompt with the fewest answers lets it"
    assert found.kl == pytest.approx([math.log(n) - (n - 1) / n for n in found.n])
    scale = np.concatenate(gold).std()
    for n, point in zip(found.n, found.gold, strict=True):
        gains = [by_subsets(g, g, n) - g.mean() for g in gold]
        assert point.value == pytest.approx(np.mean(gains) / scale, abs=1e-12) and point.count == 3
    assert found.gold == found.proxy and found.fall == 0 and found.peak == 5
    hacked = best_of_n([-g for g in gold], gold)
    assert hacked.peak == 1 and hacked.fall == pytest.approx(-hacked.gold[-1].value) and hacked.fall > 0.5
    assert hacked.proxy[-1].value > 0
    best_of_n(noise, [np.ones(len(g)) for g in gold])  # a gold scorer that says the same of all


def test_mistakes_are_clear():
    for call, message in {
        lambda: best_of_n_kl(0): "`n` must be at least 1, got 0",
        lambda: expected_best(np.ones(3), np.ones(3), 4): "from 1 to the number of answers, 3, got 4",
        lambda: expected_best(np.array([math.nan]), np.ones(1), 1): "without NaN",
        lambda: best_of_n([], []): "at least one prompt",
        lambda: best_of_n([np.ones(2)], [np.ones(3)]): "the same answers",
        lambda: best_of_n([np.array([1, math.inf])], [np.ones(2)]): "must be finite",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
