"""Edits keep an answer's content and say where they do not apply; effects are those of rewards that are known."""

import numpy as np
import pytest
from trl_inputs import message

from ummrm.evaluation.edits import NAMES, PROBES, edited, sentences
from ummrm.evaluation.probes import choose_pairs, edit_effect, length_effect, make_edits
from ummrm.evaluation.reading import LabelledPair

PROBE = {probe.name: probe for probe in PROBES}
TEXT = "Water boils. At what heat? It depends on  the height!"


def test_names():
    assert NAMES == ("length", "repetition", "list", "bold", "opening", "praise", "neutral")


def test_edits_keep_every_word_in_its_order():
    for name in PROBE:
        for wording in range(3):
            words = edited(TEXT, PROBE[name], wording).replace("*", "").replace("- ", "").split()
            rest = iter(words)
            assert all(word in rest for word in TEXT.split()), name


def test_what_each_edit_does():
    assert sentences(TEXT) == ["Water boils.", "At what heat?", "It depends on  the height!"]
    assert edited(TEXT + "\n", PROBE["repetition"], 0) == TEXT + " It depends on  the height!"
    assert edited(TEXT, PROBE["list"], 0) == "- Water boils.\n- At what heat?\n- It depends on the height!"
    assert edited(TEXT, PROBE["bold"], 0) == "**Water boils.** At what heat? It depends on  the height!"
    for name, place in (("opening", str.endswith), ("praise", str.startswith), ("neutral", str.startswith)):
        found = [edited(TEXT, PROBE[name], i) for i in range(4)]
        assert all(place(text, TEXT) for text in found) and len(set(found)) == 3 and found[3] == found[0]


FORMED = ["- a\n- b. c.", "```\nx. y\n```", "1. One. Two.", "A **bold**. Word.", "# Head\nA. B.", "| a | b. c"]


@pytest.mark.parametrize("text", FORMED)
def test_what_has_a_form_already_is_left_alone(text):
    assert edited(text, PROBE["list"], 0) is None and edited(text, PROBE["bold"], 0) is None
    assert edited(text, PROBE["praise"], 0).startswith(text)


def test_where_an_edit_does_not_apply():
    assert edited("One sentence only", PROBE["list"], 0) is None
    assert all(edited("  ", probe, 0) is None for probe in PROBES)
    chat = [message("assistant", "a"), message("user", "b"), message("assistant", TEXT)]
    found = edited(chat, PROBE["bold"], 0)
    assert found[:2] == chat[:2] and found[2]["content"].startswith("**Water") and chat[2]["content"] == TEXT
    assert edited(chat[:2], PROBE["bold"], 0) is None, "the last word is the user's"


def pair(prompt, chosen, rejected, key="k"):
    return LabelledPair(prompt, chosen, rejected, "all", key)


def test_edited_answers_stand_behind_their_prompts():
    pairs = [pair("p ", "A. B.", "C"), pair(None, "Start. A.", "Start. B."), pair("q ", "D. E.", "- F. G.")]
    found = make_edits(pairs, [0, 1, 2], NAMES)
    assert list(found) == list(NAMES[1:])
    assert found["list"].texts == ["p - A.\n- B.", "q - D.\n- E."] and found["list"].owners == [(0, 0), (2, 0)]
    assert found["list"].left_out == 4
    assert found["repetition"].texts[2:4] == ["Start. A. A.", "Start. B. B."], "an end is an end without a prompt too"
    assert [owner for owner in found["opening"].owners if owner[0] == 1] == []
    assert make_edits(pairs, [2], ["bold"])["bold"].owners == [(2, 0)] and make_edits(pairs, [0], []) == {}
    chosen = choose_pairs(pairs * 10, 7, 0)
    assert len(set(chosen)) == 7 and chosen == sorted(chosen) and choose_pairs(pairs, 3, 0) == [0, 1, 2]
    assert choose_pairs(pairs * 10, 7, 1) != chosen


