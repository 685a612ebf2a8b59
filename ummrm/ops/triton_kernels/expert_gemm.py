"""Triton kernels of the grouped expert GEMM: every expert's product with its own rows, shared experts as groups beside
the routed ones, in one launch; and the weight gradient. Group sizes are read on the device: programs walk over all
groups' tiles, and nothing waits. Rows may be gathered as they are loaded. fp32 products are exact (no TF32) unless
torch is asked for less, by either of its ways.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import Configuration, choose, programs
from .groups import (
    Rows,
    check_counts,
    dense,
    dense_slices,
    gathered_rows,
    group_table,
    has_descriptors,
    place,
    precision,
)
from .launch import blocks, launch, power_of_2, target_of, wide


@triton.jit
def _expert_gemm(
    shared_rows,
    routed_rows,
    row_index,  # of slots, or None where routed rows are in order
    shared_proj,
    routed_proj,
    shared_bias,
    routed_bias,
    expert_offsets,
    out,
    num_tokens,
    num_slots,
    in_width,
    out_width,
    shared_block,  # rows from one shared expert's to the next: T, or 0 where they read the same
    shared_stride,
    routed_stride,
    NUM_SHARED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    WHOLE_K: tl.constexpr,  # the reduction is a multiple of BLOCK_K
    TMA: tl.constexpr,  # projections are read through descriptors
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The last group's product has length 0: zeros."""
    columns = (out_width + BLOCK_N - 1) // BLOCK_N
    begins, heights, tiles, after = group_table(
        expert_offsets, num_tokens, num_slots, columns, NUM_SHARED, NUM_EXPERTS, GROUPS, BLOCK_M
    )
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        g, begin, height, tile_m, tile_n = place(tile, begins, heights, tiles, after, columns, GROUPS, BLOCK_M, GROUP)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        e = tl.minimum(g - NUM_SHARED, NUM_EXPERTS - 1)
        # Rows past the group's end are the last one again: what they give is not stored.
        row = tl.minimum(m, height - 1)
        if g < NUM_SHARED:
            a = shared_rows + tl.cast(g, tl.int64) * shared_block * in_width
            b = shared_proj + tl.cast(g, tl.int64) * shared_stride
        else:
            a = routed_rows
            b = routed_proj + tl.cast(e, tl.int64) * routed_stride
            if row_index is None:
                a = a + tl.cast(begin, tl.int64) * in_width
            else:
                row = tl.load(row_index + begin + row) // TOP_K

        k = tl.arange(0, BLOCK_K)
        a = a + row.to(tl.int64)[:, None] * in_width + k[None, :]
        inside_n = n < out_width
        step = tl.cast(BLOCK_K, tl.int64)
        if TMA:
            if TRANSPOSE:
                box = tl.make_tensor_descriptor(b, [in_width, out_width], [out_width, 1], [BLOCK_K, BLOCK_N])
            else:
                box = tl.make_tensor_descriptor(b, [out_width, in_width], [in_width, 1], [BLOCK_N, BLOCK_K])
        elif TRANSPOSE:
            b = b + k[:, None].to(tl.int64) * out_width + n[None, :]
            step = tl.cast(out_width, tl.int64) * BLOCK_K
        else:
            b = b + tl.minimum(n, out_width - 1).to(tl.int64)[None, :] * in_width + k[:, None]
        length = tl.where(g == NUM_SHARED + NUM_EXPERTS, 0, in_width)
        total = tl.full([BLOCK_M, BLOCK_N], 0.0, ACC)
        for start in range(0, length, BLOCK_K):
            if WHOLE_K:
                x = tl.load(a)
            else:
                x = tl.load(a, mask=(k < in_width - start)[None, :], other=0.0)
            if TMA:
                if TRANSPOSE:
                    y = box.load([start, tile_n * BLOCK_N])
                else:
                    y = tl.trans(box.load([tile_n * BLOCK_N, start]))
            elif TRANSPOSE:
                if WHOLE_K:
                    y = tl.load(b, mask=inside_n[None, :], other=0.0)
                else:
                    y = tl.load(b, mask=(k < in_width - start)[:, None] & inside_n[None, :], other=0.0)
            else:
                if WHOLE_K:
                    y = tl.load(b)
                else:
                    y = tl.load(b, mask=(k < in_width - start)[:, None], other=0.0)
            total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=ACC)
            a += BLOCK_K
            if not TMA:
                b += step

        if shared_bias is not None:
            limit = tl.where(g < NUM_SHARED, out_width, 0)
            total += tl.load(shared_bias + g * out_width + n, mask=n < limit, other=0.0).to(ACC)[None, :]
        if routed_bias is not None:
            limit = tl.where((g >= NUM_SHARED) & (g < NUM_SHARED + NUM_EXPERTS), out_width, 0)
            total += tl.load(routed_bias + e * out_width + n, mask=n < limit, other=0.0).to(ACC)[None, :]
        # `begin` is 0 for a shared expert, whose block is its own number.
        first = tl.minimum(g, NUM_SHARED) * tl.cast(num_tokens, tl.int64) + begin
        at = (first + m)[:, None] * out_width + n[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < height)[:, None] & inside_n[None, :])


