"""Triton kernel of the experts' up-projection with the activation in its epilogue, on token rows that it gathers as it
loads them. The activation is that of the rounded pre-activation, which backward differentiates; so its bits are those
of the two kernels that this one replaces.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activation import value_and_slope
from .configurations import Configuration
from .expert_gemm import walk
from .groups import Rows, dense, dense_slices, group_table, has_descriptors, place, precision
from .launch import launch, power_of_2, target_of, wide


@triton.jit
def _up_activation(
    x,
    row_index,
    shared_proj,
    routed_proj,
    shared_bias,
    routed_bias,
    expert_offsets,
    pre_activation,  # or None: nothing needs it
    out,
    num_tokens,
    num_slots,
    in_width,
    out_width,  # of the activation
    shared_stride,
    routed_stride,
    KIND: tl.constexpr,
    GLU: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    TMA: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gated, a program has two accumulators: of the projection's gate rows, and of the up rows that lie below them.
    Rows of no expert have a product of length 0, whose activation is 0 too."""
    OUT: tl.constexpr = out.dtype.element_ty
    columns = (out_width + BLOCK_N - 1) // BLOCK_N
    begins, heights, tiles, after = group_table(
        expert_offsets, num_tokens, num_slots, columns, NUM_SHARED, NUM_EXPERTS, GROUPS, BLOCK_M
    )
    pre_width = out_width * (2 if GLU else 1)
    below = tl.cast(out_width, tl.int64) * in_width
    for tile in range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        g, begin, height, tile_m, tile_n = place(tile, begins, heights, tiles, after, columns, GROUPS, BLOCK_M, GROUP)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        e = tl.minimum(g - NUM_SHARED, NUM_EXPERTS - 1)
        row = tl.minimum(m, height - 1)
        if g < NUM_SHARED:
            b = shared_proj + tl.cast(g, tl.int64) * shared_stride
        else:
            b = routed_proj + tl.cast(e, tl.int64) * routed_stride
            row = tl.load(row_index + begin + row) // TOP_K
        k = tl.arange(0, BLOCK_K)
        a = x + row.to(tl.int64)[:, None] * in_width + k[None, :]
        if TMA:
            gates = tl.make_tensor_descriptor(b, [out_width, in_width], [in_width, 1], [BLOCK_N, BLOCK_K])
            ups = tl.make_tensor_descriptor(b + below, [out_width, in_width], [in_width, 1], [BLOCK_N, BLOCK_K])
        else:
            b = b + tl.minimum(n, out_width - 1).to(tl.int64)[None, :] * in_width + k[:, None]
        length = tl.where(g == NUM_SHARED + NUM_EXPERTS, 0, in_width)
        z = tl.full([BLOCK_M, BLOCK_N], 0.0, ACC)
        up = tl.full([BLOCK_M, BLOCK_N], 0.0, ACC)
        for start in range(0, length, BLOCK_K):
            if WHOLE_K:
                of_x = tl.load(a)
            else:
                of_x = tl.load(a, mask=(k < in_width - start)[None, :], other=0.0)
            if TMA:
                of_z = tl.trans(gates.load([tile_n * BLOCK_N, start]))
            elif WHOLE_K:
                of_z = tl.load(b)
            else:
                of_z = tl.load(b, mask=(k < in_width - start)[:, None], other=0.0)
            z = tl.dot(of_x, of_z, z, input_precision=PRECISION, out_dtype=ACC)
            if GLU:
                if TMA:
                    of_up = tl.trans(ups.load([tile_n * BLOCK_N, start]))
                elif WHOLE_K:
                    of_up = tl.load(b + below)
                else:
                    of_up = tl.load(b + below, mask=(k < in_width - start)[:, None], other=0.0)
                up = tl.dot(of_x, of_up, up, input_precision=PRECISION, out_dtype=ACC)
            a += BLOCK_K
            if not TMA:
                b += BLOCK_K

        if shared_bias is not None:
            bias = shared_bias + g * pre_width + n
            limit = tl.where(g < NUM_SHARED, out_width, 0)
            z += tl.load(bias, mask=n < limit, other=0.0).to(ACC)[None, :]
            if GLU:
                up += tl.load(bias + out_width, mask=n < limit, other=0.0).to(ACC)[None, :]
        if routed_bias is not None:
            bias = routed_bias + e * pre_width + n
            limit = tl.where((g >= NUM_SHARED) & (g < NUM_SHARED + NUM_EXPERTS), out_width, 0)
            z += tl.load(bias, mask=n < limit, other=0.0).to(ACC)[None, :]
            if GLU:
                up += tl.load(bias + out_width, mask=n < limit, other=0.0).to(ACC)[None, :]
        # 32-bit offsets from the tile's corner: 64-bit ones would take the registers of another accumulator.
        corner = tl.minimum(g, NUM_SHARED) * tl.cast(num_tokens, tl.int64) + begin + tile_m * BLOCK_M
        i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        inside = (i < height - tile_m * BLOCK_M) & (j < out_width - tile_n * BLOCK_N)
        gate, above = z.to(OUT), up.to(OUT)
        if pre_activation is not None:
            to = pre_activation + corner * pre_width + tile_n * BLOCK_N
            tl.store(to + (i * pre_width + j), gate, mask=inside)
            if GLU:
                tl.store(to + out_width + (i * pre_width + j), above, mask=inside)
        act, _slope = value_and_slope(gate.to(ACC), KIND)
        if GLU:
            act *= above.to(ACC)
        to = out + corner * out_width + tile_n * BLOCK_N
        tl.store(to + (i * out_width + j), act.to(OUT), mask=inside)


