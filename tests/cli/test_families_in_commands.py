"""Every command on folders of families with no row in the table, and of families that transformers can't checkpoint.

What the commands do is tested on families of the table; here, that they need no row, and no checkpointing.
"""

import json

import pytest
import torch
from tiny_models import in_tier, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl_inputs import make_pairs, make_tokenizer

from ummrm.hf.families import FAMILIES

GROUPED = {"num_key_value_heads": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, **GROUPED}
# gated; gate and up fused; plain with relu2; an encoder; plain under other names; norms behind the FFN; sliding windows
FOUND = {
    "smollm3": GROUPED,
    "glm4": {"head_dim": 8, **GROUPED},
    "nemotron": GROUPED,
    "distilbert": {"dim": 24, "hidden_dim": 44, "n_layers": 2, "n_heads": 4, "dropout": 0.0},
    "gptj": {"rotary_dim": 4, "resid_pdrop": 0.0},
    "olmo3": SLIDING,
    "ministral": {"head_dim": 8, **SLIDING},
}
# transformers can't checkpoint their activations, which TRL's default asks for
UNCHECKPOINTED = ("mpnet", "openai-gpt", "ctrl")
OPTIONS = {
    "sequence": ("--assignment", "sequence", "-e", 2, "--experts-in", "linear"),
    "token": ("-e", 3, "-k", 2),
}


def write_inputs(folder, model_type):
    torch.manual_seed(0)
    config = tiny_config(model_type, **FOUND.get(model_type, {}))
    mapping = AutoModelForSequenceClassification._model_mapping
    auto = AutoModelForSequenceClassification if type(config) in mapping else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder / "dense")
    make_tokenizer().save_pretrained(folder / "dense")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_pairs(12)))
    (folder / "texts.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w4"}\n')


@pytest.fixture
def done(command):
    def run(*arguments):
        result = command(*arguments)
        assert result.status == 0, result.out + result.err
        return result

    return run


def rewards(done, folder):
    lines = done("score", folder, "texts.jsonl").out.splitlines()
    return torch.tensor([json.loads(line)["reward"] for line in lines])


STAGES = [
    in_tier(model_type, assignment, fast=(model_type, assignment) == ("smollm3", "sequence"))
    for model_type in (*FOUND, *UNCHECKPOINTED)
    for assignment in OPTIONS
]


@pytest.mark.parametrize(("model_type", "assignment"), STAGES)
def test_the_stages_one_by_one(model_type, assignment, tmp_path, monkeypatch, done):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, model_type)
    done("upcycle", "dense", "moe", *OPTIONS[assignment])
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert config["model_type"] == f"umm_{model_type}" and ("umm_family" in config) == (model_type not in FAMILIES)
    torch.testing.assert_close(rewards(done, "moe"), rewards(done, "dense"), rtol=1e-4, atol=1e-5)
    rate = ("--learning-rate", 0.01)
    done("train", "moe", "pairs.jsonl", "trained", "--max-steps", 2, "--per-device-train-batch-size", 4, *rate)
    assert not torch.allclose(rewards(done, "trained"), rewards(done, "moe"), rtol=1e-3, atol=1e-3)
    layers = config["umm_family"]["layers"] if "umm_family" in config else FAMILIES[model_type].layers
    assert f"{layers}.0." in done("inspect", "trained").out
    assert json.loads(done("info", "trained", "--json").out)["assignment"] == assignment
    done("merge", "trained", "merged")
    merged = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    dense = AutoModelForSequenceClassification.from_pretrained("dense")
    assert type(merged) is type(dense) and merged.state_dict().keys() == dense.state_dict().keys()
    ids = [make_tokenizer()(text + "<eos>", return_tensors="pt") for text in ("w1 w2 w3", "w4")]
    with torch.no_grad():
        plain = torch.cat([merged(input_ids=one["input_ids"]).logits for one in ids]).flatten()
    torch.testing.assert_close(rewards(done, "merged"), plain, rtol=1e-4, atol=1e-5)
    done("evaluate", "trained", "merged", "--data", "pairs.jsonl", "--output", "report", "--probes", "none")
    report = json.loads((tmp_path / "report/evaluation.json").read_text())
    assert list(report["models"]) == ["trained", "merged"] and report["pairs"] == 12


@pytest.mark.full
@pytest.mark.parametrize("model_type", [*FOUND, *UNCHECKPOINTED, "bloom", "big_bird"])
def test_a_run_by_folder(model_type, tmp_path, monkeypatch, done):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, model_type)
    recipe = {
        "model": "dense",
        "data": {"train": "pairs.jsonl", "held_out_share": 0.25},
        "output": "out",
        "training": {"per_device_train_batch_size": 4, "max_steps": 1},
        "dense": True,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    said = done("run", "recipe.json", "--dry-run").out
    assert "parameters" in said and not (tmp_path / "out").exists()
    done("run", "recipe.json")
    merged = AutoModelForSequenceClassification.from_pretrained("out/merged")
    assert type(merged) is type(AutoModelForSequenceClassification.from_pretrained("dense"))
    measured = json.loads((tmp_path / "out/metrics.json").read_text())["models"]
    assert {"merged", "dense"} <= set(measured)


def test_what_can_not_be_checkpointed_trains_without_and_says_so_where_it_is_asked_for(
    tmp_path, monkeypatch, done, refused
):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, "mpnet")
    (tmp_path / "asking.yaml").write_text("gradient_checkpointing: true\n")
    line = refused("train", "dense", "pairs.jsonl", "trained", "--config", "asking.yaml")
    assert "gradient_checkpointing must be false or left out for this model" in line
    done("train", "dense", "pairs.jsonl", "trained", "--max-steps", 1)
    assert (tmp_path / "trained/config.json").exists()


@pytest.mark.parametrize("model_type", ["lfm2", "granite"])
def test_a_family_without_reward_models_is_refused_before_any_work(model_type, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, model_type)
    (tmp_path / "recipe.yaml").write_text("{model: dense, data: pairs.jsonl, output: out}")
    for words in (
        ("run", "recipe.yaml"),
        ("run", "recipe.yaml", "--dry-run"),
        ("train", "dense", "pairs.jsonl", "out"),
    ):
        assert f"transformers has none for model_type '{model_type}'" in refused(*words)
