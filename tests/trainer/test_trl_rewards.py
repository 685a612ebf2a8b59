"""Upcycled and merged folders as reward models in TRL: `RewardTrainer(model=path)`, `reward_funcs=[path]`."""

import pytest
import torch
from ensembles import mixture
from policy_trainers import make_policy_trainer
from tiny_models import tiny_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RewardTrainer, RLOOConfig, RLOOTrainer
from trl_inputs import SEQUENCE, make_dataset, make_moe, make_pairs, make_tokenizer, settings

import ummrm

KINDS = ("moe", "merging", "merged")
REWARDS = (*KINDS, pytest.param("sequence", marks=pytest.mark.full))  # whose reward is its members' mean


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, with the tokenizer, as users have them."""
    root = tmp_path_factory.mktemp("rewards")
    models = {"moe": make_moe(), "merging": ummrm.prepare_merge(make_moe())}
    models["merged"] = ummrm.merge(models["merging"])
    models["sequence"] = make_moe(config=SEQUENCE)
    models["policy"] = tiny_model("llama", "ForCausalLM")
    for kind, model in models.items():
        model.save_pretrained(root / kind)
        make_tokenizer().save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in models}


@pytest.mark.parametrize("kind", KINDS)
def test_reward_trainer_takes_the_path(kind, folders, tmp_path):
    trainer = RewardTrainer(folders[kind], settings(tmp_path), train_dataset=make_dataset(4, kind="conversational"))
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert type(trainer.model).__name__.startswith("Llama" if kind == "merged" else "Umm")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(losses) == 4 and all(0 < loss < 5 for loss in losses)


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "conversation"])
@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize(("trainer", "config"), [(RLOOTrainer, RLOOConfig), (GRPOTrainer, GRPOConfig)])
def test_policies_are_rewarded_by_the_path(trainer, config, kind, conversational, folders, tmp_path):
    training = make_policy_trainer(trainer, config, folders["policy"], tmp_path, folders[kind], conversational)
    seen = []
    model = training.reward_funcs[0]
    assert isinstance(model, torch.nn.Module)
    model.register_forward_hook(lambda m, args, kwargs, out: seen.append((kwargs, out.logits)), with_kwargs=True)
    training.train()
    (inputs, logits), *_ = seen
    reference = AutoModelForSequenceClassification.from_pretrained(folders[kind])
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    assert inputs["input_ids"].max() < len(tokenizer)
    with torch.no_grad():
        expected = reference(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    (entry,) = [e for e in training.state.log_history if "reward" in e]
    assert entry["reward"] == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-4) and entry["reward_std"] > 0


@pytest.mark.parametrize(("trainer", "config"), [(RLOOTrainer, RLOOConfig), (GRPOTrainer, GRPOConfig)])
def test_policies_are_rewarded_by_an_ensemble(trainer, config, folders, tmp_path):
    reference = [row["prompt"] + " " + row["chosen"] for row in make_pairs(8, 1)]
    reward = ummrm.ensemble_reward(mixture(), make_tokenizer(), combine="worst", reference=reference)
    given = []
    own = reward.member_scores
    reward.member_scores = lambda texts: (given.append(own(texts)), given[-1])[1]
    training = make_policy_trainer(trainer, config, folders["policy"], tmp_path, reward, conversational=True)
    training.train()
    (entry,) = [e for e in training.state.log_history if "reward" in e]
    scales = [(n.mean, n.std) for n in reward.normalization]
    rewards = ummrm.combine_scores(given[0], "worst", scales=scales)
    assert len(rewards) == 4 and entry["rewards/ensemble_worst/mean"] == pytest.approx(rewards.mean().item(), rel=1e-4)
