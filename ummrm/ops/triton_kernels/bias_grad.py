"""Triton kernel of the experts' bias gradient: the (weighted) sum of each expert's rows; bound by memory. Rows are
summed by parts of a group, then over the parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import Rows, check_counts, gathered_rows
from .launch import accumulator, blocks, launch, power_of_2, wide


@triton.jit
def _bias_grad(
    shared_rows,
    routed_rows,
    row_index,
    row_weights,
    expert_offsets,
    partial,
    num_tokens,
    width,
    shared_block,
    NUM_SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial [splits, groups, width]: program (columns, group, split) sums each splits-th block of its group."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    g, split = tl.program_id(1), tl.program_id(2)
    inside = n < width
    if g < NUM_SHARED:
        begin = tl.cast(0, tl.int32)
        count, slots = tl.cast(num_tokens, tl.int64), tl.cast(0, tl.int64)
        rows = shared_rows + tl.cast(g, tl.int64) * shared_block * width
        first = g * tl.cast(num_tokens, tl.int64)
    else:
        begin = tl.load(expert_offsets + g - NUM_SHARED)
        count = (tl.load(expert_offsets + g - NUM_SHARED + 1) - begin).to(tl.int64)
        slots = count
        rows = routed_rows
        first = begin + NUM_SHARED * tl.cast(num_tokens, tl.int64)
    total = tl.full([ROWS, COLUMNS], 0.0, ACC)
    for start in range(split * ROWS, count, tl.num_programs(2) * ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < count
        if row_index is None:
            source = (begin + row).to(tl.int64)
        else:
            source = gathered_rows(row_index, begin, row, slots, TOP_K)
        at = source[:, None] * width + n[None, :]
        values = tl.load(rows + at, mask=exists[:, None] & inside[None, :], other=0.0).to(ACC)
        if row_weights is not None:
            values = values * tl.load(row_weights + first + row, mask=exists, other=0.0)[:, None]
        total += values
    at = (tl.cast(split, tl.int64) * tl.num_programs(1) + g) * width + n
    tl.store(partial + at, tl.sum(total, 0), mask=inside)


def bias_grad(
    rows: Rows,
    row_weights: Tensor | None,
    offsets: Tensor,
    num_tokens: int,
    num_shared: int,
    need_shared: bool,
    need_routed: bool,
) -> tuple[Tensor, Tensor]:
    """The sum of every expert's rows, each times its weight: `expert_bias_grad` unchecked, for any Rows."""
    like, width, experts = rows.routed, rows.width, offsets.numel() - 1
    groups = num_shared + experts
    columns = min(power_of_2(width), 128)
    row_block = (1024 if like.dtype == torch.float64 else 2048) // columns  # more of fp64 spills on sm_80
    # Enough programs for a wide GPU where few, long groups alone would not make them; by shapes alone.
    each = blocks(num_shared * num_tokens + rows.slots, max(groups, 1))
    splits = max(1, min(blocks(each, 16 * row_block), blocks(2048, max(groups * blocks(width, columns), 1))))
    partial = like.new_empty((splits, groups, width), dtype=accumulator(like))
    launch(
        _bias_grad,
        (blocks(width, columns), groups, splits),
        like,
        rows.shared,
        rows.routed,
        rows.index,
        row_weights,
        offsets,
        partial,
        num_tokens,
        width,
        rows.block(num_tokens, num_shared),
        NUM_SHARED=num_shared,
        TOP_K=rows.top_k,
        ACC=wide(like),
        ROWS=row_block,
        COLUMNS=columns,
    )
    sums = partial.sum(0).to(like.dtype)
    nothing = like.new_empty(0)
    shared, routed = sums.split([num_shared, experts])
    return shared.clone() if need_shared else nothing, routed.clone() if need_routed else nothing.clone()


def expert_bias_grad(
    shared_rows: Tensor,
    routed_rows: Tensor,
    row_weights: Tensor | None,
    expert_offsets: Tensor,
    num_tokens: int,
    num_shared_experts: int,
    need_shared: bool,
    need_routed: bool,
) -> tuple[Tensor, Tensor]:
    check_counts("expert_bias_grad", routed_rows, num_tokens)
    row_weights = None if row_weights is None else row_weights.contiguous()
    rows = Rows(shared_rows.contiguous(), routed_rows.contiguous())
    needs = num_tokens, num_shared_experts, need_shared, need_routed
    return bias_grad(rows, row_weights, expert_offsets.contiguous(), *needs)
