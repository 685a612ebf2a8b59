"""A recipe's run by several CPU processes under the engine that its launcher or the recipe asks for, FSDP2 on CPUs too
(`fsdp_on_cpu.py`). Prints each stage with its engine. Started by torchrun or `accelerate launch`: recipe.yaml."""

import sys

from fsdp_on_cpu import shard_on_cpu
from torch.distributed.tensor import DTensor

from ummrm.hf.sharding import reshard
from ummrm.pipeline import read_recipe, run_recipe, stages

fit = stages.fit


def watched(trainer, at, stage, target):
    found = fit(trainer, at, stage, target)
    model = trainer.accelerator.unwrap_model(trainer.model)
    reshard(model)
    parameters = list(model.parameters())
    if trainer.is_deepspeed_enabled:
        share = trainer.accelerator.deepspeed_config["zero_optimization"]["stage"]
        assert all(hasattr(p, "ds_id") for p in parameters) == (share == 3)
        print(f"zero{share}: {stage}", flush=True)
    if all(isinstance(parameter, DTensor) for parameter in parameters):
        print(f"sharded: {stage}", flush=True)
    return found


shard_on_cpu()
stages.fit = watched
run_recipe(read_recipe(sys.argv[1]))
