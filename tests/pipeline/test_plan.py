"""What a recipe is said to take: what its run's optimizers hold, FLOPs as torch counts them, the steps of the run."""

import collections

import pytest
import torch
from pipeline_inputs import recipe_of, write_backbone, write_pairs
from tiny_models import tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, TrainerCallback

import ummrm
from ummrm import UpcycleConfig
from ummrm.cli import app
from ummrm.pipeline import Recipe, RecipeError, plan_recipe, run, run_recipe, stages
from ummrm.pipeline.adapters import adapted, lora_config
from ummrm.pipeline.plan import shapes
from ummrm.pipeline.start import freeze

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
    found = shapes(model.config, config)
    dense, mixture = found["dense"], found["train"]
    assert dense.parameters == sum(p.numel() for p in model.parameters())
    moe = ummrm.upcycle(model, config, copy=True)
    assert mixture.parameters == sum(p.numel() for p in moe.parameters())


def test_flops_are_those_that_torch_counts():
    model = tiny_model("llama").eval()
    model.set_attn_implementation("eager")  # whose products it sees
    dense = shapes(model.config, CONFIGS[0])["dense"]
    ids = torch.randint(6, model.config.vocab_size, (3, 8))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    assert counter.get_total_flops() == pytest.approx(dense.flops(8) * ids.numel(), rel=0.02)


@pytest.mark.parametrize(
    "trained",
    [
        {},
        {"frozen": ("model.layers.1.mlp", "score")},
        {"lora": {"r": 4}},
        {"lora": {"r": 4, "target_modules": ["q_proj"]}},
    ],
    ids=["all", "frozen", "lora", "lora on q"],
)
def test_flops_of_a_step_are_those_that_torch_counts(trained):
    model = tiny_model("llama", hidden_size=64, intermediate_size=160, attn_implementation="eager")
    shape = shapes(model.config, CONFIGS[2], **trained)["dense"]
    freeze(model, trained.get("frozen", ("none",)))
    if "lora" in trained:
        model = adapted(model, lora_config(trained["lora"], model))
        model.enable_input_require_grads()  # as a trainer does; else the backward ends above the first layer's inputs
    ids = torch.randint(6, model.config.vocab_size, (3, 8))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(shape.training_flops(8, False) * ids.numel(), rel=0.03)
    assert shape.training_flops(8, True) - shape.training_flops(8, False) == shape.flops(8)


def test_a_token_passes_the_experts_that_it_is_given():
    config = tiny_model("llama").config
    for given, passed in ((CONFIGS[0], 1), (CONFIGS[1], 1), (CONFIGS[2], 3)):
        found = shapes(config, given)
        ffn = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
        router = 0 if given.by_sequence else given.num_experts * config.hidden_size * config.num_hidden_layers
        assert found["train"].active == found["dense"].active + (passed - 1) * ffn + router
        merged = found["merge"]
        assert merged.active == found["dense"].active == found["dense"].learned
        assert merged.learned == (merged.active if given is CONFIGS[0] else ffn)


