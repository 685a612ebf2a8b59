"""The main job as a recipe: shortened runs of both demos, every file they leave, and that they fail loudly."""

import csv
import dataclasses
import json

import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from lab.demo import (
    ARMS,
    RecipeCheckError,
    RecipeConfig,
    load_recipe,
    raise_for_failed_checks,
    run_recipe,
    write_report,
)

PLOTS = {"training_curves.png", "gate_usage.png", "alpha.png", "best_of_n.png"}


def shortened(name, **changes):
    """A recipe of this project with few steps and little data; `changes` go into its plain data by dotted path."""
    data = load_recipe(name).to_dict()
    data["threads"] = None
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        target = data
        for parent in parents:
            target = target[parent]
        target[leaf] = value
    return RecipeConfig.from_dict(data)


SYNTHETIC = {
    "task__train_pairs": 256,
    "task__test_pairs": 64,
    "task__prompts": 3,
    "task__samples": 16,
    "dense__steps": 12,
    "dense__evaluations": 2,
    "moe__steps": 8,
    "moe__evaluations": 2,
    "alpha__steps": 5,
    "alpha__evaluations": 1,
    "evaluation__latency_rounds": 2,
    "evaluation__alpha_pairs": 64,
    "checks__dense_accuracy": [0.3, 1.0],
    "checks__expert_weight_distance": 1e-4,
    "checks__expert_disagreement": 1e-4,
    "checks__alpha_gain": -1.0,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("recipe")
    result = run_recipe(shortened("demo", **SYNTHETIC), output, progress=False)
    files = write_report(result, output, None)
    return result, output, files


def test_a_shortened_demo_passes_its_checks_and_leaves_every_file(finished):
    result, output, files = finished
    assert len(result.checks) >= 7
    raise_for_failed_checks(result, output)
    assert {path.name for path in files} >= PLOTS | {"results.json", "results.csv", "best_of_n.csv", "training.csv"}
    for path in files:
        assert path.stat().st_size > 100, path
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000, path


def test_the_four_arms_are_measured_and_the_merged_one_costs_what_dense_costs(finished):
    result, output, _ = finished
    assert list(result.arms) == list(ARMS)
    dense, moe, merged = (result.arms[name] for name in ("dense", "moe", "merged"))
    assert merged.parameters == dense.parameters < moe.parameters
    rows = list(csv.DictReader((output / "results.csv").open()))
    assert len(rows) == 4
    for arm in result.arms.values():
        assert 0 < arm.test.value < 1 and arm.latency_ms > 0
        assert arm.best_of_n.n == [1, 2, 4, 8, 16] and arm.best_of_n.kl[0] == 0
        assert arm.best_of_n.proxy == sorted(arm.best_of_n.proxy), "the proxy rises with n by construction"
    assert json.loads((output / "results.json").read_text())


def test_the_control_trains_on_the_same_batches_for_as_many_steps(finished):
    result, _, _ = finished
    steps = {name: len(history.loss) for name, history in result.histories.items()}
    assert steps["dense_longer"] == steps["moe"] + steps["alpha"] == 13


def test_the_exported_model_was_reloaded_where_ummrm_cannot_be_imported(finished):
    result, output, _ = finished
    assert result.reload.model_class.startswith("transformers.") and result.reload.difference <= 1e-6
    stock = AutoModelForSequenceClassification.from_pretrained(output / "merged")
    assert type(stock).__name__ == "LlamaForSequenceClassification"


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    result, _, _ = finished
    again = run_recipe(shortened("demo", **SYNTHETIC), tmp_path, progress=False)
    for name, arm in result.arms.items():
        other = again.arms[name]
        assert arm.test == other.test and arm.best_of_n == other.best_of_n, name
    assert {k: h.loss for k, h in result.histories.items()} == {k: h.loss for k, h in again.histories.items()}


def test_a_run_that_shows_too_little_fails_loudly_and_names_what(finished, tmp_path):
    result, _, _ = finished
    strict = dataclasses.replace(result.checks[0], value=0.5, expected="0.7 to 0.95", passed=False)
    bad = dataclasses.replace(result, checks=[strict])
    with pytest.raises(RecipeCheckError, match=r"1 check\(s\) of this run failed:\n.*0.5 \(expected 0.7 to 0.95\)"):
        raise_for_failed_checks(bad, tmp_path)


def test_a_saturated_or_unlearnt_task_fails_the_check(tmp_path):
    changed = {**SYNTHETIC, "dense__steps": 1, "moe__steps": 1, "checks__dense_accuracy": [0.9, 0.95]}
    result = run_recipe(shortened("demo", **changed), tmp_path, progress=False)
    failed = [check.name for check in result.checks if not check.passed]
    assert "accuracy of the dense model in distribution" in failed


def test_the_table_shows_every_arm(finished, tmp_path):
    result, _, _ = finished
    console = Console(record=True, width=80, file=open(tmp_path / "printed.txt", "w"))
    write_report(result, tmp_path, console)
    text = console.export_text()
    table = text[: text.index("gold at its peak")]
    assert "…" not in table and all(len(line) <= 80 for line in table.split("\n"))
    assert all(f"{arm.parameters:,}" in table for arm in result.arms.values()) and "passed" in text


def test_a_shortened_run_on_a_real_checkpoint_and_real_text(tmp_path):
    changes = {
        "task__train_pairs": 32,
        "task__test_pairs": 16,
        "task__prompts": 2,
        "task__samples": 4,
        "dense__steps": 3,
        "dense__warmup_steps": 0,
        "dense__evaluations": 1,
        "moe__steps": 2,
        "moe__warmup_steps": 0,
        "moe__evaluations": 1,
        "alpha__steps": 2,
        "evaluation__latency_rounds": 1,
        "evaluation__latency_batch": 4,
        "evaluation__gate_pairs": 8,
        "evaluation__curve_pairs": 8,
        "evaluation__alpha_pairs": 16,
        "checks__dense_accuracy": [0.0, 1.01],
        "checks__expert_weight_distance": 0.0,
        "checks__expert_disagreement": 0.0,
        "checks__alpha_gain": -1.0,
    }
    result = run_recipe(shortened("demo-real", **changes), tmp_path, progress=False)
    write_report(result, tmp_path, None)
    raise_for_failed_checks(result, tmp_path)
    assert result.reload.model_class.endswith("BertForSequenceClassification")
    assert result.arms["merged"].parameters == result.arms["dense"].parameters > 20_000_000


@pytest.mark.parametrize("name", ["demo", "demo-real"])
def test_recipes_round_trip_through_plain_data(name):
    recipe = load_recipe(name)
    assert RecipeConfig.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task__kind": "image"}, "recipe.task.kind must be one of synthetic, text, got 'image'"),
        ({"dense__steps": 1.5}, "recipe.dense.steps must be an integer, got 1.5"),
        ({"dense__stepz": 3}, r"recipe.dense has no field stepz \(did you mean steps\?\); it has steps"),
        ({"upcycle__num_experts": 0}, "`num_experts` must be an integer of at least 1"),
        ({"model__folder": "x"}, "exactly one of `model_type`, `folder`, `package`"),
        ({"checks__dense_accuracy": [0.9, 0.1]}, "two numbers, the lower one first"),
    ],
)
def test_bad_recipes_are_clear_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        shortened("demo", **changes)


def test_a_missing_or_broken_recipe_file_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
