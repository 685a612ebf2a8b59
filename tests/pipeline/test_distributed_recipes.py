"""The configurations of recipes/distributed, launched by accelerate with two CPU processes: whole runs, in all phases,
leave the models that one process leaves."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import yaml
from checkout import ROOT, SUPPORT
from pipeline_inputs import recipe_of, write_backbone, write_pairs

import ummrm
from ummrm.pipeline import Recipe, run_recipe

pytestmark = pytest.mark.full

HAVE_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
NEEDS_DEEPSPEED = pytest.mark.skipif(not HAVE_DEEPSPEED, reason="the session named deepspeed of nox has it")
ENGINES = ["fsdp2", *(pytest.param(name, marks=NEEDS_DEEPSPEED) for name in ("zero2", "zero3"))]
KINDS = {
    "sequence": {"dense": True},
    "token": {
        "upcycle": {"assignment": "token", "num_experts": 4, "num_experts_per_tok": 2, "balancing_loss_coef": 0.0},
        "merge": {"max_steps": 3, "learning_rate": 0.05},
        "distill": {"max_steps": 2},
    },
}
STAGES = {"sequence": ("dense", "train", "distill"), "token": ("train", "merge", "distill")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Model, pairs, and the runs of one process."""
    folder = tmp_path_factory.mktemp("inputs")
    write_backbone(folder / "backbone")
    write_pairs(folder / "pairs.jsonl")
    for kind in KINDS:
        run_recipe(Recipe.from_dict(made(folder, folder / kind, kind, 16)), log=lambda _: None)
    return folder


def made(folder, output, kind, batch):
    training = {**recipe_of(folder)["training"], "per_device_train_batch_size": batch, "max_steps": 3}
    return recipe_of(folder, output=str(output), training=training, **KINDS[kind])


def launched(recipe, folder, *options):
    """Runs a recipe under `accelerate launch`."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--mixed_precision", "no"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    path = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, str(SUPPORT / "sharded_child.py"), str(folder / "recipe.yaml")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def assert_the_same_models(one, other, start, names):
    load = ummrm.hf.loading.load_checkpoint
    before = load(start).state_dict()
    for name in names:
        ours, theirs = (load(folder / name).state_dict() for folder in (one, other))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(
                theirs[key], tensor, rtol=1e-4, atol=2e-5, msg=lambda t, at=(name, key): f"{at}: {t}"
            )
            if key in before:
                assert (tensor - before[key]).abs().max() > 1e-3, key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_configuration_runs_a_recipe_as_one_process_does(engine, kind, inputs, tmp_path):
    recipe = made(inputs, tmp_path / "out", kind, 8)
    done = launched(recipe, tmp_path, "--config_file", str(ROOT / f"recipes/distributed/{engine}.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    said = "sharded" if engine == "fsdp2" else engine
    assert [done.stdout.count(f"{said}: {stage}") for stage in STAGES[kind]] == [2, 2, 2], done.stdout
    names = [*(["dense"] if kind == "sequence" else []), "mixture", "stages/merge/model", "merged"]
    assert_the_same_models(inputs / kind, tmp_path / "out", inputs / "backbone", names)


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "accelerate.commands.launch"])
def test_launchers_of_the_command_itself(launcher, inputs, tmp_path):
    """By token, with learned merge weights, each process holding everything."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made(inputs, tmp_path / "out", "token", 8)))
    options = ["--standalone", "--nproc-per-node", "2"]
    if launcher != "torch.distributed.run":
        options = ["--multi_gpu", "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", launcher, *options, "-m", "ummrm", "run", str(tmp_path / "recipe.yaml")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names = ["mixture", "stages/merge/model", "merged"]
    assert_the_same_models(inputs / "token", tmp_path / "out", inputs / "backbone", names)