def test_adapters_that_peft_refuses_are_said():
    with pytest.raises(RecipeError, match="`lora`: peft refuses .* UpcycledLinear"):
        shapes(tiny_model("llama").config, CONFIGS[0], lora={"target_modules": ["q_proj"]})


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=["all", "token"])
def test_adapters_on_experts_keep_the_sum_of_both_for_backward(config):
    model = ummrm.upcycle(tiny_model("llama"), config)
    shape = shapes(tiny_model("llama").config, config, lora={"r": 2})["train"]
    model = adapted(model.train(), lora_config({"r": 2}, model))
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        if tensor.dim() >= 3 and tensor.untyped_storage().data_ptr() not in stored:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    groups = {"groups": torch.tensor([0, 1])} if config.by_sequence else {}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=torch.tensor([[3], [4]]), **groups).logits.sum()
    sums = [t for t in kept.values() if t.shape[0] in (1, config.num_experts) and t.numel() > 200]
    assert sum(t.untyped_storage().nbytes() // 4 for t in sums) == pytest.approx(shape.adapted, rel=0.01), loss


def test_a_plan_has_the_steps_and_tokens_of_the_run_and_writes_nothing(tmp_path):
    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl")
    recipe = Recipe.from_dict(recipe_of(tmp_path, dense=True, train={"num_train_epochs": 2}))
    said = []
    plans = {one.stage: one for one in plan_recipe(recipe, log=said.append)}
    assert plan_recipe(recipe, log=said.append, devices=2)[0].steps == plans["dense"].steps / 2
    assert not (tmp_path / "out").exists() and any("40 pairs of 40 rows" in line for line in said)
    found = run_recipe(recipe, log=lambda _: None).stages
    assert {name: one.steps for name, one in plans.items()} == {
        name: found[name]["steps"] for name in ("dense", "train", "distill")
    }
    assert plans["train"].tokens == 2 * plans["dense"].tokens
    assert plans["train"].memory > plans["dense"].memory > 16 * plans["dense"].parameters


class Holdings(TrainerCallback):
    """What a stage really holds: numbers that its optimizer has, bytes of weights, gradients and moments."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self.found["trained"] = sum(p.numel() for p in held)
        self.found["parameters"] = sum(p.numel() for p in model.parameters())
        self.found["weights"] = sum(p.nbytes for p in model.parameters())
        moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        self.found["optimizer"] = sum(value.nbytes for value in moments)


WAYS = {
    "full": {},
    "frozen": {"model": {"frozen": ["model.embed_tokens", "model.layers.0."]}},
    "lora": {"lora": {"r": 3}},
    "lora, frozen": {"lora": {"r": 3}, "model": {"frozen": ["model.layers.0."]}},
    "lora on attention": {"lora": {"r": 3, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "lora, bfloat16": {"lora": {"r": 3}, "model": {"dtype": "bfloat16"}},
}
ASSIGNED = {
    "sequence": {"dense": True, "distill": {"max_steps": 1}},
    "token": {"upcycle": {"assignment": "token"}, "merge": {"max_steps": 1}},
    "linear": {"upcycle": {"experts_in": "linear", "layers": [1]}, "merge": {"weights": "learned", "max_steps": 1}},
}


# where experts are in linear layers too, none is left that `target_modules` could name
CASES = [(way, one) for way in WAYS for one in ASSIGNED if way != "lora on attention" or one == "token"]
FAST = [("full", "token"), ("frozen", "sequence"), ("lora", "token"), ("lora", "sequence"), ("lora, frozen", "linear")]


@pytest.mark.parametrize(
    ("way", "assigned"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.full) for case in CASES]
)
def test_a_plan_has_what_the_runs_optimizers_hold(tmp_path, monkeypatch, way, assigned):
    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl")
    changes = {**ASSIGNED[assigned], **WAYS[way]}
    changes["model"] = {"path": str(tmp_path / "backbone"), **changes.get("model", {})}
    changes["training"] = {"per_device_train_batch_size": 8, "max_steps": 1}
    recipe = Recipe.from_dict(recipe_of(tmp_path, **changes))
    plans = {one.stage: one for one in plan_recipe(recipe, log=lambda _: None)}
    held, fit = collections.defaultdict(Holdings), stages.fit

    def watched(trainer, at, stage, target):
        trainer.add_callback(held[stage])
        return fit(trainer, at, stage, target)

    monkeypatch.setattr(stages, "fit", watched)
    monkeypatch.setattr(run, "measure", lambda at: {"models": {}})  # which no plan speaks of
    run_recipe(recipe, log=lambda _: None)
    assert held.keys() == plans.keys()
    for stage, one in plans.items():
        assert {name: getattr(one, name) for name in held[stage].found} == held[stage].found, stage
        assert one.memory == one.weights + one.gradients + one.optimizer + one.activations
        assert (one.trained < one.parameters) == (way not in ("full", "bfloat16") or stage == "merge"), stage


def test_devices_share_what_a_recipe_says_that_they_share(tmp_path):
    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl")

    def planned(devices=None, **training):
        training = {"per_device_train_batch_size": 2, **training}
        recipe = Recipe.from_dict(recipe_of(tmp_path, training=training))
        assert recipe.training == training, "TRL writes into what it is given"
        return plan_recipe(recipe, log=lambda _: None, devices=devices)[0]

    one, each = planned(), planned(4)
    shared = planned(4, fsdp=True, fsdp_config={"fsdp_reshard_after_forward": True})
    parts = ("weights", "gradients", "optimizer", "activations")
    assert [getattr(each, part) for part in parts] == [getattr(one, part) for part in parts]
    assert [getattr(shared, part) * 4 for part in parts[:3]] == [getattr(one, part) for part in parts[:3]]
    assert shared.activations == one.activations and (shared.devices, shared.sharded) == (4, True)
    assert one.steps == 4 * shared.steps == 4 * each.steps and shared.flops == one.flops == each.flops
    assert (one.devices, each.devices, each.sharded) == (1, 4, False)
    kept = planned(4, fsdp=True, gradient_checkpointing=False)
    own = planned(4, fsdp=True, gradient_checkpointing=False, fsdp_config={"activation_checkpointing": True})
    assert (own.flops, own.activations) == (shared.flops, shared.activations)
    assert kept.flops < own.flops and kept.activations > own.activations


def test_the_command_shows_a_plan_and_says_mistakes_in_a_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tmp_path}/backbone\ndata: {tmp_path}/pairs.jsonl\noutput: {tmp_path}/out\n")
    monkeypatch.setenv("COLUMNS", "150")
    result = CliRunner().invoke(app, ["run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["stage", "train", "distill"]
    assert result.stdout.split("\n")[0].split()[-5:] == ["weights", "gradients", "optimizer", "activations", "memory"]
    assert "for one device; nothing is measured" in result.stderr and "left out: 16-bit copies" in result.stderr
    result = CliRunner().invoke(app, ["run", str(path), "--dry-run", "--devices", "2"])
    assert "for each of 2 devices, which each hold everything" in result.stderr
    result = CliRunner().invoke(app, ["run", str(path), "--devices", "2"])
    assert "`--devices` must be left out without --dry-run, got 2" in str(result.exception)
    path.write_text(f"model: {tmp_path}/backbone\n")
    result = CliRunner().invoke(app, ["run", str(path)])
    assert "a recipe must have data, output" in str(result.exception)
