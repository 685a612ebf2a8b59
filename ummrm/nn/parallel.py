"""Training on several processes: sums over them, and what engines that share a model do to names and shapes.

Sums of routing statistics make auxiliary losses equal one process's.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

_WRAPPER = "_checkpoint_wrapped_module."  # what torch's checkpoint_wrapper adds, which FSDP's settings ask for


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce of a tensor, and of its gradient: every process's loss depends on every process's tensor."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return _all_reduced(tensor, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduced(grad, ctx.group), None


def _all_reduced(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


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
    return _SumOverProcesses.apply(tensor, group)


def plain_name(name: str) -> str:
    """A module's name without the wrappers of activation checkpointing."""
    return f"{name}.".replace(_WRAPPER, "").removesuffix(".")


def shape_of(tensor: torch.Tensor) -> torch.Size:
    """The shape of a parameter: of the whole one, where DeepSpeed's ZeRO-3 has left nothing of it here."""
    return getattr(tensor, "ds_shape", tensor.shape)
