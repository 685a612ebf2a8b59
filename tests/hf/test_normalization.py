"""Reward normalisation: measured, kept through save, upcycle, merge and export, and folded into the head."""

import pytest
import torch
from tiny_models import padded_batch, perturb_experts, tiny_model
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import RewardNormalization, UpcycleConfig
from ummrm.hf.normalization import reward_normalization

CONFIG = UpcycleConfig(num_experts=3, num_experts_per_tok=2)


def batches():
    return [padded_batch(lengths=lengths) for lengths in ((9, 4, 2), (7, 3), (5, 8, 6, 1))]


def test_measured_rewards_are_those_of_all_batches_and_normalise_them():
    model = tiny_model("llama").train()
    data = batches()
    normalization = ummrm.measure_rewards(model, data)
    assert model.training and reward_normalization(model) is None
    model.eval()
    raw = torch.cat([model(**b).logits.flatten() for b in data]).double()
    assert normalization.mean == pytest.approx(raw.mean().item(), abs=1e-6)
    assert normalization.std == pytest.approx(raw.std(correction=0).item(), rel=1e-5)
    ummrm.set_reward_normalization(model, normalization)
    scores = torch.cat([ummrm.score(model, b, normalized=True) for b in data])
    assert scores.mean().abs() < 1e-5 and abs(scores.std(correction=0) - 1) < 1e-4
    assert torch.equal(ummrm.score(model, data[0]), model(**data[0]).logits.flatten())


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_it_survives_upcycling_saving_merging_and_export(model_type, tmp_path):
    dense = tiny_model(model_type)
    kept = RewardNormalization(0.25, 1.5)
    ummrm.set_reward_normalization(dense, kept)
    moe = perturb_experts(ummrm.upcycle(dense, CONFIG))
    moe.save_pretrained(tmp_path / "moe")
    moe = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    assert reward_normalization(moe) == kept
    merged = ummrm.merge(ummrm.prepare_merge(moe))
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert type(loaded) is type(merged) and loaded.config.reward_normalization == {"mean": 0.25, "std": 1.5}
    batch = padded_batch()
    expected = (merged(**batch).logits.flatten() - 0.25) / 1.5
    torch.testing.assert_close(ummrm.score(loaded, batch, normalized=True), expected, rtol=1e-5, atol=1e-6)


WITH_BIAS, WITHOUT = ("bert", "roberta", "modernbert"), ("llama", "gpt_neox")


@pytest.mark.parametrize("model_type", WITH_BIAS + WITHOUT)
def test_folding_is_exact_up_to_what_the_head_can_hold(model_type, tmp_path):
    model, batch = tiny_model(model_type), padded_batch()
    ummrm.set_reward_normalization(model, RewardNormalization(-0.7, 2.5))
    expected = ummrm.score(model, batch, normalized=True)
    left = ummrm.fold_reward_normalization(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    raw = loaded(**batch).logits.flatten()
    if model_type in WITH_BIAS:
        assert left is None and reward_normalization(loaded) is None
        torch.testing.assert_close(raw, expected, rtol=1e-5, atol=1e-6)
    else:
        assert left == reward_normalization(loaded) == RewardNormalization(-0.7 / 2.5, 1.0)
        torch.testing.assert_close(raw - raw[0], expected - expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ummrm.score(loaded, batch, normalized=True), expected, rtol=1e-5, atol=1e-6)


def test_a_centred_normalisation_folds_into_any_linear_head():
    model, batch = tiny_model("llama"), padded_batch()
    ummrm.set_reward_normalization(model, RewardNormalization(0.0, 4.0))
    expected = model(**batch).logits / 4
    assert ummrm.fold_reward_normalization(model) is None
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf")), ("0", 1)])
def test_numbers_that_normalise_nothing_are_refused(mean, std):
    with pytest.raises(ValueError, match="RewardNormalization: `(mean|std)` must be .*measure_rewards"):
        RewardNormalization(mean, std)


def test_misuse_is_a_clear_error():
    model, batch = tiny_model("llama"), padded_batch()
    with pytest.raises(ValueError, match="`normalized` must be False .*measure_rewards"):
        ummrm.score(model, batch, normalized=True)
    with pytest.raises(ValueError, match="must have a reward normalisation to fold"):
        ummrm.fold_reward_normalization(model)
    with pytest.raises(ValueError, match="at least two rewards .* got 0"):
        ummrm.measure_rewards(model, [])
    with pytest.raises(ValueError, match=r"logits \[N, 1\], got \[3, 2\]; load it with num_labels=1"):
        ummrm.score(tiny_model("llama", num_labels=2), batch)
    model.config.reward_normalization = {"mean": 1.0}
    with pytest.raises(ValueError, match="config.reward_normalization must be"):
        reward_normalization(model)
    model.config.reward_normalization = {"mean": 1.0, "std": 2.0}
    model.score = torch.nn.Sequential(torch.nn.Linear(24, 1), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="must end in one nn.Linear .* has 2"):
        ummrm.fold_reward_normalization(model)
