"""Makes accelerate shard on CPUs, which it does on accelerators alone: with FSDP asked for it runs DDP there, silently.

Its state is told that it is sharded, in the one place that decides it; everything after that is accelerate's own code.
"""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpu():
    """From here on an Accelerator of this process shards, where its arguments or its launcher ask for FSDP."""
    start = AcceleratorState.__init__

    def start_sharded(self, *args, fsdp_plugin=None, **kwargs):
        fresh = not AcceleratorState._shared_state
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if fresh and (fsdp_plugin is not None or launched):
            plugin = FullyShardedDataParallelPlugin() if fsdp_plugin is None else fsdp_plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start_sharded
