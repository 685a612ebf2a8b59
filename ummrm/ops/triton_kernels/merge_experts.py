"""Triton kernels of the merge: the weighted sum of experts, and the dot products with them that are its backward; bound
by memory. A launch serves one tensor of the list. Dots are summed by block, then over blocks in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import Checker
from .launch import accumulator, blocks, launch, wide


def _elements(dtype: torch.dtype) -> int:
    """Of a program; in fp64 as many bytes as would not spill."""
    return 512 if dtype == torch.float64 else 2048


@triton.jit
def _merge(
    shared,
    routed,
    coefficients,
    out,
    elements,
    shared_stride,
    routed_stride,
    num_shared,
    num_routed,
    ACC: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < elements
    total = tl.full([ELEMENTS], 0.0, ACC)
    for s in range(num_shared):
        weight = tl.load(shared + (at + tl.cast(s, tl.int64) * shared_stride), mask=inside, other=0.0).to(ACC)
        total += tl.load(coefficients + s) * weight
    for e in range(num_routed):
        weight = tl.load(routed + (at + tl.cast(e, tl.int64) * routed_stride), mask=inside, other=0.0).to(ACC)
        total += tl.load(coefficients + num_shared + e) * weight
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dots(
    grad,
    shared,
    routed,
    partial,
    elements,
    shared_stride,
    routed_stride,
    num_shared,
    num_routed,
    ACC: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """partial [blocks, experts]: the gradient is read once for all experts."""
    block = tl.program_id(0).to(tl.int64)
    at = block * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < elements
    g = tl.load(grad + at, mask=inside, other=0.0).to(ACC)
    to = partial + block * (num_shared + num_routed)
    for s in range(num_shared):
        weight = tl.load(shared + (at + tl.cast(s, tl.int64) * shared_stride), mask=inside, other=0.0).to(ACC)
        tl.store(to + s, tl.sum(g * weight, 0))
    for e in range(num_routed):
        weight = tl.load(routed + (at + tl.cast(e, tl.int64) * routed_stride), mask=inside, other=0.0).to(ACC)
        tl.store(to + num_shared + e, tl.sum(g * weight, 0))


@triton.jit
def _dots_sum(partial, dots, num_blocks, num_experts, ACC: tl.constexpr, BLOCKS: tl.constexpr):
    expert = tl.program_id(0)
    total = tl.full([BLOCKS], 0.0, tl.float64)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = block.to(tl.int64) * num_experts + expert
        total += tl.load(partial + at, mask=block < num_blocks, other=0.0).to(tl.float64)
    tl.store(dots + expert, tl.sum(total, 0).to(ACC))


def _contiguous_slices(experts: Tensor) -> Tensor:
    """An expert's slice must be contiguous; the stride from expert to expert is free."""
    return experts if experts.shape[0] == 0 or experts[0].is_contiguous() else experts.contiguous()


def _check_lists(check: Checker, shared: list[Tensor], routed: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    n = len(routed)
    check.value(n > 0, "routed", "hold at least one tensor", 0, "pass the FFN's tensors")
    expected = f"have as many tensors as `routed` ({n})"
    remedy = "pass each FFN tensor of both kinds of expert, in the same order"
    check.value(len(shared) == n, "shared", expected, len(shared), remedy)
    check.floating("routed", routed[0])
    for name, tensors in (("shared", shared), ("routed", routed)):
        words = f"hold tensors [{'S' if name == 'shared' else 'E'}, ...]"
        for tensor in tensors:
            check.value(tensor.dim() > 0, name, words, "a scalar", "stack the experts")
    experts = shared[0].shape[0] + routed[0].shape[0]
    check.value(experts > 0, "routed` and `shared", "hold at least one expert", 0, "stack the experts")
    for s, r in zip(shared, routed, strict=True):
        for name, tensor in (("shared", s), ("routed", r)):
            check.device(name, tensor, routed[0], "routed[0]")
            check.dtype(name, tensor, routed[0].dtype, "all tensors of one call share a dtype")
        slice_shape = tuple(r.shape[1:])
        check.shape("routed", r, (routed[0].shape[0], *slice_shape), "[E, ...]", "every tensor holds the same experts")
        remedy = "a shared expert has the shape of a routed one"
        check.shape("shared", s, (shared[0].shape[0], *slice_shape), "[S, ...]", remedy)
    return [_contiguous_slices(t) for t in shared], [_contiguous_slices(t) for t in routed]


def _sizes(shared: Tensor, routed: Tensor) -> tuple[int, ...]:
    """The integer arguments that both kernels take."""
    return routed.shape[1:].numel(), shared.stride(0), routed.stride(0), shared.shape[0], routed.shape[0]


def merge_experts(shared: list[Tensor], routed: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    check = Checker("merge_experts")
    shared, routed = _check_lists(check, shared, routed)
    like, experts = routed[0], shared[0].shape[0] + routed[0].shape[0]
    check.device("coefficients", coefficients, like, "routed[0]")
    remedy = "one row a tensor, shared experts first"
    check.shape("coefficients", coefficients, (len(routed), experts), "[len(routed), S + E]", remedy)
    check.dtype("coefficients", coefficients, accumulator(like), "coefficients stay in fp32 (fp64 for fp64 experts)")
    coefficients, merged = coefficients.contiguous(), []
    for i, (s, r) in enumerate(zip(shared, routed, strict=True)):
        out, sizes = r.new_empty(r.shape[1:]), _sizes(s, r)
        each = _elements(r.dtype)
        launch(_merge, (blocks(sizes[0], each),), r, s, r, coefficients[i], out, *sizes, ACC=wide(r), ELEMENTS=each)
        merged.append(out)
    return merged


def merge_experts_dots(grads: list[Tensor], shared: list[Tensor], routed: list[Tensor]) -> Tensor:
    check, remedy = Checker("merge_experts_dots"), "pass one gradient a merged tensor"
    shared, routed = _check_lists(check, shared, routed)
    like, n = routed[0], len(routed)
    check.value(len(grads) == n, "grads", f"have as many tensors as `routed` ({n})", len(grads), remedy)
    for grad, r in zip(grads, routed, strict=True):
        check.device("grads", grad, like, "routed[0]")
        check.shape("grads", grad, tuple(r.shape[1:]), "a merged tensor's", remedy)
        check.dtype("grads", grad, like.dtype, "all tensors of one call share a dtype")
    experts = shared[0].shape[0] + like.shape[0]
    dots = like.new_empty((n, experts), dtype=accumulator(like))
    for i, (grad, s, r) in enumerate(zip(grads, shared, routed, strict=True)):
        sizes = _sizes(s, r)
        each = 2 * _elements(r.dtype)
        count = blocks(sizes[0], each)
        partial = dots.new_empty(count, experts)
        launch(_dots, (count,), r, grad.contiguous(), s, r, partial, *sizes, ACC=wide(r), ELEMENTS=each)
        launch(_dots_sum, (experts,), r, partial, dots[i], count, experts, ACC=wide(r), BLOCKS=1024)
    return dots
