"""`ummrm train`: what a run's stage does, for each kind of model."""

import json

import pytest
import torch
from pipeline_inputs import recipe_of, write_backbone, write_pairs
from typer.testing import CliRunner

import ummrm
from ummrm.cli import app
from ummrm.cli.errors import UserError
from ummrm.hf.loading import load_checkpoint
from ummrm.pipeline import Recipe, run_recipe, train_folder


def command(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_commands_one_by_one_make_what_a_run_makes(tmp_path):
    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl")
    data = {"train": str(tmp_path / "pairs.jsonl")}
    whole = recipe_of(tmp_path, data=data, dense=True, distill=False, merge={"weights": "mean"})
    run_recipe(Recipe.from_dict(whole), log=lambda _: None)
    (tmp_path / "arguments.yaml").write_text("per_device_train_batch_size: 8\nlearning_rate: 5.0e-4\n")
    options = ["--config", tmp_path / "arguments.yaml", "--learning-rate", 2e-3]
    pairs = tmp_path / "pairs.jsonl"
    done = command("train", tmp_path / "backbone", pairs, tmp_path / "dense", *options)
    assert "5 steps, held-out accuracy" in done.stdout
    command(
        "upcycle",
        tmp_path / "backbone",
        tmp_path / "moe",
        "--new-head",
        *"--assignment sequence --experts-in all".split(),
    )
    command("train", tmp_path / "moe", pairs, tmp_path / "trained", *options, "--num-train-epochs", 4)
    command("merge", tmp_path / "trained", tmp_path / "merged")
    for mine, theirs in (("dense", "dense"), ("trained", "mixture"), ("merged", "merged")):
        one, other = (
            load_checkpoint(tmp_path / mine).state_dict(),
            load_checkpoint(tmp_path / "out" / theirs).state_dict(),
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), mine
    again = command("train", tmp_path / "moe", pairs, tmp_path / "trained", *options, "--num-train-epochs", 4)
    assert "20 steps" in again.stdout
    with pytest.raises(UserError, match="stage train: arguments.num_train_epochs was 4.0, is 1.0"):
        command("train", tmp_path / "moe", pairs, tmp_path / "trained", *options)


def test_merge_weights_are_trained_and_mistakes_named(tmp_path):
    write_backbone(tmp_path / "backbone")
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    dense = ummrm.reward_model(tmp_path / "backbone")
    merging = ummrm.prepare_merge(ummrm.upcycle(dense, ummrm.UpcycleConfig(expert_noise=0.5)))
    ummrm.save_pretrained(merging, tmp_path / "merging")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "merging" / name).write_bytes((tmp_path / "backbone" / name).read_bytes())
    before = load_checkpoint(tmp_path / "merging").state_dict()
    command("train", tmp_path / "merging", pairs, tmp_path / "learned", "--max-steps", 2, "--learning-rate", 0.05)
    after = load_checkpoint(tmp_path / "learned").state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all("alpha" in key for key in moved)
    assert json.loads((tmp_path / "learned/stages/train/stage.json").read_text())["found"]["steps"] == 2
    with pytest.raises(UserError, match="`train` has no field `learning_rat`; did you mean `learning_rate`"):
        (tmp_path / "bad.yaml").write_text("learning_rat: 1\n")
        command("train", tmp_path / "merging", pairs, tmp_path / "new", "--config", tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="`training.fsdp` must be left out in one process"):
        (tmp_path / "sharded.yaml").write_text("fsdp: true\n")
        command("train", tmp_path / "merging", pairs, tmp_path / "new", "--config", tmp_path / "sharded.yaml")
    assert not (tmp_path / "new").exists()


def test_rated_dialogues_are_trained_on_as_in_a_recipe(tmp_path):
    write_backbone(tmp_path / "backbone")
    rows = [
        {"one": f"\n\nHuman: w{i}\n\nAssistant: w1", "two": f"\n\nHuman: w{i}\n\nAssistant: w2", "s1": i % 3, "s2": 1}
        for i in range(15)
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rated.jsonl"), "answers": ["one", "two"], "scores": ["s1", "s2"]}
    source["turns"] = ["\n\nHuman:", "\n\nAssistant:"]
    said = {"model": str(tmp_path / "backbone"), "data": {"train": source}, "output": str(tmp_path / "recipe")}
    train_folder(Recipe.from_dict({**said, "train": {"max_steps": 1}}), log=lambda _: None)
    options = ["--answers", "one", "two", "--scores", "s1", "s2", "--turns", r"\n\nHuman:", r"\n\nAssistant:"]
    data = tmp_path / "rated.jsonl"
    command("train", tmp_path / "backbone", data, tmp_path / "options", *options, "--max-steps", 1)
    digests = [json.loads((tmp_path / name / "stages/train/stage.json").read_text()) for name in ("recipe", "options")]
    assert digests[0]["settings"]["data"] == digests[1]["settings"]["data"]
    one, other = (load_checkpoint(tmp_path / name).state_dict() for name in ("recipe", "options"))
    assert all(torch.equal(one[key], other[key]) for key in one)
