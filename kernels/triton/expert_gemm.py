"""Triton kernels of the grouped expert GEMM: every expert's product with its own rows, shared experts as groups beside
the routed ones, in one launch. Group sizes are read on the device: programs walk over all groups' tiles, and nothing
waits. fp32 products are exact (no TF32) unless torch is asked for less, by either of its ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .checks import Checker
from .configurations import choose
from .launch import accumulator, blocks, launch, power_of_2, target_of, wide


@triton.jit
def _expert_gemm(
    shared_rows,
    routed_rows,
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
    GROUPS: tl.constexpr,  # a power of two
    TRANSPOSE: tl.constexpr,
    WHOLE_K: tl.constexpr,  # the reduction is a multiple of BLOCK_K
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Groups: the shared experts, the routed ones, and last the rows of no expert, a product of length 0: zeros."""
    group = tl.arange(0, GROUPS)
    shared = group < NUM_SHARED
    expert = group - NUM_SHARED
    begins = tl.load(expert_offsets + expert, mask=(expert >= 0) & (expert <= NUM_EXPERTS), other=0)
    ends = tl.load(expert_offsets + expert + 1, mask=(expert >= 0) & (expert < NUM_EXPERTS), other=0)
    ends = tl.where(expert == NUM_EXPERTS, num_slots, ends)
    heights = tl.where(shared, num_tokens, ends - begins)
    columns = (out_width + BLOCK_N - 1) // BLOCK_N
    tiles = (heights + BLOCK_M - 1) // BLOCK_M * columns
    after = tl.cumsum(tiles, 0)  # tiles of this group and those before it

    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        g = tl.sum((after <= tile).to(tl.int32), 0)
        here = group == g
        height = tl.sum(tl.where(here, heights, 0), 0)
        begin = tl.sum(tl.where(here, begins, 0), 0)
        local = tile - tl.sum(tl.where(here, after - tiles, 0), 0)
        # Strips of GROUP tile rows, each walked column by column.
        strip = local // (GROUP * columns)
        strip_height = tl.minimum((height + BLOCK_M - 1) // BLOCK_M - strip * GROUP, GROUP)
        within = local - strip * GROUP * columns
        m = (strip * GROUP + within % strip_height) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = within // strip_height * BLOCK_N + tl.arange(0, BLOCK_N)
        e = tl.minimum(g - NUM_SHARED, NUM_EXPERTS - 1)
        if g < NUM_SHARED:
            a = shared_rows + tl.cast(g, tl.int64) * shared_block * in_width
            b = shared_proj + tl.cast(g, tl.int64) * shared_stride
        else:
            a = routed_rows + tl.cast(begin, tl.int64) * in_width
            b = routed_proj + tl.cast(e, tl.int64) * routed_stride

        # Rows past the group's end are the last one again: what they give is not stored.
        row = tl.minimum(m, height - 1).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        a = a + row[:, None] * in_width + k[None, :]
        inside_n = n < out_width
        if TRANSPOSE:
            b = b + k[:, None].to(tl.int64) * out_width + n[None, :]
            step = tl.cast(out_width, tl.int64) * BLOCK_K
        else:
            b = b + tl.minimum(n, out_width - 1).to(tl.int64)[None, :] * in_width + k[:, None]
            step = tl.cast(BLOCK_K, tl.int64)
        length = tl.where(g == NUM_SHARED + NUM_EXPERTS, 0, in_width)
        total = tl.full([BLOCK_M, BLOCK_N], 0.0, ACC)
        for start in range(0, length, BLOCK_K):
            if WHOLE_K:
                x = tl.load(a)
            else:
                x = tl.load(a, mask=(k < in_width - start)[None, :], other=0.0)
            if TRANSPOSE:
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
    shared_rows,
    routed_rows,
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
        count = tl.cast(num_tokens, tl.int32)
        a = grad_shared + tl.cast(g, tl.int64) * grad_block * grad_width
        b = shared_rows + tl.cast(g, tl.int64) * shared_block * width
        out = shared_out + tl.cast(g, tl.int64) * grad_width * width
    else:
        begin = tl.load(expert_offsets + g - NUM_SHARED)
        count = tl.load(expert_offsets + g - NUM_SHARED + 1) - begin
        a = grad_routed + tl.cast(begin, tl.int64) * grad_width
        b = routed_rows + tl.cast(begin, tl.int64) * width
        out = routed_out + tl.cast(g - NUM_SHARED, tl.int64) * grad_width * width
    k = tl.arange(0, BLOCK_K)
    inside_m, inside_n = m < grad_width, n < width
    a = a + k.to(tl.int64)[:, None] * grad_width + m[None, :]
    b = b + k.to(tl.int64)[:, None] * width + n[None, :]
    total = tl.full([BLOCK_M, BLOCK_N], 0.0, ACC)
    for start in range(0, count, BLOCK_K):
        # Both are masked: the next group's rows may hold NaN, which times zero is no zero.
        inside_k = k < count - start
        x = tl.load(a, mask=inside_k[:, None] & inside_m[None, :], other=0.0)
        y = tl.load(b, mask=inside_k[:, None] & inside_n[None, :], other=0.0)
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION, out_dtype=ACC)
        a += tl.cast(grad_width, tl.int64) * BLOCK_K
        b += tl.cast(width, tl.int64) * BLOCK_K
    at = m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


