"""Every engine for several processes gives one process's training: DDP, accelerate's FSDP2, DeepSpeed's ZeRO-2 and 3.

Loss, statistics, auxiliary losses, gradients (as SGD applies them), merge weights, evaluation, and the models that are
saved and merged, on two and four CPU processes, in both phases, both assignments and under accumulation.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from checkout import ROOT, SUPPORT
from engine_child import run
from safetensors.torch import load_file

pytestmark = pytest.mark.full

HAVE_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
NEEDS_DEEPSPEED = pytest.mark.skipif(not HAVE_DEEPSPEED, reason="the session named deepspeed of nox has it")
ENGINES = ["ddp", "fsdp2", *(pytest.param(name, marks=NEEDS_DEEPSPEED) for name in ("zero2", "zero3"))]
PARTS = {"gradient_accumulation_steps": 2}
PROJECTIONS = {"alpha_per": "projection", "learn_shared_share": True, "shared_share": 0.3}
CASES = {
    **{
        f"{model_type} {name}": {"model_type": model_type, **case}
        for model_type in ("llama", "qwen2", "gpt_neox")
        for name, case in {
            "token": {"config": "token"},
            "token accumulated": {"config": "accumulated", **PARTS},
            "sequence accumulated": {"config": "sequence", **PARTS},
            "merge": {"phase": "merge", **PARTS},
        }.items()
    },
    "all linear layers": {"config": "all"},
    "by path": {"load": True},
    "merge of all linear layers": {"phase": "merge", "config": "all", "merge": {"shared_share": 0.0}},
    "merge by path, lambda learned": {"phase": "merge", "load": True, "merge": PROJECTIONS},
    "token clipped": {"max_grad_norm": 0.1},
    "distil members": {"phase": "distill", "config": "sequence", "learning_rate": 0.01},
    "distil a mixture by token": {"phase": "distill", "learning_rate": 0.01},
}
UNLIKE = ("runtime", "per_second", "num_tokens", "total_flos")


def launch(engine, cases, processes=2, **more):
    """Runs cases under an engine; the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, str(SUPPORT / "engine_child.py"), engine, json.dumps(cases)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of every case, run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, case in CASES.items():
        run(folder / name, **case)
    return folder


def assert_alike(found, expected, name):
    logs = [torch.load(folder / "log.pt", weights_only=False) for folder in (found, expected)]
    assert len(logs[0]) == len(logs[1]), name
    for entry, ours in zip(*logs, strict=True):
        assert entry.keys() == ours.keys(), name
        for key, value in ours.items():
            if not any(word in key for word in UNLIKE):
                assert math.isclose(entry[key], value, rel_tol=1e-4, abs_tol=2e-5), (name, key, entry[key], value)
    for kind in ("model", "merged"):
        assert (found / kind).exists() == (expected / kind).exists(), name
        if (expected / kind).exists():
            ours, theirs = (load_file(folder / kind / "model.safetensors") for folder in (expected, found))
            assert ours.keys() == theirs.keys(), name
            for key, tensor in ours.items():
                assert theirs[key].dtype == tensor.dtype, (name, kind, key)
                torch.testing.assert_close(
                    theirs[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, at=(name, kind, key): f"{at}: {text}"
                )


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_training_is_one_processs(engine, processes, alone, tmp_path):
    done = launch(engine, [{"out": str(tmp_path / name), **case} for name, case in CASES.items()], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in CASES:
        assert_alike(tmp_path / name, alone / name, name)


def test_the_trainings_move_what_they_train(alone):
    """So that equal ones say something."""
    for name, case in CASES.items():
        log = torch.load(alone / name / "log.pt", weights_only=False)
        steps = [entry for entry in log if "loss" in entry]
        assert len(steps) == 2 and abs(steps[0]["loss"] - steps[1]["loss"]) > 1e-3, name
        if case.get("phase") == "merge":
            assert 1e-4 < max(abs(v) for e in steps for k, v in e.items() if k.startswith("alpha/")), name
