"""A recipe under FSDP2 over two processes gives the models that one process gives."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from checkout import ROOT, SUPPORT
from pipeline_inputs import recipe_of, write_backbone, write_pairs

import ummrm
from ummrm.pipeline import Recipe, read_recipe, run_recipe

pytestmark = pytest.mark.full


def test_a_sharded_run_is_that_of_one_process(tmp_path):
    write_backbone(tmp_path / "backbone")
    write_pairs(tmp_path / "pairs.jsonl")
    made = recipe_of(tmp_path, dense=True)
    whole = {**made, "output": str(tmp_path / "whole")}
    whole["training"] = {**made["training"], "per_device_train_batch_size": 16}
    run_recipe(Recipe.from_dict(whole), log=lambda _: None)
    said = read_recipe(ROOT / "recipes/pythia-1.4b-hh-fsdp2.yaml").training
    names = ("fsdp", "fsdp_config", "gradient_checkpointing")
    made["training"] = {**made["training"], **{name: said[name] for name in names}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    child = [str(SUPPORT / "sharded_child.py"), str(tmp_path / "recipe.yaml")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *child],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [done.stdout.count(f"sharded: {stage}") for stage in ("dense", "train", "distill")] == [2, 2, 2]
    load = ummrm.hf.loading.load_checkpoint
    before = load(tmp_path / "backbone").state_dict()
    for name in ("dense", "mixture", "stages/merge/model", "merged"):
        one, sharded = (load(tmp_path / folder / name).state_dict() for folder in ("whole", "out"))
        assert one.keys() == sharded.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(sharded[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
            if key in before:
                assert (tensor - before[key]).abs().max() > 1e-3, key
