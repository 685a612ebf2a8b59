"""Intervals and tests against their definitions, by other ways than the code's own."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ummrm.evaluation.intervals import NOTHING, bootstrap, holm, mean_of, paired, share_of, wilson


@pytest.mark.parametrize(("successes", "count"), [(7, 10), (0, 5), (5, 5), (1, 1), (2.5, 4), (60, 100)])
def test_wilsons_ends_are_the_shares_from_which_the_data_are_just_as_far_as_allowed(successes, count):
    found = wilson(successes, count)
    z = stats.norm.ppf(0.975)
    for end in (found.low, found.high):
        if 0 < end < 1:
            distance = abs(successes / count - end) / math.sqrt(end * (1 - end) / count)
            assert distance == pytest.approx(z, rel=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.high - found.low > 0
    assert found.value == successes / count and found.count == count
    if float(successes).is_integer():
        whole = stats.binomtest(int(successes), count).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


def test_no_data_and_impossible_counts():
    assert wilson(0, 0) is NOTHING and math.isnan(mean_of([]).value) and share_of([]).count == 0
    with pytest.raises(ValueError, match="`successes` must be from 0 to `count`, 3, got 4"):
        wilson(4, 3)
    with pytest.raises(ValueError, match=r"must be \[N\] of one N, got \[2\] and \[3\]"):
        paired(np.ones(2), np.ones(3))


def test_means_and_their_t_intervals():
    values = np.random.default_rng(0).normal(1, 2, 12)
    found = mean_of(values)
    known = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), known.low, known.high))
    one = mean_of([3.0])
    assert one.value == 3 and math.isnan(one.low) and one.count == 1
    grouped = mean_of([1, 3, 10], ["a", "a", "b"])
    assert grouped.value == 6 and grouped.count == 2
    assert found.scaled(0.5).high == found.high / 2


def test_outcomes_of_one_prompt_make_the_interval_wider():
    outcomes = np.array([1] * 30 + [0] * 30)
    alone = share_of(outcomes, range(60))
    assert alone == wilson(30, 60)
    together = share_of(outcomes, [i // 10 for i in range(60)])  # six prompts, each all right or all wrong
    assert together.value == 0.5 and together.high - together.low > 1.5 * (alone.high - alone.low)
    same = share_of(np.ones(20), [i // 10 for i in range(20)])
    assert same.low == wilson(20, 20).low < 1, "a bootstrap of equal values has no width"


def test_the_bootstrap_draws_whole_groups():
    seen = []

    def statistic(weights):
        seen.append(weights)
        return weights[:, 0]

    value, low, high = bootstrap(statistic, ["a", "a", "b"])
    weights = np.concatenate(seen)
    assert value == 1 and weights.shape == (2001, 3) and (weights[:, 0] == weights[:, 1]).all()
    assert (weights[1:, 0] + weights[1:, 2] == 2).all() and (low, high) == (0, 2)
    assert math.isnan(bootstrap(statistic, ["a", "a"])[1])


def test_mcnemars_test_by_counting_every_way_to_turn_the_discordant_pairs():
    first, second = np.array([1, 1, 1, 1, 1, 0, 1, 0]), np.array([0, 0, 0, 0, 0, 1, 1, 0])
    found = paired(first, second)
    turned = [sum(signs) for signs in itertools.product((-1, 1), repeat=6)]
    assert found.p == pytest.approx(np.mean([abs(total) >= 4 for total in turned]))
    assert (found.first_better, found.second_better) == (5, 1) and found.difference.value == 0.5
    assert found.difference.low < 0.5 < found.difference.high
    same = paired(first, first)
    assert same.p == 1 and same.difference.low < 0 < same.difference.high
    ties = paired(np.array([0.5, 1.0]), np.array([0.0, 1.0]))
    assert ties.first_better == 1 and ties.difference.value == 0.25
    assert math.isnan(paired(np.array([]), np.array([])).p)


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1, 1] and holm([]) == []