def _constants(rows: Rows, shared: Tensor, routed: Tensor, reduction: int, c: Configuration, kind: str, glu: bool):
    groups = shared.shape[0] + routed.shape[0]
    return {
        "KIND": kind,
        "GLU": glu,
        "NUM_SHARED": shared.shape[0],
        "NUM_EXPERTS": routed.shape[0],
        "GROUPS": power_of_2(groups + 1),
        "TOP_K": rows.top_k,
        "WHOLE_K": reduction % c.block_k == 0,
        "TMA": c.tma and has_descriptors(shared, routed),
        "ACC": wide(shared),
        "PRECISION": precision(shared.dtype),
        **c.constants(),
    }


def up_activation(
    rows: Rows,
    shared_proj: Tensor,
    routed_proj: Tensor,
    shared_bias: Tensor | None,
    routed_bias: Tensor | None,
    offsets: Tensor,
    num_tokens: int,
    kind: str,
    glu: bool,
    need_pre_activation: bool,
    c: Configuration,
) -> tuple[Tensor | None, Tensor]:
    """(pre-activation [S*T + T*K, 2I or I] or None, activation [S*T + T*K, I]) of gathered `rows`."""
    shared_proj, routed_proj = dense_slices(shared_proj), dense_slices(routed_proj)
    (num_shared, pre_width, in_width), experts = shared_proj.shape, routed_proj.shape[0]
    width, count = pre_width // (2 if glu else 1), num_shared * num_tokens + rows.slots
    out = rows.routed.new_empty(count, width)
    pre_activation = rows.routed.new_empty(count, pre_width) if need_pre_activation else None
    accumulators = 2 if glu else 1
    launch(
        _up_activation,
        (walk(count, width, num_shared + experts, target_of(out), out.dtype, c, accumulators),),
        out,
        rows.routed,
        rows.index,
        shared_proj,
        routed_proj,
        dense(shared_bias),
        dense(routed_bias),
        offsets,
        pre_activation,
        out,
        num_tokens,
        rows.slots,
        in_width,
        width,
        shared_proj.stride(0),
        routed_proj.stride(0),
        **_constants(rows, shared_proj, routed_proj, in_width, c, kind, glu),
    )
    return pre_activation, out
