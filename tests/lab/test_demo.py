"""The main job as a recipe: shortened runs of each way, every file they leave, and that they fail loudly."""

import csv
import dataclasses
import functools
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from lab.demo import (
    RecipeCheckError,
    RecipeConfig,
    arm_labels,
    load_recipe,
    raise_for_failed_checks,
    run_recipe,
    write_report,
)
from lab.demo.training import member_scores_of, teacher_targets
from ummrm.hf.ensembles import Member
from ummrm.nn.ensembles import TargetScale

PLOTS = {
    "demo": {"training_curves.png", "members.png", "best_of_n.png"},
    "demo-token": {"training_curves.png", "gate_usage.png", "alpha.png", "best_of_n.png"},
}


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
    "evaluation__latency_rounds": 2,
    "evaluation__alpha_pairs": 64,
    "checks__dense_accuracy": [0.3, 1.0],
    "checks__expert_weight_distance": 1e-4,
    "checks__expert_disagreement": 1e-4,
    "checks__member_disagreement": 1e-4,
    "checks__alpha_gain": -1.0,
    "checks__distillation_gain": -1.0,
}
BY_WAY = {
    "demo": {**SYNTHETIC, "distill__steps": 6, "distill__answers": 64, "distill__evaluations": 1},
    "demo-token": {**SYNTHETIC, "alpha__steps": 5, "alpha__evaluations": 1},
}


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """Each way's shortened demo, run when it is first asked for: result, folder, files."""

    @functools.cache
    def run(name):
        output = tmp_path_factory.mktemp(name)
        result = run_recipe(shortened(name, **BY_WAY[name]), output, progress=False)
        return result, output, write_report(result, output, None)

    return run


@pytest.fixture(params=sorted(BY_WAY))
def way(request):
    return request.param


@pytest.fixture
def finished(run_once, way):
    return run_once(way)


@pytest.fixture
def by_sequence(run_once):
    return run_once("demo")


def test_a_shortened_demo_passes_its_checks_and_leaves_every_file(finished, way):
    result, output, files = finished
    assert len(result.checks) >= 6
    raise_for_failed_checks(result, output)
    tables = {"results.json", "results.csv", "best_of_n.csv", "training.csv", "table.txt"}
    assert {path.name for path in files} == PLOTS[way] | tables
    for path in files:
        assert path.stat().st_size > 100, path
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000, path


def test_every_arm_is_measured_and_the_merged_ones_cost_what_dense_costs(finished, way):
    result, output, _ = finished
    assert list(result.arms) == list(arm_labels(result.config))
    assert len(result.arms) == {"demo": 5, "demo-token": 4}[way]
    served = [arm.parameters for name, arm in result.arms.items() if name != "moe"]
    assert len(set(served)) == 1 and served[0] < result.arms["moe"].parameters
    rows = list(csv.DictReader((output / "results.csv").open()))
    assert [row["arm"] for row in rows] == list(result.arms)
    for arm in result.arms.values():
        assert 0 < arm.test.value < 1 and arm.latency.milliseconds > 0 <= arm.latency.noise
        assert arm.best_of_n.n == [1, 2, 4, 8, 16] and arm.best_of_n.kl[0] == 0
        assert arm.best_of_n.proxy == sorted(arm.best_of_n.proxy), "the proxy rises with n by construction"
    assert json.loads((output / "results.json").read_text())


def test_the_control_trains_for_as_many_steps_from_the_same_start(finished, way):
    result, _, _ = finished
    steps = {name: len(history.loss) for name, history in result.histories.items()}
    assert steps["dense_longer"] == steps["moe"] + steps.get("alpha", 0) == {"demo": 8, "demo-token": 13}[way]
    # the same first batch finds the same model; that the mixture starts as its equal is a check of the run too
    first = {name: history.loss[0] for name, history in result.histories.items()}
    assert first["dense_longer"] == pytest.approx(first["moe"], abs=1e-4)


def test_the_exported_model_was_reloaded_where_ummrm_cannot_be_imported(finished, way):
    result, output, _ = finished
    assert result.reload.model_class.startswith("transformers.") and result.reload.difference <= 1e-6
    for folder in {"demo": ("merged", "distilled"), "demo-token": ("merged",)}[way]:
        stock = AutoModelForSequenceClassification.from_pretrained(output / folder)
        assert type(stock).__name__ == "LlamaForSequenceClassification"


def test_the_members_are_measured_one_by_one_and_their_mean_is_the_teacher(by_sequence):
    result, output, _ = by_sequence
    members, gap = result.members, result.gap
    assert len(members.test) == len(members.shifted) == 4 and 0 < members.disagreement < 1
    assert len({one.value for one in members.test + members.shifted}) > 1
    written = json.loads((output / "results.json").read_text())
    assert written["members"]["disagreement"] == members.disagreement
    assert written["distance_to_the_mean"] == {"merged": gap[0], "distilled": gap[1]} and gap[0] > 0
    assert "merge_coefficients" not in written, "the mean has nothing to learn"
    assert "120 steps" not in (card := (output / "distilled" / "README.md").read_text()) and "6 steps of" in card


