"""Data parallelism: sums of routing statistics over processes, so that auxiliary losses equal one process's."""

from __future__ import annotations

import torch
import torch.distributed as dist


def sum_over_processes(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum of `tensor` over the processes of `group`, differentiable; `tensor` itself without torch.distributed.

    The gradient is summed over processes too. Data-parallel training then averages parameter gradients over them,
    which together gives the gradient of the loss that one process would have computed on all tokens.

    Args:
        tensor: any shape, the same on every process.
        group: the data-parallel group; None is the default group.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return tensor
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(tensor, group=group if group is not None else dist.group.WORLD)
