"""Weight gradients added to what is there, in one pass: `accumulate_in_place`, and what it may add to.

Autograd computes a gradient, then reads it again to add it to `.grad`. For experts' projections, which are most of a
model and mostly larger than what a micro-batch does with them, the product can end with the addition instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .reference import accumulator

_depth = 0  # of the process, since a backward on CUDA runs in threads of autograd's own


@contextmanager
def accumulate_in_place() -> Iterator[None]:
    """While it is on, backward adds the gradients of experts' projections to the buffers that they accumulate in.

    With gradient accumulation, from the second micro-batch on, a gradient is then never written out by itself: the
    product adds to what the buffer holds. For

        with ummrm.ops.accumulate_in_place():
            for batch in micro_batches:
                model(**batch).loss.backward()

    a parameter ends up with the same sums in `.grad` as without, up to the order of roundings. The buffer is

    - the parameter's attribute `main_grad`, where it has one: a contiguous tensor of its shape and device, in its dtype
      or in fp32 (fp64 for fp64). `.grad` then stays as it is. So sums over many micro-batches of a bf16 model keep
      fp32's precision, at the cost of that buffer; whoever sets it zeroes it and hands it to the optimiser.
    - else `.grad`, where there is one already. The first micro-batch, which finds None, goes autograd's way.

    It concerns projections (up and down, shared and routed) that are leaves and reach `moe_ffn`, `expert_gemm` or
    `grouped_linear` as they are, in layers or by themselves. All other gradients come as always, and so do these where
    autocast or an adapter made another tensor of the parameter, where it has hooks on its gradient, inside
    `torch.compile`, and where a gradient is recorded (`create_graph=True`). FSDP2's parameters qualify while it
    gathers no gradients (`set_requires_gradient_sync(False)`), DDP's under `no_sync()`, unless they have hooks.

    For `.backward()` alone: `torch.autograd.grad` would return None for what was added elsewhere. It may be nested, and
    holds for the whole process, since backward runs in threads of autograd's own.

    Raises (in backward):
        ValueError: a `main_grad` that does not fit its parameter.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def leaves_of(*projections: Tensor) -> tuple[Tensor | None, ...]:
    """What `totals_of` takes, for a node to keep: the projections that are leaves. Saved tensors may be other ones."""
    return tuple(t if t.is_leaf and t.requires_grad else None for t in projections)


def totals_of(leaves: tuple[Tensor | None, ...], need: tuple[bool, ...] | list[bool]) -> list[Tensor | None]:
    """The buffer of each leaf whose gradient is needed and may be added in place; else None."""
    return [
        _total_of(leaf) if n and leaf is not None and _depth else None for leaf, n in zip(leaves, need, strict=True)
    ]


def _total_of(leaf: Tensor) -> Tensor | None:
    if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
        return None
    total = getattr(leaf, "main_grad", None)
    if total is not None:
        if not _fits(total, leaf):
            raise ValueError(
                f"`main_grad` must be a contiguous {list(leaf.shape)} tensor of {leaf.dtype} or {accumulator(leaf)} on "
                f"{leaf.device}, got {_described(total)}; make it by torch.zeros_like(parameter, dtype=...)."
            )
        return total
    return leaf.grad if leaf.grad is not None and _fits(leaf.grad, leaf) else None


def _fits(total: Tensor, leaf: Tensor) -> bool:
    plain = type(total) in (Tensor, torch.nn.Parameter) and total.layout is torch.strided
    return (
        plain
        and total.shape == leaf.shape
        and total.device == leaf.device
        and total.dtype in (leaf.dtype, accumulator(leaf))
        and total.is_contiguous()
        and not total.requires_grad
    )


def _described(total) -> str:
    if not isinstance(total, Tensor):
        return type(total).__name__
    words = "" if total.is_contiguous() else "non-contiguous "
    grad = " that requires a gradient" if total.requires_grad else ""
    return f"a {words}{list(total.shape)} {type(total).__name__} of {total.dtype} on {total.device}{grad}"