def test_the_same_seed_gives_the_same_numbers(by_sequence, tmp_path):
    result, _, _ = by_sequence
    again = run_recipe(shortened("demo", **BY_WAY["demo"]), tmp_path, progress=False)
    for name, arm in result.arms.items():
        other = again.arms[name]
        assert arm.test == other.test and arm.best_of_n == other.best_of_n, name
    assert {k: h.loss for k, h in result.histories.items()} == {k: h.loss for k, h in again.histories.items()}


def test_a_run_that_shows_too_little_fails_loudly_and_names_what(by_sequence, tmp_path):
    result, _, _ = by_sequence
    strict = dataclasses.replace(result.checks[0], value=0.5, expected="0.7 to 0.95", passed=False)
    bad = dataclasses.replace(result, checks=[strict])
    with pytest.raises(RecipeCheckError, match=r"1 check\(s\) of this run failed:\n.*0.5 \(expected 0.7 to 0.95\)"):
        raise_for_failed_checks(bad, tmp_path)


def test_a_run_that_learns_alpha_by_sequence_on_an_unlearnt_task_fails_one_check(tmp_path):
    alpha = {"steps": 2, "warmup_steps": 0, "evaluations": 1, "learning_rate": 0.05}
    changed = {**BY_WAY["demo"], "alpha": alpha, "dense__steps": 1, "checks__dense_accuracy": [0.9, 0.95]}
    result = run_recipe(shortened("demo", **changed), tmp_path, progress=False)
    failed = [check.name for check in result.checks if not check.passed]
    assert failed == ["accuracy of the dense model in distribution"]
    assert len(result.histories["alpha"].loss) == 2 and len(result.histories["dense_longer"].loss) == 10
    assert result.coefficients and (tmp_path / "alpha.png") in write_report(result, tmp_path, None)


def test_the_table_shows_every_arm(finished, tmp_path):
    result, _, _ = finished
    console = Console(record=True, width=80, file=open(tmp_path / "printed.txt", "w"))
    write_report(result, tmp_path, console)
    text = console.export_text()
    table = text[: text.index("gold at peak")]
    assert "…" not in table and all(word in table for label in result.labels.values() for word in label.split())
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
        "distill__steps": 2,
        "distill__batch_size": 4,
        "distill__answers": 16,
        "distill__evaluations": 1,
        "evaluation__latency_rounds": 1,
        "evaluation__latency_batch": 4,
        "evaluation__gate_pairs": 8,
        "evaluation__curve_pairs": 8,
        "checks__dense_accuracy": [0.0, 1.01],
        "checks__member_disagreement": 0.0,
        "checks__distillation_gain": -1.0,
    }
    result = run_recipe(shortened("demo-real", **changes), tmp_path, progress=False)
    write_report(result, tmp_path, None)
    raise_for_failed_checks(result, tmp_path)
    assert result.reload.model_class.endswith("BertForSequenceClassification")
    assert result.config.start == "backbone" and result.labels["dense_longer"] == "dense, equal steps"
    assert result.arms["distilled"].parameters == result.arms["dense"].parameters > 20_000_000


@pytest.mark.parametrize("name", ["demo", "demo-token", "demo-real"])
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
        ({"start": "head"}, "`start` must be one of dense, backbone, got 'head'"),
        ({"merge__shared_share": 0.3}, "`merge` must be left out by sequence without `alpha`"),
        ({"distill__answers": 8}, "`answers` must be at least batch_size=32, got 8"),
        ({"upcycle": {}}, '`distill` must be left out with upcycle.assignment="token"'),
    ],
)
def test_bad_recipes_are_clear_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        shortened("demo", **changes)


def test_what_a_recipe_leaves_out_follows_its_way():
    data = load_recipe("demo").to_dict()
    del data["distill"]
    assert RecipeConfig.from_dict(data).distill.steps == 120 and RecipeConfig.from_dict(data).alpha is None
    del data["upcycle"]
    by_token = RecipeConfig.from_dict(data)
    assert by_token.distill is None and by_token.alpha.schedule == "constant"


def test_the_control_from_the_backbone_has_the_mixtures_steps_at_the_dense_models_rate():
    recipe = shortened("demo", start="backbone", moe__steps=90, moe__learning_rate=0.5)
    assert recipe.control == dataclasses.replace(recipe.moe, learning_rate=recipe.dense.learning_rate)
    assert arm_labels(recipe)["dense_longer"] == "dense, equal steps"
    recipe = dataclasses.replace(recipe, start="dense")
    assert recipe.control == recipe.moe and arm_labels(recipe)["dense_longer"] == "dense, continued training"


def test_distillation_aims_at_what_the_products_trainer_aims_at(by_sequence):
    result, output, _ = by_sequence
    teacher = AutoModelForSequenceClassification.from_pretrained(output / "moe").eval()
    answers = result.task.unlabelled(40, 3)
    scores = member_scores_of(teacher, answers, 16)
    ids = [row[:n].tolist() for row, n in zip(answers.tokens, answers.lengths.tolist(), strict=True)]
    assert torch.equal(Member(teacher).scores(ids, 16), scores)
    scale = TargetScale.measured(scores, "mean", 0.5, [""] * 4)
    torch.testing.assert_close(teacher_targets(teacher, answers, 16), scale.targets(scores, "mean", 0.5))


def test_a_missing_or_broken_recipe_file_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