@triton.jit
def _wgrad(
    grad_shared,
    grad_routed,
    grad_index,
    shared_rows,
    routed_rows,
    row_index,
    expert_offsets,
    shared_out,
    routed_out,
    num_tokens,
    grad_width,
    width,
    grad_block,  # as above, of the gradients and of the rows
    shared_block,
    first_group,
    NUM_SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad_rows^T @ rows of one group: [grad_width, width], over as many rows as the group has, possibly none."""
    g = tl.program_id(1) + first_group
    tiles_m = (grad_width + BLOCK_M - 1) // BLOCK_M
    tiles_n = (width + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    strip = tile // (GROUP * tiles_n)
    strip_height = tl.minimum(tiles_m - strip * GROUP, GROUP)
    within = tile - strip * GROUP * tiles_n
    m = (strip * GROUP + within % strip_height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // strip_height * BLOCK_N + tl.arange(0, BLOCK_N)
    if g < NUM_SHARED:
        begin = tl.cast(0, tl.int32)
        count = tl.cast(num_tokens, tl.int32)
        slots = tl.cast(0, tl.int32)
        a = grad_shared + tl.cast(g, tl.int64) * grad_block * grad_width
        b = shared_rows + tl.cast(g, tl.int64) * shared_block * width
        out = shared_out + tl.cast(g, tl.int64) * grad_width * width
    else:
        begin = tl.load(expert_offsets + g - NUM_SHARED)
        count = tl.load(expert_offsets + g - NUM_SHARED + 1) - begin
        slots = count
        a, b = grad_routed, routed_rows
        if grad_index is None:
            a = a + tl.cast(begin, tl.int64) * grad_width
        if row_index is None:
            b = b + tl.cast(begin, tl.int64) * width
        out = routed_out + tl.cast(g - NUM_SHARED, tl.int64) * grad_width * width
    k = tl.arange(0, BLOCK_K)
    inside_m, inside_n = m < grad_width, n < width
    if grad_index is None:
        a = a + k.to(tl.int64)[:, None] * grad_width + m[None, :]
    else:
        a = a + m[None, :]
    if row_index is None:
        b = b + k.to(tl.int64)[:, None] * width + n[None, :]
    else:
        b = b + n[None, :]
    total = tl.full([BLOCK_M, BLOCK_N], 0.0, ACC)
    for start in range(0, count, BLOCK_K):
        # Both are masked: the next group's rows may hold NaN, which times zero is no zero.
        inside_k = k < count - start
        of_x, of_y = inside_k[:, None] & inside_m[None, :], inside_k[:, None] & inside_n[None, :]
        if grad_index is None:
            x = tl.load(a, mask=of_x, other=0.0)
            a += tl.cast(grad_width, tl.int64) * BLOCK_K
        else:
            row = gathered_rows(grad_index, begin, start + k, slots, TOP_K)
            x = tl.load(a + row[:, None] * grad_width, mask=of_x, other=0.0)
        if row_index is None:
            y = tl.load(b, mask=of_y, other=0.0)
            b += tl.cast(width, tl.int64) * BLOCK_K
        else:
            row = gathered_rows(row_index, begin, start + k, slots, TOP_K)
            y = tl.load(b + row[:, None] * width, mask=of_y, other=0.0)
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION, out_dtype=ACC)
    at = m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def walk(out_rows: int, out_width: int, groups: int, target, dtype, c: Configuration, accumulators: int = 1) -> int:
    """How many programs walk over the tiles of all `groups` and the rows of no expert: as many as the device holds at
    a time, but no more than there are tiles: a bound that needs no group's size, since every group may end in a tile
    that is not full."""
    tiles = (blocks(out_rows, c.block_m) + groups + 1) * blocks(out_width, c.block_n)
    resident = target.processors * programs(target.arch, dtype, c, accumulators)
    return min(tiles, resident) if out_rows * out_width else 0


def product(
    rows: Rows,
    shared_proj: Tensor,
    routed_proj: Tensor,
    offsets: Tensor,
    num_tokens: int,
    shared_bias: Tensor | None = None,
    routed_bias: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """Every expert's rows times its projection, [S*T + T*K, out]: `expert_gemm` unchecked, for any Rows."""
    (num_shared, n, d), experts = shared_proj.shape, routed_proj.shape[0]
    in_width, out_width = (n, d) if transpose else (d, n)
    shared_proj, routed_proj = dense_slices(shared_proj), dense_slices(routed_proj)
    out = rows.routed.new_empty(num_shared * num_tokens + rows.slots, out_width)
    target, dtype, groups = target_of(out), out.dtype, num_shared + experts
    each = blocks(out.shape[0], max(groups, 1))
    c = choose("transposed_rows" if transpose else "rows", target, dtype, each, 0, out_width, in_width)
    launch(
        _expert_gemm,
        (walk(*out.shape, groups, target, dtype, c),),
        out,
        rows.shared,
        rows.routed,
        rows.index,
        shared_proj,
        routed_proj,
        dense(shared_bias),
        dense(routed_bias),
        offsets,
        out,
        num_tokens,
        rows.slots,
        in_width,
        out_width,
        rows.block(num_tokens, num_shared),
        shared_proj.stride(0),
        routed_proj.stride(0),
        NUM_SHARED=num_shared,
        NUM_EXPERTS=experts,
        GROUPS=power_of_2(groups + 1),
        TOP_K=rows.top_k,
        TRANSPOSE=transpose,
        WHOLE_K=in_width % c.block_k == 0,
        TMA=c.tma and has_descriptors(shared_proj, routed_proj),
        ACC=wide(out),
        PRECISION=precision(dtype),
        **c.constants(),
    )
    return out


def weight_grad(
    grads: Rows,
    rows: Rows,
    offsets: Tensor,
    num_tokens: int,
    num_shared: int,
    need_shared: bool,
    need_routed: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """grads^T @ rows of every expert: `expert_gemm_wgrad` unchecked, for any Rows."""
    grad_width, width, experts, like = grads.width, rows.width, offsets.numel() - 1, rows.routed
    shared = like.new_empty((num_shared, grad_width, width) if need_shared else 0, dtype=out_dtype)
    routed = like.new_empty((experts, grad_width, width) if need_routed else 0, dtype=out_dtype)
    first = 0 if need_shared else num_shared
    groups = (num_shared if need_shared else 0) + (experts if need_routed else 0)
    each = blocks(num_shared * num_tokens + rows.slots, max(num_shared + experts, 1))
    c = choose("wgrad", target_of(like), like.dtype, each, grad_width, width, 0)
    launch(
        _wgrad,
        (blocks(grad_width, c.block_m) * blocks(width, c.block_n), groups),
        like,
        grads.shared,
        grads.routed,
        grads.index,
        rows.shared,
        rows.routed,
        rows.index,
        offsets,
        shared,
        routed,
        num_tokens,
        grad_width,
        width,
        grads.block(num_tokens, num_shared),
        rows.block(num_tokens, num_shared),
        first,
        NUM_SHARED=num_shared,
        TOP_K=grads.top_k if rows.index is None else rows.top_k,
        ACC=wide(like),
        PRECISION=precision(like.dtype),
        **c.constants(),
    )
    return shared, routed


def expert_gemm(
    shared_rows: Tensor,
    routed_rows: Tensor,
    shared_proj: Tensor,
    routed_proj: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    shared_bias: Tensor | None = None,
    routed_bias: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    check_counts("expert_gemm", routed_rows, num_tokens)
    rows = Rows(shared_rows.contiguous(), routed_rows.contiguous())
    parameters = shared_proj, routed_proj, expert_offsets.contiguous(), num_tokens, shared_bias, routed_bias
    return product(rows, *parameters, transpose)


def expert_gemm_wgrad(
    grad_shared_rows: Tensor,
    grad_routed_rows: Tensor,
    shared_rows: Tensor,
    routed_rows: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    num_shared_experts: int,
    need_shared: bool,
    need_routed: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    check_counts("expert_gemm_wgrad", routed_rows, num_tokens)
    grads = Rows(grad_shared_rows.contiguous(), grad_routed_rows.contiguous())
    rows = Rows(shared_rows.contiguous(), routed_rows.contiguous())
    needs = num_tokens, num_shared_experts, need_shared, need_routed
    return weight_grad(grads, rows, expert_offsets.contiguous(), *needs, out_dtype)


def expert_gemm_wgrad_add(*arguments) -> None:
    """A product, then a sum: the gradient is written and read once more."""
    *rows, shared_sum, routed_sum = arguments
    for i, total in enumerate((shared_sum, routed_sum)):
        if total is not None:
            total.add_(expert_gemm_wgrad(*rows, i == 0, i == 1, total.dtype)[i])
