"""Triton kernels that move token rows into expert order and back, bound by memory: a gather of rows, the gated sum of
each token's expert rows, and its backward. How many sorted rows are live is read on the device, so nothing waits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .checks import check_rows
from .launch import accumulator, blocks, launch, tile, wide

_COPY, _SUM = 4096, 2048  # elements of a program's tile


@triton.jit
def _permute(
    x, sorted_to_slot, live_rows, out, num_rows, width, TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists, inside = row < num_rows, column < width
    live = exists & (row < tl.load(live_rows))
    token = tl.load(sorted_to_slot + row, mask=live, other=0) // TOP_K
    at = token.to(tl.int64)[:, None] * width + column[None, :]
    values = tl.load(x + at, mask=live[:, None] & inside[None, :], other=0.0)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + at, values, mask=exists[:, None] & inside[None, :])


@triton.jit
def _unpermute(
    rows,
    slot_to_sorted,
    live_rows,
    shared_weight,
    routed_weights,
    out,
    num_tokens,
    width,
    NUM_SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists, inside = token < num_tokens, column < width
    both = exists[:, None] & inside[None, :]
    live = tl.load(live_rows)
    total = tl.full([TOKENS, COLUMNS], 0.0, ACC)
    for s in range(NUM_SHARED):
        at = (token.to(tl.int64) + s * tl.cast(num_tokens, tl.int64))[:, None] * width + column[None, :]
        total += tl.load(rows + at, mask=both, other=0.0).to(ACC)
    if shared_weight is not None:
        total = total * (tl.load(shared_weight + token, mask=exists, other=0.0) / NUM_SHARED)[:, None]
    first = NUM_SHARED * tl.cast(num_tokens, tl.int64)
    for k in range(TOP_K):
        slot = token * TOP_K + k
        row = tl.load(slot_to_sorted + slot, mask=exists, other=0)
        used = exists & (row < live)
        at = (first + row)[:, None] * width + column[None, :]
        values = tl.load(rows + at, mask=used[:, None] & inside[None, :], other=0.0).to(ACC)
        if routed_weights is not None:
            values = values * tl.load(routed_weights + slot, mask=used, other=0.0)[:, None]
        total += values
    at = token.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=both)


@triton.jit
def _unpermute_backward(
    grad_out,
    rows,
    slot_to_sorted,
    live_rows,
    shared_weight,
    routed_weights,
    grad_rows,
    grad_shared_weight,
    grad_routed_weights,
    num_tokens,
    width,
    NUM_SHARED: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (tokens, k) serves the k-th slot of its tokens; k = TOP_K their rows of all shared experts."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1)
    exists = token < num_tokens
    dots = tl.full([TOKENS, COLUMNS], 0.0, ACC)
    if k == TOP_K:
        scale = tl.full([TOKENS], 1.0, ACC)
        if shared_weight is not None:
            scale = tl.load(shared_weight + token, mask=exists, other=0.0) / NUM_SHARED
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            both = exists[:, None] & (column < width)[None, :]
            at = token.to(tl.int64)[:, None] * width + column[None, :]
            g = tl.load(grad_out + at, mask=both, other=0.0).to(ACC)
            total = tl.full([TOKENS, COLUMNS], 0.0, ACC)
            for s in range(NUM_SHARED):
                at = (token.to(tl.int64) + s * tl.cast(num_tokens, tl.int64))[:, None] * width + column[None, :]
                tl.store(grad_rows + at, (g * scale[:, None]).to(grad_rows.dtype.element_ty), mask=both)
                if shared_weight is not None:
                    total += tl.load(rows + at, mask=both, other=0.0).to(ACC)
            dots += g * total
        if shared_weight is not None:
            tl.store(grad_shared_weight + token, tl.sum(dots, 1) / NUM_SHARED, mask=exists)
    else:
        slot = token * TOP_K + k
        row = tl.load(slot_to_sorted + slot, mask=exists, other=0)
        live = exists & (row < tl.load(live_rows))
        scale = tl.full([TOKENS], 1.0, ACC)
        if routed_weights is not None:
            scale = tl.load(routed_weights + slot, mask=live, other=0.0)
        first = NUM_SHARED * tl.cast(num_tokens, tl.int64)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (column < width)[None, :]
            at = token.to(tl.int64)[:, None] * width + column[None, :]
            g = tl.load(grad_out + at, mask=live[:, None] & inside, other=0.0).to(ACC)
            at = (first + row)[:, None] * width + column[None, :]
            tl.store(grad_rows + at, (g * scale[:, None]).to(grad_rows.dtype.element_ty), mask=exists[:, None] & inside)
            if routed_weights is not None:
                dots += g * tl.load(rows + at, mask=live[:, None] & inside, other=0.0).to(ACC)
        if routed_weights is not None:
            tl.store(grad_routed_weights + slot, tl.sum(dots, 1), mask=exists)


def permute(x: Tensor, sorted_to_slot: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    width, slots = x.shape[1], x.shape[0] * top_k
    check_rows("permute", "x", slots)
    out = x.new_empty(slots, width)
    rows, columns = tile(width, _COPY, x.dtype)
    launch(
        _permute,
        (blocks(slots, rows), blocks(width, columns)),
        x,
        x.contiguous(),
        sorted_to_slot.contiguous(),
        expert_offsets[-1:],
        out,
        slots,
        width,
        TOP_K=top_k,
        ROWS=rows,
        COLUMNS=columns,
    )
    return out


def unpermute(
    rows: Tensor,
    slot_to_sorted: Tensor,
    expert_offsets: Tensor,
    shared_weight: Tensor | None,
    routed_weights: Tensor | None,
    num_shared_experts: int,
    top_k: int,
) -> Tensor:
    check_rows("unpermute", "slot_to_sorted", slot_to_sorted.numel())
    tokens, width = slot_to_sorted.numel() // top_k, rows.shape[1]
    if num_shared_experts == 0:
        shared_weight = None
    out = rows.new_empty(tokens, width)
    each, columns = tile(width, _SUM, rows.dtype)
    launch(
        _unpermute,
        (blocks(tokens, each), blocks(width, columns)),
        rows,
        rows.contiguous(),
        slot_to_sorted.contiguous(),
        expert_offsets[-1:],
        None if shared_weight is None else shared_weight.contiguous(),
        None if routed_weights is None else routed_weights.contiguous(),
        out,
        tokens,
        width,
        NUM_SHARED=num_shared_experts,
        TOP_K=top_k,
        ACC=wide(rows),
        TOKENS=each,
        COLUMNS=columns,
    )
    return out


def unpermute_backward(
    grad_out: Tensor,
    rows: Tensor,
    slot_to_sorted: Tensor,
    expert_offsets: Tensor,
    shared_weight: Tensor | None,
    routed_weights: Tensor | None,
    num_shared_experts: int,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows("unpermute_backward", "slot_to_sorted", slot_to_sorted.numel())
    tokens, width, acc = slot_to_sorted.numel() // top_k, rows.shape[1], accumulator(rows)
    grad_rows = rows.new_empty(rows.shape)
    grad_shared = rows.new_empty(0 if shared_weight is None else tokens, dtype=acc)
    grad_routed = rows.new_empty(0 if routed_weights is None else (tokens, top_k), dtype=acc)
    if num_shared_experts == 0 and shared_weight is not None:
        shared_weight = None
        grad_shared.zero_()
    each, columns = tile(width, _SUM, rows.dtype)
    launch(
        _unpermute_backward,
        (blocks(tokens, each), top_k + (num_shared_experts > 0)),
        rows,
        grad_out.contiguous(),
        rows.contiguous(),
        slot_to_sorted.contiguous(),
        expert_offsets[-1:],
        None if shared_weight is None else shared_weight.contiguous(),
        None if routed_weights is None else routed_weights.contiguous(),
        grad_rows,
        grad_shared,
        grad_routed,
        tokens,
        width,
        NUM_SHARED=num_shared_experts,
        TOP_K=top_k,
        ACC=wide(rows),
        TOKENS=each,
        COLUMNS=columns,
    )
    return grad_rows, grad_shared, grad_routed
