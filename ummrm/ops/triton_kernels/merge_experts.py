"""Triton kernels of the merge: the weighted sum of experts, and its backward, dot products with them and multiples of
the gradient; bound by memory. A launch serves one tensor of the list. Dots are summed by block, then over blocks in
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _grads(
    grad,
    coefficients,
    out,
    elements,
    stride,
    num_experts,
    ACC: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """The gradient is read once for all experts of a kind."""
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = at < elements
    g = tl.load(grad + at, mask=inside, other=0.0).to(ACC)
    for e in range(num_experts):
        scaled = tl.load(coefficients + e) * g
        tl.store(out + (at + tl.cast(e, tl.int64) * stride), scaled.to(out.dtype.element_ty), mask=inside)


def _contiguous_slices(experts: Tensor) -> Tensor:
    """An expert's slice must be contiguous; the stride from expert to expert is free."""
    return experts if experts.shape[0] == 0 or experts[0].is_contiguous() else experts.contiguous()


def _slices(shared: list[Tensor], routed: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors that kernels can read."""
    return [(_contiguous_slices(s), _contiguous_slices(r)) for s, r in zip(shared, routed, strict=True)]


def _sizes(shared: Tensor, routed: Tensor) -> tuple[int, ...]:
    """The integer arguments that both kernels take."""
    return routed.shape[1:].numel(), shared.stride(0), routed.stride(0), shared.shape[0], routed.shape[0]


def merge_experts(shared: list[Tensor], routed: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    coefficients, merged = coefficients.contiguous(), []
    for i, (s, r) in enumerate(_slices(shared, routed)):
        out, sizes = r.new_empty(r.shape[1:]), _sizes(s, r)
        each = _elements(r.dtype)
        launch(_merge, (blocks(sizes[0], each),), r, s, r, coefficients[i], out, *sizes, ACC=wide(r), ELEMENTS=each)
        merged.append(out)
    return merged


def merge_experts_dots(grads: list[Tensor], shared: list[Tensor], routed: list[Tensor]) -> Tensor:
    like, n = routed[0], len(routed)
    experts = shared[0].shape[0] + like.shape[0]
    dots = like.new_empty((n, experts), dtype=accumulator(like))
    for i, (grad, (s, r)) in enumerate(zip(grads, _slices(shared, routed), strict=True)):
        sizes = _sizes(s, r)
        each = 2 * _elements(r.dtype)
        count = blocks(sizes[0], each)
        partial = dots.new_empty(count, experts)
        launch(_dots, (count,), r, grad.contiguous(), s, r, partial, *sizes, ACC=wide(r), ELEMENTS=each)
        launch(_dots_sum, (experts,), r, partial, dots[i], count, experts, ACC=wide(r), BLOCKS=1024)
    return dots


def merge_experts_grads(
    grad: Tensor, coefficients: Tensor, num_shared: int, need_shared: bool, need_routed: bool
) -> tuple[Tensor, Tensor]:
    grad, coefficients = grad.contiguous(), coefficients.contiguous()
    parts, stride, each = coefficients.shape[0], grad.numel(), _elements(grad.dtype)
    elements = stride // parts

    def of(need: bool, rows: Tensor) -> Tensor:
        out = grad.new_empty((rows.shape[1], *grad.shape) if need else (0,))
        for part in range(parts if out.numel() else 0):
            pointers = grad.view(-1)[part * elements :], rows[part], out.view(-1)[part * elements :]
            sizes = elements, stride, rows.shape[1]
            launch(_grads, (blocks(elements, each),), grad, *pointers, *sizes, ACC=wide(grad), ELEMENTS=each)
        return out

    return of(need_shared, coefficients[:, :num_shared]), of(need_routed, coefficients[:, num_shared:])
