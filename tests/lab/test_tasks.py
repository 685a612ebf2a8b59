"""The preference tasks: gold rewards by their definition, shortcuts as strong as asked, labels as noisy as asked."""

import dataclasses
import random

import pytest
import torch

from lab.tasks import (
    GoldReward,
    Sequences,
    SyntheticTaskConfig,
    TextTaskConfig,
    concatenate,
    corrupt,
    english_passages,
    make_synthetic_task,
    make_text_task,
)
from lab.tasks.synthetic import REGIMES

SMALL = SyntheticTaskConfig(train_pairs=200, test_pairs=80, prompts=3, samples=16, label_noise=0.25, shortcut_share=0.7)
FILLER = 3


@pytest.fixture(scope="module")
def task():
    return make_synthetic_task(SMALL, seed=5)


def filler_of(sequences):
    return (sequences.tokens == FILLER).sum(1)


def test_gold_reward_follows_its_definition():
    reward = GoldReward(SMALL, torch.Generator().manual_seed(0))
    content = [2, 5, 2, 7]
    topic, filler = 1, 5
    expected = sum(reward.values[topic, c].item() for c in content)
    expected += sum(reward.bonus[a, b].item() for a, b in zip(content, content[1:], strict=False))
    expected -= SMALL.repetition_penalty * 1 + SMALL.filler_penalty * (filler - SMALL.free_filler)
    padded = torch.tensor([[*content, 9, 9]])
    live = torch.tensor([[True] * 4 + [False] * 2])
    got = reward(torch.tensor([topic]), padded, live, torch.tensor([filler]))
    assert got.item() == pytest.approx(expected)


def test_gold_reward_of_whole_sequences_is_that_of_the_answers(task):
    assert torch.equal(task.gold(task.policy.sequences), task.policy.gold.flatten())
    assert torch.equal(task.shortcut_of(task.policy.sequences), task.policy.shortcut.flatten())
    better, worse = task.gold(task.test.chosen), task.gold(task.test.rejected)
    assert (better - worse).min() >= SMALL.min_margin


def test_gold_reward_of_what_training_never_held(task):
    topic, end, content = task.prompts.tokens[1].tolist(), task.end_token_id, list(range(8, 8 + SMALL.max_content))
    rows = [
        [*topic, *content, end],
        [*topic, *content],  # cut off: no cost
        [*topic, *content, 9, 9, end],  # overlong by two
        [*topic, *content, topic[0], topic[1], end],  # a topic and a separator within the answer
        [*topic, *content, end, 9, 9],  # what follows the end is ignored
        topic,  # nothing at all
    ]
    gold = task.gold(Sequences.from_lists(rows, task.pad_token_id)).tolist()
    cost = 2 * SMALL.filler_penalty
    assert gold == pytest.approx([gold[0], gold[0], gold[0] - cost, gold[0] - cost, gold[0], 0])
    with pytest.raises(ValueError, match="must begin with a topic token, 4 to 7, got"):
        task.gold(Sequences.from_lists([[end, end]], task.pad_token_id))


def test_instruction_regimes_weigh_the_parts_of_the_reward():
    config = dataclasses.replace(SMALL, topics=6, instruction_regimes=3)
    reward = GoldReward(config, torch.Generator().manual_seed(0))
    content, filler = torch.tensor([[2, 5, 2]]), torch.tensor([0])
    live = torch.ones_like(content, dtype=torch.bool)
    for topic in range(6):
        words, order, repetition = list(REGIMES.values())[topic % 3]
        expected = words * reward.values[topic, content[0]].sum() + order * (reward.bonus[2, 5] + reward.bonus[5, 2])
        expected -= repetition * config.repetition_penalty
        assert reward(torch.tensor([topic]), content, live, filler).item() == pytest.approx(expected.item())
    task = make_synthetic_task(config, 0)
    assert task.regimes == ("even", "words", "order")
    assert task.regime_of(task.prompts).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("split", "share"), [("test", 0.7), ("shifted", 0.3)])
def test_the_shortcut_is_planted_as_asked_and_reversed_in_the_shifted_set(task, split, share):
    pairs = getattr(task, split)
    more = (filler_of(pairs.chosen) > filler_of(pairs.rejected)).double().mean().item()
    assert more == pytest.approx(share, abs=0.02) and pairs.shortcut_share == pytest.approx(share, abs=0.02)
    assert int(filler_of(pairs.chosen).max()) <= SMALL.max_train_filler


def test_label_noise_is_in_training_alone(task):
    assert task.train.label_noise == pytest.approx(0.25, abs=0.02)
    assert task.test.label_noise == task.shifted.label_noise == 0