@triton.jit
def _bias_grad(
    shared_rows,
    routed_rows,
    row_weights,
    expert_offsets,
    partial,
    num_tokens,
    width,
    shared_block,
    NUM_SHARED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial [splits, groups, width]: program (columns, group, split) sums each splits-th block of its group."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    g, split = tl.program_id(1), tl.program_id(2)
    inside = n < width
    if g < NUM_SHARED:
        count = tl.cast(num_tokens, tl.int32)
        rows = shared_rows + tl.cast(g, tl.int64) * shared_block * width
        first = g * tl.cast(num_tokens, tl.int64)
    else:
        begin = tl.load(expert_offsets + g - NUM_SHARED)
        count = tl.load(expert_offsets + g - NUM_SHARED + 1) - begin
        rows = routed_rows + tl.cast(begin, tl.int64) * width
        first = begin + NUM_SHARED * tl.cast(num_tokens, tl.int64)
    total = tl.full([ROWS, COLUMNS], 0.0, ACC)
    for start in range(split * ROWS, count, tl.num_programs(2) * ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < count
        at = row.to(tl.int64)[:, None] * width + n[None, :]
        values = tl.load(rows + at, mask=exists[:, None] & inside[None, :], other=0.0).to(ACC)
        if row_weights is not None:
            values = values * tl.load(row_weights + first + row, mask=exists, other=0.0)[:, None]
        total += values
    at = (tl.cast(split, tl.int64) * tl.num_programs(1) + g) * width + n
    tl.store(partial + at, tl.sum(total, 0), mask=inside)


def _check_rows(
    check: Checker,
    shared_name: str,
    shared: Tensor,
    routed_name: str,
    routed: Tensor,
    num_tokens: int,
    num_shared: int,
    slots: int,
    width: int,
) -> None:
    check.floating(routed_name, routed)
    check.shape(routed_name, routed, (slots, width), "[T*K, width]", "pass the rows that permute returned")
    check.device(shared_name, shared, routed, routed_name)
    check.dtype(shared_name, shared, routed.dtype, "rows and projections share a dtype")
    repeated = shared.dim() == 2 and shared.shape[0] == num_shared * num_tokens
    shape = (num_shared * num_tokens if repeated else num_tokens, routed.shape[1])
    remedy = "pass one row a token, or one a token and shared expert"
    check.shape(shared_name, shared, shape, "[T, width] or [S*T, width]", remedy)


def _check_groups(check: Checker, offsets: Tensor, rows: Tensor, slots: int, num_tokens: int, num_shared: int) -> int:
    check.at_least("num_tokens", num_tokens, 0)
    check.at_least("num_shared_experts", num_shared, 0)
    check.index("expert_offsets", offsets, -1, "[E + 1]", rows, "routed_rows")
    check.offsets(offsets, slots)
    return offsets.numel() - 1


def _slots(rows: Tensor) -> int:
    return rows.shape[0] if rows.dim() == 2 else -1


def _block(rows: Tensor, num_tokens: int, num_shared: int) -> int:
    """Rows from one shared expert's block to the next: 0 if all read the same."""
    return 0 if rows.shape[0] == num_tokens and num_shared != 1 else num_tokens


def _precision(dtype: torch.dtype) -> str:
    """Of fp32 products; AMD's have no other. torch.get_float32_matmul_precision raises where any program has set the
    precision by torch's newer names, which this one knows beside the older."""
    asked = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked and dtype == torch.float32 else "ieee"


def _dense_slices(proj: Tensor) -> Tensor:
    """An expert's projection must be contiguous; the stride from expert to expert is free."""
    return proj if proj.shape[0] == 0 or proj[0].is_contiguous() else proj.contiguous()


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
    check = Checker("expert_gemm")
    check.shape("shared_proj", shared_proj, (-1, -1, -1), "[S, N, D]", "stack the experts' projections")
    (num_shared, n, d), slots = shared_proj.shape, _slots(routed_rows)
    in_width, out_width = (n, d) if transpose else (d, n)
    pair = "shared_rows", shared_rows, "routed_rows", routed_rows
    _check_rows(check, *pair, num_tokens, num_shared, slots, in_width)
    experts = _check_groups(check, expert_offsets, routed_rows, slots, num_tokens, num_shared)
    for name, tensor, shape, words in (
        ("shared_proj", shared_proj, (-1, -1, -1), "[S, N, D]"),
        ("routed_proj", routed_proj, (experts, n, d), "[E, N, D]"),
        ("shared_bias", shared_bias, (num_shared, out_width), "[S, N]"),
        ("routed_bias", routed_bias, (experts, out_width), "[E, N]"),
    ):
        if tensor is not None:
            check.device(name, tensor, routed_rows, "routed_rows")
            check.dtype(name, tensor, routed_rows.dtype, "rows and projections share a dtype")
            check.shape(name, tensor, shape, words, "the experts' parameters must fit the rows")
            bias = transpose and name.endswith("bias")
            remedy = "an input gradient has no bias"
            check.value(not bias, name, "be None with transpose=True", "a tensor", remedy)

    shared_proj, routed_proj = _dense_slices(shared_proj), _dense_slices(routed_proj)
    out = routed_rows.new_empty(num_shared * num_tokens + slots, out_width)
    target, dtype = target_of(out), out.dtype
    rows = blocks(out.shape[0], max(num_shared + experts, 1))
    kind = "transposed_rows" if transpose else "rows"
    c = choose(kind, target, dtype, rows, 0, out_width, in_width)
    # A bound on the number of tiles that needs no group's size: every group may end in a tile that is not full.
    tiles = (blocks(out.shape[0], c.block_m) + num_shared + experts + 1) * blocks(out_width, c.block_n)
    launch(
        _expert_gemm,
        (min(tiles, target.processors) if out.numel() else 0,),
        out,
        *(rows.contiguous() for rows in (shared_rows, routed_rows)),
        shared_proj,
        routed_proj,
        None if shared_bias is None else shared_bias.contiguous(),
        None if routed_bias is None else routed_bias.contiguous(),
        expert_offsets.contiguous(),
        out,
        num_tokens,
        slots,
        in_width,
        out_width,
        _block(shared_rows, num_tokens, num_shared),
        shared_proj.stride(0),
        routed_proj.stride(0),
        NUM_SHARED=num_shared,
        NUM_EXPERTS=experts,
        GROUPS=power_of_2(num_shared + experts + 1),
        TRANSPOSE=transpose,
        WHOLE_K=in_width % c.block_k == 0,
        ACC=wide(out),
        PRECISION=_precision(dtype),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        GROUP=c.group,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    return out


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
) -> tuple[Tensor, Tensor]:
    check, slots = Checker("expert_gemm_wgrad"), _slots(routed_rows)
    sizes = num_tokens, num_shared_experts, slots, -1
    _check_rows(check, "shared_rows", shared_rows, "routed_rows", routed_rows, *sizes)
    _check_rows(check, "grad_shared_rows", grad_shared_rows, "grad_routed_rows", grad_routed_rows, *sizes)
    remedy = "rows and their gradients share a dtype"
    check.dtype("grad_routed_rows", grad_routed_rows, routed_rows.dtype, remedy)
    check.device("grad_routed_rows", grad_routed_rows, routed_rows, "routed_rows")
    experts = _check_groups(check, expert_offsets, routed_rows, slots, num_tokens, num_shared_experts)
    grad_width, width = grad_routed_rows.shape[1], routed_rows.shape[1]
    shared = routed_rows.new_empty((num_shared_experts, grad_width, width) if need_shared else 0)
    routed = routed_rows.new_empty((experts, grad_width, width) if need_routed else 0)
    first = 0 if need_shared else num_shared_experts
    groups = (num_shared_experts if need_shared else 0) + (experts if need_routed else 0)
    rows = blocks(num_shared_experts * num_tokens + slots, max(num_shared_experts + experts, 1))
    c = choose("wgrad", target_of(routed_rows), routed_rows.dtype, rows, grad_width, width, 0)
    launch(
        _wgrad,
        (blocks(grad_width, c.block_m) * blocks(width, c.block_n), groups),
        routed_rows,
        *(t.contiguous() for t in (grad_shared_rows, grad_routed_rows, shared_rows, routed_rows, expert_offsets)),
        shared,
        routed,
        num_tokens,
        grad_width,
        width,
        _block(grad_shared_rows, num_tokens, num_shared_experts),
        _block(shared_rows, num_tokens, num_shared_experts),
        first,
        NUM_SHARED=num_shared_experts,
        ACC=wide(routed_rows),
        PRECISION=_precision(routed_rows.dtype),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        GROUP=c.group,
        num_warps=c.warps,
        num_stages=c.stages,
    )
    return shared, routed


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
    check, slots = Checker("expert_bias_grad"), _slots(routed_rows)
    pair = "shared_rows", shared_rows, "routed_rows", routed_rows
    _check_rows(check, *pair, num_tokens, num_shared_experts, slots, -1)
    experts = _check_groups(check, expert_offsets, routed_rows, slots, num_tokens, num_shared_experts)
    if row_weights is not None:
        shape = (num_shared_experts * num_tokens + slots,)
        check.gate_weights("row_weights", row_weights, routed_rows, "routed_rows", shape, "[S*T + T*K]")
        row_weights = row_weights.contiguous()
    width, groups = routed_rows.shape[1], num_shared_experts + experts
    columns = min(power_of_2(width), 128)
    row_block = 2048 // columns
    # Enough programs for a wide GPU where few, long groups alone would not make them; by shapes alone.
    rows = blocks(num_shared_experts * num_tokens + slots, max(groups, 1))
    splits = max(1, min(blocks(rows, 16 * row_block), blocks(2048, max(groups * blocks(width, columns), 1))))
    partial = routed_rows.new_empty((splits, groups, width), dtype=accumulator(routed_rows))
    launch(
        _bias_grad,
        (blocks(width, columns), groups, splits),
        routed_rows,
        shared_rows.contiguous(),
        routed_rows.contiguous(),
        row_weights,
        expert_offsets.contiguous(),
        partial,
        num_tokens,
        width,
        _block(shared_rows, num_tokens, num_shared_experts),
        NUM_SHARED=num_shared_experts,
        ACC=wide(routed_rows),
        ROWS=row_block,
        COLUMNS=columns,
    )
    sums = partial.sum(0).to(routed_rows.dtype)
    nothing = routed_rows.new_empty(0)
    shared, routed = sums.split([num_shared_experts, experts])
    return shared.clone() if need_shared else nothing, routed.clone() if need_routed else nothing.clone()
