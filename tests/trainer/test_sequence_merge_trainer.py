"""UmmMergeTrainer by sequence: alpha of every part, lambda of shared experts alone, resumed, saved as a stock model."""

import pytest
import torch
from test_merge_trainer import entries, make_trainer
from tiny_models import padded_batch
from transformers import AutoModelForSequenceClassification
from trl_inputs import SEQUENCE, make_moe

import ummrm
from ummrm import MergeConfig, UpcycleConfig
from ummrm.nn.merging_linear import merging_parts

SHARED = UpcycleConfig(assignment="sequence", num_shared_experts=1, fixed_shared_weight=0.25)
ALL = UpcycleConfig(assignment="sequence", experts_in="all", layers=(1,))
CASES = {
    "ffn": (SEQUENCE, None, 2),
    "linear layers and head": (ALL, MergeConfig(alpha_per="projection"), 6),
    "shared, lambda learned": (SHARED, MergeConfig(learn_shared_share=True), 3),
}


@pytest.mark.parametrize("case", CASES)
def test_alpha_moves_and_nothing_else_and_the_folder_is_stock(case, tmp_path):
    config, merge_config, count = CASES[case]
    trainer = make_trainer(tmp_path, make_moe(config=config), merge_config=merge_config, weight_decay=0.5)
    start = 0.25 if config is SHARED else 0.0
    assert [m.shared_share() for m in trainer.model.modules() if hasattr(m, "shared_share")] == [start]
    learned = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(learned) == count
    before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in learned), name
    entry = entries(trainer)[-1]
    assert (entry["lambda"] == start) == (config is not SHARED) and 0 < entry["merge_entropy"] < 1
    if config is ALL:
        label = "layer_1/self_attn.q_proj"
        alpha = trainer.model.model.layers[1].self_attn.q_proj.alpha
        assert [entry[f"alpha/{label}/expert_{e}"] for e in range(4)] == pytest.approx(alpha.tolist(), rel=1e-5)
        assert "alpha/score/expert_3" in entry and "alpha/layer_1/mlp/gate/expert_0" in entry
        assert f"merge_entropy/{label}" in entry

    trainer.save_merged(str(tmp_path / "merged"))
    loaded, batch = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), padded_batch()
    assert type(loaded).__module__.startswith("transformers.")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "| assignment | sequence |" in text and "folded back with learned weights" in text
    assert ("the linear layers and the reward head of" in text) == (config is ALL) and all(
        f"| {n} " in text for n in merging_parts(trainer.model)
    )


@pytest.mark.parametrize(
    "case", ["shared, lambda learned", pytest.param("linear layers and head", marks=pytest.mark.full)]
)
def test_resuming_equals_an_uninterrupted_run(case, tmp_path):
    config, merge_config, _ = CASES[case]
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "merge_config": merge_config}
    whole = make_trainer(tmp_path / "a", make_moe(config=config), **saving)
    whole.train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    again = make_trainer(tmp_path / "b", checkpoint, **saving)  # in its merge phase already, with the same settings
    again.train(resume_from_checkpoint=checkpoint)
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for key in ("loss", "lambda", "merge_entropy"):
        assert [e[key] for e in entries(again)] == [e[key] for e in entries(whole)], key


def test_what_was_not_learned_is_not_called_so(tmp_path):
    ummrm.save_pretrained(ummrm.merge(make_moe(config=SHARED)), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "folded back with equal weights" in text and "learned weights" not in text
    assert "| model.layers.1.mlp | 0.2500 | 0.1875 | 0.1875 | 0.1875 | 0.1875 |" in text


def test_settings_are_those_of_the_model_where_they_say_the_same(tmp_path):
    """A lambda that is not given is the mixture's own; by token too."""
    for config in (SHARED, None):
        moe = ummrm.prepare_merge(make_moe(config=config) if config else make_moe())
        make_trainer(tmp_path, moe, merge_config=MergeConfig())
        make_trainer(tmp_path, moe, merge_config=MergeConfig(shared_share=0.25 if config else 0.5))
        with pytest.raises(ValueError, match="`merge_config` must be that of the model"):
            make_trainer(tmp_path, moe, merge_config=MergeConfig(shared_share=0.75))


@pytest.mark.parametrize(
    ("config", "merge_config", "message"),
    [
        (
            SEQUENCE,
            MergeConfig(alpha_init="routing"),
            '`alpha_init` must be "uniform" .*by sequence, which has no rout',
        ),
        (SEQUENCE, MergeConfig(shared_share=0.5), "`shared_share` must be 0 .*without shared experts, got 0.5"),
        (ALL, MergeConfig(learn_shared_share=True), "`learn_shared_share` must be False .*without shared experts"),
    ],
)
def test_what_has_no_meaning_by_sequence_is_refused(config, merge_config, message, tmp_path):
    moe, batch = make_moe(config=config), padded_batch()
    expected = moe(**batch).logits
    for prepare in (
        lambda: make_trainer(tmp_path, moe, merge_config=merge_config),
        lambda: ummrm.prepare_merge(moe, merge_config),
    ):
        with pytest.raises(ValueError, match=message):
            prepare()
    assert moe.config.umm_phase == "mixture" and torch.equal(moe.eval()(**batch).logits, expected)
