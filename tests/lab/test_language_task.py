"""The language task: drawn from its seed alone, with the structure, the plant and the edits that it says."""

import dataclasses

import pytest
import torch

from lab.backbone.regimes import exchanged, side_by_side
from lab.backbone.training import shortcut_weights
from lab.tasks.language import LanguageReward, LanguageTaskConfig, make_language_task, with_filler
from lab.tasks.synthetic import END, FILLER

CONFIG = LanguageTaskConfig(train_pairs=400, test_pairs=100, prompts=4, samples=64, corpus=100, unlabelled=70)


@pytest.fixture(scope="module")
def made():
    return make_language_task(dataclasses.replace(CONFIG, shortcut_share=0.7), 5)


def filler(sequences):
    return (sequences.tokens == FILLER).sum(1)


def test_a_seed_says_everything(made):
    again = make_language_task(dataclasses.replace(CONFIG, shortcut_share=0.7), 5)
    other = make_language_task(dataclasses.replace(CONFIG, shortcut_share=0.7), 6)
    assert torch.equal(made.task.train.chosen.tokens, again.task.train.chosen.tokens)
    assert torch.equal(made.unlabelled.tokens, again.unlabelled.tokens)
    assert not torch.equal(made.task.train.chosen.tokens, other.task.train.chosen.tokens)
    assert len(made.corpus) == 100 and len(made.unlabelled) == 70


def test_gold_of_an_answers_tokens_is_the_gold_it_was_made_with(made):
    task = made.task
    torch.testing.assert_close(task.gold(task.policy.sequences), task.policy.gold.flatten())
    right = task.gold(task.test.chosen) > task.gold(task.test.rejected)
    assert right.all(), "held-out labels have no noise"
    wrong = task.gold(task.train.chosen) < task.gold(task.train.rejected)
    assert wrong.double().mean().item() == pytest.approx(0.2)


def test_the_plant_and_the_policys_tail_are_as_configured(made):
    task = made.task
    more = filler(task.test.chosen) > filler(task.test.rejected)
    assert more.double().mean().item() == pytest.approx(0.7)
    assert (filler(task.shifted.chosen) > filler(task.shifted.rejected)).double().mean().item() == pytest.approx(0.3)
    assert filler(task.train.chosen).max() <= 3 < filler(task.policy.sequences).max() <= CONFIG.policy_filler_cap


def test_answers_follow_a_chain_of_classes_and_uniform_ones_do_not():
    """A pair of neighbouring classes is as likely as the chain says."""
    reward = LanguageReward(CONFIG, torch.Generator().manual_seed(0))
    topic = torch.zeros(4000, dtype=torch.long)
    classes = reward.content(topic, torch.Generator().manual_seed(1)) // 4
    pairs = torch.stack([classes[:, :-1].flatten(), classes[:, 1:].flatten()])
    counts = torch.zeros(8, 8).index_put_((pairs[0], pairs[1]), torch.ones(pairs.shape[1]), accumulate=True)
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), reward.chain[0].float(), atol=0.03, rtol=0)
    values = reward.values.view(4, 8, 4)
    assert values.mean(2).var() > values.var(2).mean(), "classes say more than tokens within them"


def test_filler_is_exchanged_and_nothing_else(made):
    train = made.task.train
    edited = exchanged(train, 1)
    assert torch.equal(filler(edited.chosen), filler(train.rejected))
    assert torch.equal(filler(edited.rejected), filler(train.chosen))
    for before, after in zip(train.chosen.tokens, edited.chosen.tokens, strict=True):
        assert before[(before != FILLER) & (before != 0)].tolist() == after[(after != FILLER) & (after != 0)].tolist()
    assert bool((edited.chosen.tokens.gather(1, edited.chosen.lengths[:, None] - 1) == END).all())
    with pytest.raises(ValueError, match="must fit the width 15, got answers of"):
        with_filler(train.chosen, torch.full((400,), 12), torch.Generator().manual_seed(0))


def test_weights_leave_the_shortcut_without_a_say(made):
    train, pairs = made.task.train, None
    from lab.backbone.data import Pairs

    pairs = Pairs(side_by_side([train.chosen], 15), side_by_side([train.rejected], 15))
    weights = shortcut_weights(pairs)[0].double()
    lead = (pairs.chosen.shortcut - pairs.rejected.shortcut)[0]
    assert (lead > 0).double().mean() > 0.55, "the plant shows through the noise"
    assert weights[lead > 0].sum().item() == pytest.approx(weights[lead < 0].sum().item(), rel=1e-4)
    assert weights.mean().item() == pytest.approx(1, rel=1e-5) and (weights > 0).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("classes", 5, "`classes` must divide content_tokens=32, got 5"), ("structure", 2, r"in \[0, 1\], got 2")],
)
def test_impossible_languages_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        LanguageTaskConfig(**{field: value})
