"""The whole way under TRL in families that differ in structure: one step moves what it should, and alpha, and merges.

One optimizer step each: SGD, so that a parameter moves exactly if it gets a gradient.
"""

import pytest
import torch
from tiny_models import padded_batch, tiny_model
from transformers import AutoModelForSequenceClassification
from trl_inputs import make_dataset, make_moe, make_tokenizer, settings

import ummrm
from ummrm import UmmMergeTrainer, UmmRewardTrainer

# mask beside the call and FFN in two modules; mask beside the call; transposed; no module, past the backbone; fused
# halves; gated with norms around it
MODEL_TYPES = ["deberta-v2", "falcon", "gpt2", "opt", "modernbert", "gemma2"]
# a residual in the FFN's module; a functional dropout behind the site; convolutions beside the attention
MODEL_TYPES += [pytest.param(model_type, marks=pytest.mark.full) for model_type in ("bloom", "biogpt", "convbert")]
# A key's bias shifts all scores of a query alike, which a softmax does not see: its gradient is rounding, or zero.
WITHOUT_GRADIENT = ("key_proj.bias", "k_proj.bias", "self.key.bias")


def train(trainer, folder, model, **overrides):
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "gradient_checkpointing": True, **overrides}
    options["center_rewards_coefficient"] = 0.1  # pairs alone never move the bias of a head
    training = trainer(
        model, settings(folder, **options), train_dataset=make_dataset(4), processing_class=make_tokenizer()
    )
    before = {n: p.clone() for n, p in training.model.named_parameters()}
    training.train()
    moved = {n for n, p in training.model.named_parameters() if not torch.equal(p, before[n])}
    return training, moved


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_one_step_of_each_phase_then_the_export(model_type, tmp_path):
    trained, moved = train(UmmRewardTrainer, tmp_path, make_moe(model_type=model_type))
    still = {n for n, _ in trained.model.named_parameters()} - moved
    assert {n for n in still if not n.endswith(WITHOUT_GRADIENT)} == set()
    (entry,) = [e for e in trained.state.log_history if "loss" in e]
    assert entry["aux_loss"] > 0 and "z_loss/layer_1" in entry
    assert entry["loss"] == pytest.approx(entry["preference_loss"] + entry["aux_loss"], rel=1e-5)

    merging, moved = train(UmmMergeTrainer, tmp_path, trained.model, learning_rate=100.0)
    assert moved == {n for n, _ in merging.model.named_parameters() if n.endswith("alpha")} and len(moved) == 2
    normalization = merging.normalize_rewards()
    merging.save_merged(str(tmp_path / "merged"))
    loaded, batch = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), padded_batch()
    assert type(loaded) is type(tiny_model(model_type))
    with torch.no_grad():
        expected = merging.model.eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        normalized = ummrm.score(loaded, batch, normalized=True)
        torch.testing.assert_close(normalized, normalization(expected.flatten()), rtol=1e-3, atol=1e-4)
        if ummrm.fold_reward_normalization(loaded) is None:
            torch.testing.assert_close(loaded(**batch).logits.flatten(), normalized, rtol=1e-3, atol=1e-4)