def test_the_policy_goes_further_with_the_shortcut_than_training(task):
    assert task.policy.shortcut.max() > SMALL.max_train_filler
    assert task.policy.gold.shape == (3, 16) and len(task.policy.sequences) == 48


def test_answers_without_labels_are_the_policys_others(task):
    answers = task.unlabelled(40, 3)
    assert len(answers) == 40 and torch.equal(answers.tokens, task.unlabelled(40, 3).tokens)
    assert task.shortcut_of(answers).max() > SMALL.max_train_filler
    assert len(answers.tokens[:, 0].unique()) == SMALL.topics, "prompts in turn"
    held = {tuple(row) for row in task.policy.sequences.tokens[:, : SMALL.max_content].tolist()}
    assert not held & {tuple(row) for row in answers.tokens[:, : SMALL.max_content].tolist()}


def test_a_task_is_its_seed(task):
    again, other = make_synthetic_task(SMALL, seed=5), make_synthetic_task(SMALL, seed=6)
    assert torch.equal(again.train.chosen.tokens, task.train.chosen.tokens)
    assert torch.equal(again.policy.gold, task.policy.gold)
    assert not torch.equal(other.train.chosen.tokens, task.train.chosen.tokens)


def test_tokens_fit_the_vocabulary_and_padding_fits_the_lengths(task):
    for pairs in (task.train, task.test, task.shifted):
        for sequences in (pairs.chosen, pairs.rejected):
            assert 0 <= sequences.tokens.min() and sequences.tokens.max() < task.vocab_size
            inputs = sequences.inputs()
            assert torch.equal(inputs["attention_mask"].bool(), inputs["input_ids"] != task.pad_token_id)
            assert len(set(sequences.lengths.tolist())) > 3, "lengths must vary, so that padding is exercised"


def test_sequences_pad_select_and_concatenate():
    one = Sequences.from_lists([[5, 6], [7]], pad_token_id=0)
    two = Sequences.from_lists([[1, 2, 3]], pad_token_id=0)
    both = concatenate([one, two])
    assert both.tokens.tolist() == [[5, 6, 0], [7, 0, 0], [1, 2, 3]] and both.lengths.tolist() == [2, 1, 3]
    assert both.select(slice(0, 2)).inputs()["input_ids"].tolist() == [[5, 6], [7, 0]]
    with pytest.raises(ValueError, match="`rows` must be non-empty lists"):
        Sequences.from_lists([[1], []], 0)
    with pytest.raises(ValueError, match="must share one pad_token_id"):
        concatenate([one, Sequences.from_lists([[1]], pad_token_id=9)])


def test_passages_are_english_and_each_stands_once():
    passages = english_passages()
    assert len(passages) > 200 and len(set(passages)) == len(passages)
    assert all(len(p.split()) >= 24 and "  " not in p and ">>>" not in p for p in passages)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_corruptions_change_the_text_and_leave_the_original(count):
    words = "the quick brown fox jumps over the lazy dog".split()
    original = list(words)
    seen = {tuple(corrupt(words, count, random.Random(seed))) for seed in range(50)}
    assert words == original
    assert seen == {tuple(original)} if count == 0 else tuple(original) not in seen or count > 1
    assert count == 0 or len(seen) > 20


def test_text_pairs_carry_the_length_shortcut():
    config = TextTaskConfig(train_pairs=60, test_pairs=40, prompts=2, samples=4, shortcut_share=0.7)
    task = make_text_task(config, 0, lambda texts: [[len(w) for w in t.split()] for t in texts], 100, 0)
    longer = (task.test.chosen.lengths > task.test.rejected.lengths).double().mean().item()
    assert longer == pytest.approx(0.7, abs=0.03)
    shifted = (task.shifted.chosen.lengths > task.shifted.rejected.lengths).double().mean().item()
    assert shifted == pytest.approx(0.3, abs=0.03)
    assert (task.policy.gold <= 0).all() and task.policy.gold.shape == (2, 4)
    assert len(task.unlabelled(9, 1)) == 9 and torch.equal(task.unlabelled(9, 1).tokens, task.unlabelled(9, 1).tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SyntheticTaskConfig(train_pairs=0), "`train_pairs` must be at least 1, got 0"),
        (lambda: SyntheticTaskConfig(label_noise=1.0), r"`label_noise` must be in \[0, 1\)"),
        (lambda: SyntheticTaskConfig(min_content=9, max_content=3), "`max_content` must be at least min_content=9"),
        (lambda: SyntheticTaskConfig(instruction_regimes=5, topics=8), "`instruction_regimes` must be 1 to 4"),
        (lambda: TextTaskConfig(shorter_by=0), "`shorter_by` must be strictly between 0 and 1"),
        (lambda: TextTaskConfig(min_words=2), "6 <= min_words <= max_words"),
    ],
)
def test_bad_values_are_clear_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
