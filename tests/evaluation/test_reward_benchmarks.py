"""RewardBench's scores by hand: sections weighted by prompts, the best of four, and the rule of Ties."""

import math

import numpy as np
import pytest

from ummrm.evaluation.reading import Choice, LabelledPair
from ummrm.evaluation.rewardbench import SECTIONS, SUBSETS, rewardbench, rewardbench2, ties_score


def pairs_of(*subsets):
    return [LabelledPair(None, "c", "r", subset, str(i), "rewardbench") for i, subset in enumerate(subsets)]


def test_a_section_weighs_its_subsets_by_the_benchmarks_prompts_and_not_by_the_rows_at_hand():
    pairs = pairs_of("math-prm", "hep-go", "hep-go", "hep-go", "hep-go", "alpacaeval-easy", "alpacaeval-easy", "other")
    found = rewardbench(pairs, np.array([1.0, 1.0, -1.0, 0.0, -2.0, 0.5, 0.1, 1.0]))
    assert found.parts["hep-go"].value == 0.25, "a tie is wrong there"
    assert found.sections == {"Chat": 1.0, "Reasoning": pytest.approx((984 * 1 + 164 * 0.25) / (984 + 164))}
    assert math.isnan(found.score) and found.unknown == ["other"] and len(found.missing) == 20


def test_all_sections_make_a_score():
    names = [name for weights in SECTIONS.values() for name in weights]
    assert len(names) == len(set(names)) == 23
    sums = {section: sum(weights.values()) for section, weights in SECTIONS.items()}
    assert sums == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}
    assert SECTIONS["Reasoning"]["math-prm"] * 2 == sums["Reasoning"], "mathematics counts as all code does"
    wrong = set(SECTIONS["Chat"])
    found = rewardbench(pairs_of(*names), np.array([-1.0 if name in wrong else 1.0 for name in names]))
    assert found.score == 0.75 and found.missing == [] and found.sections["Chat"] == 0


def choice(subset, right, wrong, identity=""):
    return Choice([{"role": "user", "content": "p"}], tuple("a" * right), tuple("b" * wrong), subset, identity)


def test_the_best_of_four_shares_a_point_with_its_equals():
    choices = [choice("Math", 1, 3)] * 4 + [choice("Focus", 1, 3)] * 2
    rewards = [[3, 1, 2, 0], [2, 2, 2, 1], [1, 2, 0, 0], [1, 1, 0, 0], [5, 1, 1, 1], [0, 1, 1, 1]]
    found = rewardbench2(choices, [np.array(r, dtype=float) for r in rewards])
    assert found.parts["Math"].value == pytest.approx((1 + 1 / 3 + 0 + 1 / 2) / 4)
    assert 0 <= found.parts["Math"].low < found.parts["Math"].high <= 1
    assert found.parts["Focus"].value == 0.5 and math.isnan(found.score)
    assert set(found.missing) == set(SUBSETS) - {"Math", "Focus"}


def test_the_rule_of_ties_by_hand():
    choices = [
        choice("Ties", 2, 2, "tied:1"),  # right answers 5 and 4, wrong up to 1: gap 3, apart 1
        choice("Ties", 1, 2, "ref:1"),  # gap 0.5: narrower than they lie apart
        choice("Ties", 2, 1, "tied:2"),  # gap -1
        choice("Ties", 1, 1, "ref:2"),  # gap 2
        choice("Ties", 1, 1, "ref:3"),  # no tied prompt of its number
    ]
    rewards = [[5, 4, 1, 0], [1, 0.5, 0], [3, 0, 1], [3, 1], [0, 1]]
    arrays = [np.array(r, dtype=float) for r in rewards]
    expected = 0.3 * (1 / 2) + 0.3 * (2 / 3) + 0.2 * (1 / 2) + 0.2 * 0
    expected += 0.01 * (math.tanh(0.5 / 1 - 1) + math.tanh(-1 / 3 - 1)) / 2
    assert ties_score(choices, arrays) == pytest.approx(expected)
    every = [choice(name, 1, 3) for name in SUBSETS if name != "Ties"]
    found = rewardbench2([*every, *choices], [np.array([1.0, 0, 0, 0])] * 5 + arrays)
    assert found.score == pytest.approx((5 + expected) / 6) and found.missing == []
    assert math.isnan(found.parts["Ties"].low)


def test_ties_at_its_edges():
    pair = [choice("Ties", 2, 1, "tied:1"), choice("Ties", 1, 1, "ref:1")]
    best = ties_score(pair, [np.array([1.0, 1.0, 0.0]), np.array([1.0, 0.0])])
    assert best == pytest.approx(1.01), "right answers that lie together are infinitely far from the wrong one"
    assert ties_score(pair, [np.zeros(3), np.zeros(2)]) == 0
    assert ties_score(pair[:1], [np.array([2.0, 1.0, 0.0])]) == pytest.approx(0.3) and math.isnan(ties_score([], []))
    with pytest.raises(ValueError, match="`id` of a row of Ties must be tied:NUMBER or ref:NUMBER, got 'x'"):
        ties_score([choice("Ties", 2, 1, "x")], [np.zeros(3)])
