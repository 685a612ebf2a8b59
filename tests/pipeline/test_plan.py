"""What a recipe is said to take: its models' parameters, FLOPs as torch counts them, the steps of the run itself."""

import pytest
import torch
from pipeline_inputs import recipe_of, write_backbone, write_pairs
from tiny_models import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

import ummrm
from ummrm import UpcycleConfig
from ummrm.cli import app
from ummrm.pipeline import Recipe, plan_recipe, run_recipe
from ummrm.pipeline.plan import shapes

CONFIGS = [
    UpcycleConfig(assignment="sequence", experts_in="all"),
    UpcycleConfig(assignment="sequence", num_experts=3),
    UpcycleConfig(num_experts=4, num_experts_per_tok=2),
]


# and families that are found by structure: gated, fused, plain
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "smollm3", "glm", "arcee"])
@pytest.mark.parametrize("config", CONFIGS, ids=["all", "ffn", "token"])
def test_shapes_are_those_of_real_models(family, config):
    model = AutoModelForSequenceClassification.from_config(tiny_config(family))
    dense, mixture = shapes(model.config, config)
    assert dense.parameters == sum(p.numel() for p in model.parameters())
    moe = ummrm.upcycle(model, config, copy=True)
    assert mixture.parameters == sum(p.numel() for p in moe.parameters())


def test_flops_are_those_that_torch_counts():
    model = tiny_model("llama").eval()
    model.set_attn_implementation("eager")  # whose products it sees
    dense, _ = shapes(model.config, CONFIGS[0])
    ids = torch.randint(6, model.config.vocab_size, (3, 8))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    assert counter.get_total_flops() == pytest.approx(dense.flops(8) * ids.numel(), rel=0.02)


def test_a_plan_has_the_steps_and_tokens_of_the_run_and_writes_nothing(tmp_path):
    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl")
    recipe = Recipe.from_dict(recipe_of(tmp_path, dense=True, train={"num_train_epochs": 2}))
    said = []
    plans = {one.stage: one for one in plan_recipe(recipe, log=said.append)}
    assert not (tmp_path / "out").exists() and any("40 pairs of 40 rows" in line for line in said)
    found = run_recipe(recipe, log=lambda _: None).stages
    assert {name: one.steps for name, one in plans.items()} == {
        name: found[name]["steps"] for name in ("dense", "train", "distill")
    }
    assert plans["train"].tokens == 2 * plans["dense"].tokens
    assert plans["train"].memory > plans["dense"].memory > 16 * plans["dense"].parameters


def test_the_command_shows_a_plan_and_says_mistakes_in_a_line(tmp_path):
    from typer.testing import CliRunner

    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tmp_path}/backbone\ndata: {tmp_path}/pairs.jsonl\noutput: {tmp_path}/out\n")
    result = CliRunner().invoke(app, ["run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["stage", "train", "distill"]
    path.write_text(f"model: {tmp_path}/backbone\n")
    result = CliRunner().invoke(app, ["run", str(path)])
    assert "a recipe must have data, output" in str(result.exception)
