"""Checkpoints under engines for several processes: what goes on from one, on fewer processes too, ends where
a run that nothing stopped does; and a process that is killed ends all of them, at once and with its name.
"""

import os
import subprocess
import sys
import time

import pytest
import torch
from engine_child import run
from safetensors.torch import load_file
from test_engines import ENGINES, NEEDS_DEEPSPEED, launch

pytestmark = pytest.mark.full

# an epsilon of 1e-8 would make steps of gradients that are rounding alone
KEPT = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-2}
KEPT |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
CASES = {
    "token": {},
    "sequence": {"config": "sequence"},
    "merge": {"phase": "merge", "merge": {"learn_shared_share": True}, "learning_rate": 0.1},
    "distil": {"phase": "distill", "config": "sequence"},
}


def cases(folder, **more):
    return [{"out": str(folder / name), **KEPT, **case, **more} for name, case in CASES.items()]


def resumed(folder, start, **more):
    return [
        {**case, "resume_from_checkpoint": str(start / name / "trainer/checkpoint-2"), **more}
        for name, case in zip(CASES, cases(folder), strict=True)
    ]


def succeeded(done):
    assert done.returncode == 0, done.stderr[-3000:]


def assert_the_same_models(folder, expected):
    for name in CASES:
        ours, theirs = (load_file(at / name / "model/model.safetensors") for at in (expected, folder))
        assert ours.keys() == theirs.keys(), name
        for key, tensor in ours.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}: {key}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("alone")
    for name, case in CASES.items():
        run(folder / name, **{**KEPT, **case})
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_resumes(engine, alone, tmp_path):
    succeeded(launch(engine, cases(tmp_path / "whole")))
    assert_the_same_models(tmp_path / "whole", alone)
    succeeded(launch(engine, resumed(tmp_path / "again", tmp_path / "whole")))
    assert_the_same_models(tmp_path / "again", alone)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_checkpoint_of_four_processes_resumes_on_two(engine, alone, tmp_path):
    succeeded(launch(engine, cases(tmp_path / "whole"), 4))
    succeeded(launch(engine, resumed(tmp_path / "again", tmp_path / "whole"), 2))
    assert_the_same_models(tmp_path / "again", alone)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_universal_checkpoint_of_four_processes_resumes_on_two(engine, alone, tmp_path):
    """By docs/training.md: DeepSpeed's own would need as many processes as before, and says so."""
    succeeded(launch(engine, cases(tmp_path / "whole"), 4))
    refused = launch(engine, resumed(tmp_path / "refused", tmp_path / "whole")[:1])
    assert refused.returncode != 0 and "used a DP world size of 4 but the current" in refused.stderr
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    for name in CASES:
        checkpoint = tmp_path / "whole" / name / "trainer/checkpoint-2"
        folders = ["--input_folder", checkpoint / "global_step2", "--output_folder", checkpoint / "universal"]
        done = subprocess.run([*convert, *folders], env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (checkpoint / "latest_universal").write_text("universal")
    succeeded(launch(engine, resumed(tmp_path / "again", tmp_path / "whole", universal=True)))
    assert_the_same_models(tmp_path / "again", alone)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_killed_process_ends_all_and_the_last_checkpoint_resumes(engine, alone, tmp_path):
    (case,) = [one for one in cases(tmp_path / "killed") if one["out"].endswith("token")]
    began = time.monotonic()
    done = launch(engine, [{**case, "kill": (1, 3)}])
    assert done.returncode != 0 and time.monotonic() - began < 900  # gloo's time-out is 1800 seconds
    assert "Signal 9 (SIGKILL) received by PID" in done.stderr and "rank      : 1" in done.stderr, done.stderr[-3000:]
    checkpoint = tmp_path / "killed/token/trainer/checkpoint-2"
    assert checkpoint.is_dir() and not (tmp_path / "killed/token/model").exists()
    succeeded(
        launch(engine, [{**case, "out": str(tmp_path / "again/token"), "resume_from_checkpoint": str(checkpoint)}])
    )
    ours, theirs = (load_file(at / "token/model/model.safetensors") for at in (alone, tmp_path / "again"))
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=2e-5, msg=key)
