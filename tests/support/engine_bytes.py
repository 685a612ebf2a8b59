"""One process of a step under transformers' engine whose collectives are counted: bytes by what they are for."""

import json
from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from ummrm.hf.loading import load_checkpoint

KIND = {
    "c10d._allgather_base_": "gathered",
    "c10d._reduce_scatter_base_": "reduced",
    "_c10d_functional.all_to_all_single": "exchanged",
    "_c10d_functional.all_reduce": "summed",
    "_c10d_functional.all_gather_into_tensor": "summed",
    "_c10d_functional.reduce_scatter_tensor": "summed",
}


class Bytes(TorchDispatchMode):
    """Sums what a rank lacks of gathered tensors, and sends of others; FSDP2's own collectives and all others apart."""

    def __init__(self):
        super().__init__()
        self.sums = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function).removesuffix(".default")
        kind = KIND.get(name)
        if kind == "gathered":
            self.sums[kind] += args[0].nbytes - args[1].nbytes
        elif kind == "reduced":
            self.sums[kind] += args[1].nbytes - args[0].nbytes
        elif kind == "exchanged":
            tensor, _, sizes, group = args
            group = _resolve_process_group(group)
            away = sum(size for rank, size in enumerate(sizes) if rank != dist.get_rank(group))
            self.sums[kind] += away * tensor[:1].numel() * tensor.element_size()
        elif name.endswith("all_gather_into_tensor"):
            self.sums[kind] += args[0].nbytes * (args[1] - 1)
        elif kind == "summed":
            ranks = dist.get_world_size(_resolve_process_group(args[-1]))
            self.sums[kind] += args[0].nbytes * (ranks - 1) / ranks * (2 if name.endswith("all_reduce") else 1)
        return out


def run(rank, folder, cases):
    """Cases of (name, settings, batch of one rank); leaves the bytes and the parameters that the rank holds."""
    for name, settings, batch in cases:
        model = load_checkpoint(f"{folder}/model", distributed_config=settings).train()
        held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
        with Bytes() as counted:
            model(**batch).logits.square().mean().backward()
        with open(f"{folder}/{name}.{rank}", "w") as file:
            json.dump({**counted.sums, "held": held}, file)
        torch.distributed.barrier()
