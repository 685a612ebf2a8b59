"""A recipe's run whose weights are sharded over CPU processes (FSDP2), which accelerate does on accelerators alone: its
state is told that it does. Prints the stages whose parameters were all sharded. Started by torchrun: recipe.yaml."""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from ummrm.pipeline import read_recipe, run_recipe, stages

start, fit = AcceleratorState.__init__, stages.fit


def start_sharded(self, *args, fsdp_plugin=None, **kwargs):
    start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
    if plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


def watched(trainer, at, stage, target):
    found = fit(trainer, at, stage, target)
    if all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        print(f"sharded: {stage}", flush=True)
    return found


AcceleratorState.__init__, stages.fit = start_sharded, watched
run_recipe(read_recipe(sys.argv[1]))
