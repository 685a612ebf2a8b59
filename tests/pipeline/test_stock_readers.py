"""A run's reward model in the hands of others: stock transformers 5 and 4.57 without ummrm, and TRL's RLOO and GRPO."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkout import ROOT, SUPPORT
from pipeline_inputs import recipe_of, write_backbone, write_pairs
from policy_trainers import make_policy_trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ummrm.pipeline import Recipe, run_recipe

VERSIONS = {"5.": sys.executable, "4.57.": ROOT / ".venvs/transformers4-57/bin/python"}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run; `backbone` beside it is what it started from."""
    root = tmp_path_factory.mktemp("served")
    write_backbone(root / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(root / "backbone")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})  # as Qwen's has some
    tokenizer.save_pretrained(root / "backbone")
    write_pairs(root / "pairs.jsonl")
    made = recipe_of(root, train={"max_steps": 8}, distill={"max_steps": 4})
    run_recipe(Recipe.from_dict(made), log=lambda _: None)
    return root / "out"


def rewards_of(folder, texts):
    """By the model itself, text by text."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


@pytest.mark.parametrize("version", VERSIONS)
def test_stock_transformers_give_the_same_rewards_without_ummrm(version, finished, tmp_path):
    assert os.path.exists(VERSIONS[version]), "run `make test-full`, which makes the environments of this tier"
    texts = ["w1 w2 w3 <eos>", "<user> w4", "w5 w6 w7 w8 w9 w10 w11 <eos>", "w12 w13 <eos>"]
    logits = rewards_of(finished / "merged", texts)
    assert max(logits) - min(logits) > 0.01, "rewards that are nearly equal would prove nothing"
    inputs = sorted(AutoTokenizer.from_pretrained(finished / "merged")("w1"))
    given = {name: str(finished / name) for name in ("merged", "mixture")}
    given |= {"texts": texts, "logits": logits, "inputs": inputs}
    (tmp_path / "expected.json").write_text(json.dumps(given))
    command = [VERSIONS[version], "-P", SUPPORT / "stock_child.py", version, tmp_path / "expected.json"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"same scores {version}" in done.stdout


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "conversation"])
@pytest.mark.parametrize(("trainer", "config"), [(RLOOTrainer, RLOOConfig), (GRPOTrainer, GRPOConfig)])
def test_policies_are_rewarded_by_the_path_of_a_runs_model(trainer, config, conversational, finished, tmp_path):
    merged, policy = str(finished / "merged"), str(finished.parent / "backbone")
    training = make_policy_trainer(trainer, config, policy, tmp_path, merged, conversational)
    seen, model = [], training.reward_funcs[0]
    assert type(model).__module__.startswith("transformers.")
    model.register_forward_hook(lambda m, args, kwargs, out: seen.append((kwargs, out.logits)), with_kwargs=True)
    training.train()
    (inputs, logits), *_ = seen
    with torch.no_grad():
        reference = AutoModelForSequenceClassification.from_pretrained(merged)
        expected = reference(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    (entry,) = [e for e in training.state.log_history if "reward" in e]
    assert training.state.global_step == 1
    assert entry["reward"] == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-4)