def test_the_effect_of_an_edit_by_hand():
    pairs = [pair("p", "A.", "B.", "one"), pair("p", "C.", "D.", "one"), pair("q", "E.", "F.", "two")]
    edits = make_edits(pairs, [0, 1, 2], ["praise"])["praise"]
    rewards = np.array([[2.0, 1.0], [0.0, 0.5], [3.0, 1.0]])
    changes = np.array([0.5, 1.5, -0.5, 0.0, 1.0, 0.5])
    found = edit_effect(edits, rewards.reshape(-1) + changes, rewards, [p.key for p in pairs])
    std = rewards.std()
    assert found.change.value == pytest.approx(((0.5 + 1.5 - 0.5 + 0) / 4 + (1 + 0.5) / 2) / 2 / std)
    assert found.change.count == 2 and found.edited == 6 and found.left_out == 0
    assert found.rose.value == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 1) / 6)
    # of the pairs in order, the first one's rejected answer gets 2.5 over 2, the third one's 1.5 under 3
    assert found.overturned.value == 0.5 and found.overturned.count == 2
    kept = edit_effect(
        edits, rewards.reshape(-1) + changes, rewards, ["a", "b", "c"], np.array([1, 0, 1, 1, 1, 1], bool)
    )
    assert kept.edited == 5 and kept.left_out == 1 and kept.overturned.count == 1
    assert edit_effect(edits, np.ones(6), np.ones((3, 2)), ["a", "b", "c"]) is None, "all rewards are equal"
    nothing = make_edits(pairs, [0], ["list"])["list"]
    assert edit_effect(nothing, np.array([]), rewards, ["a", "b", "c"]) is None


def test_length_by_hand():
    pairs = [pair("p", "x" * 8, "x" * 4, "a"), pair("p", "x" * 2, "x" * 8, "b"), pair("p", "x" * 6, "y" * 6, "c")]
    pairs += [pair(None, "same beginning yyyy", "same beginning zz", "d")]
    rewards = np.array([[3.0, 1.0], [2.0, 1.0], [9.0, 0.0], [1.0, 2.0]])
    found = length_effect(pairs, rewards)
    gaps, ratios = np.array([2, 1, -1]) / rewards.std(), np.array([1.0, -2.0, 1.0])
    assert found.log_ratios == pytest.approx(ratios) and found.gaps == pytest.approx(gaps)
    assert found.per_doubling.value == pytest.approx((gaps @ ratios) / (ratios @ ratios))
    # Pearson's, once each pair's mean is taken off both
    r, n = np.stack([gaps, -gaps], 1).ravel() / 2, np.stack([ratios, -ratios], 1).ravel() / 2
    assert found.correlation.value == pytest.approx(np.corrcoef(r, n)[0, 1])
    assert found.longer_chosen.value == pytest.approx(2 / 3)
    assert (found.chosen_shorter.value, found.chosen_shorter.count) == (1, 1)
    assert (found.chosen_longer.value, found.chosen_longer.count) == (0.5, 2)


def test_a_model_of_length_is_found_out():
    generator = np.random.default_rng(0)
    pairs = [pair("p", "x" * generator.integers(5, 90), "x" * generator.integers(5, 90), str(i)) for i in range(150)]
    lengths = np.array([[len(p.chosen), len(p.rejected)] for p in pairs], dtype=float)
    found = length_effect(pairs, np.log2(lengths))
    assert found.correlation.value == pytest.approx(1)
    assert (found.chosen_longer.value, found.chosen_shorter.value) == (1, 0)
    blind = length_effect(pairs, np.random.default_rng(1).normal(size=(150, 2)))
    assert blind.correlation.low < 0 < blind.correlation.high and abs(blind.correlation.value) < 0.3
    assert found.per_doubling.value == pytest.approx(1 / np.log2(lengths).std())
    assert length_effect(pairs, np.ones((150, 2))) is None and length_effect(pairs[:0], np.zeros((0, 2))) is None
    assert length_effect([pair("p", "ab", "cd")], np.array([[1.0, 2.0]])) is None
