"""Triton kernels of routing: softmax, top-k, gate weights and statistics of every token; their backward; and the stable
sort of slots by expert. A program holds a tile [tokens, experts] in registers. Statistics and counts are summed by
block and then, in one more launch, over blocks in order: the cut into blocks depends on the number of tokens alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_rows
from .launch import accumulator, blocks, launch, power_of_2, wide

_TILE = 1024  # elements of a program's tile of logits; a quarter of its table of slots by expert


@triton.jit
def _softmax(logits, token, expert, live, num_experts, ACC: tl.constexpr):
    """(logits, softmax, logsumexp, whether all of it is NaN) of a tile; a token that is not live reads as zeros."""
    held = expert < num_experts
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    x = tl.load(logits + at, mask=live[:, None] & held[None, :], other=0.0).to(ACC)
    largest = tl.max(tl.where(held[None, :], x, float("-inf")), 1)
    p = tl.where(held[None, :], tl.exp(x - largest[:, None]), 0.0)
    total = tl.sum(p, 1)
    nan = total != total  # from a NaN or +inf logit, or from -inf alone
    infinite = (largest == float("inf")) | (largest == float("-inf"))
    lse = tl.where(infinite, largest, largest + tl.log(total))
    has_nan = tl.max((x != x).to(tl.int32), 1) > 0  # which the largest may hide behind an infinity
    return x, p / total[:, None], tl.where(has_nan, float("nan"), lse), nan


@triton.jit
def _shares(p, rank, FIXED: tl.constexpr):
    """(largest probability, shares of the chosen experts, their scale, sum of the shares before they sum to one):
    routed_j = scale * share_j."""
    top = tl.sum(tl.where(rank == 0, p, 0.0), 1)
    if FIXED is None:
        share = tl.where(rank >= 0, tl.exp(p - top[:, None]), 0.0)
        scale = top
    else:
        share = tl.where(rank >= 0, p, 0.0)
        scale = top * 0.0 + (1 - FIXED)
    total = tl.sum(share, 1)
    return top, share / total[:, None], scale, total


@triton.jit
def _route(
    logits,
    clean,
    mask,
    shared_weight,
    routed_weights,
    expert_indices,
    block_prob,
    block_z,
    block_slots,
    block_live,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    FIXED: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    held = expert < num_experts
    exists = token < num_tokens
    live = exists
    if mask is not None:
        live = exists & (tl.load(mask + token, mask=exists, other=0) != 0)
    x, p, lse, nan = _softmax(logits, token, expert, live, num_experts, ACC)

    # Logits are ranked, not p, so that the choice is free of how exp rounds; ties go to the lower index. A row whose p
    # is NaN ranks by index.
    scores = tl.where(nan[:, None], 0.0, x)
    rank = tl.full([TOKENS, EXPERTS], -1, tl.int32)
    for k in range(TOP_K):
        free = held[None, :] & (rank < 0)
        best = tl.max(tl.where(free, scores, float("-inf")), 1)
        first = tl.min(tl.where(free & (scores == best[:, None]), expert[None, :], EXPERTS), 1)
        rank = tl.where(expert[None, :] == first[:, None], k, rank)

    top, share, scale, _total = _shares(p, rank, FIXED)
    shared = 1.0 - top
    if FIXED is not None:
        shared = top * 0.0 + FIXED
        shared = tl.where(nan, shared, FIXED)
    tl.store(shared_weight + token, tl.where(live, shared, 1.0), mask=exists)
    slot = token[:, None] * TOP_K + rank
    chosen = exists[:, None] & (rank >= 0)
    tl.store(routed_weights + slot, tl.where(live[:, None], scale[:, None] * share, 0.0), mask=chosen)
    tl.store(expert_indices + slot, tl.where(live[:, None], expert[None, :], -1), mask=chosen)

    if clean is not None:
        x, p, lse, nan = _softmax(clean, token, expert, live, num_experts, ACC)
    of_live = live[:, None] & held[None, :]
    at = block.to(tl.int64) * num_experts + expert
    tl.store(block_prob + at, tl.sum(tl.where(of_live, p, 0.0), 0).to(tl.float64), mask=held)
    tl.store(block_slots + at, tl.sum((live[:, None] & (rank >= 0)).to(tl.int32), 0), mask=held)
    tl.store(block_z + block, tl.sum(tl.where(live, lse * lse, 0.0), 0).to(tl.float64))
    tl.store(block_live + block, tl.sum(live.to(tl.int32), 0))


@triton.jit
def _route_statistics(
    block_prob,
    block_z,
    block_slots,
    block_live,
    tokens_per_expert,
    mean_prob,
    mean_z,
    num_blocks,
    num_experts,
    ACC: tl.constexpr,
    BLOCKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    held = expert < num_experts
    prob = tl.full([BLOCKS, EXPERTS], 0.0, tl.float64)
    slots = tl.full([BLOCKS, EXPERTS], 0, tl.int32)
    z = tl.full([BLOCKS], 0.0, tl.float64)
    live = tl.full([BLOCKS], 0, tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        exists = block < num_blocks
        at = block.to(tl.int64)[:, None] * num_experts + expert[None, :]
        both = exists[:, None] & held[None, :]
        prob += tl.load(block_prob + at, mask=both, other=0.0)
        slots += tl.load(block_slots + at, mask=both, other=0)
        z += tl.load(block_z + block, mask=exists, other=0.0)
        live += tl.load(block_live + block, mask=exists, other=0)
    count = tl.maximum(tl.sum(live, 0), 1).to(tl.float64)
    tl.store(mean_prob + expert, (tl.sum(prob, 0) / count).to(ACC), mask=held)
    tl.store(tokens_per_expert + expert, tl.sum(slots, 0), mask=held)
    tl.store(mean_z, (tl.sum(z, 0) / count).to(ACC))


@triton.jit
def _route_backward(
    grad_shared_weight,
    grad_routed_weights,
    grad_mean_prob,
    grad_mean_z,
    logits,
    clean,
    mask,
    expert_indices,
    tokens_per_expert,
    grad_logits,
    grad_clean,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    FIXED: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    held = expert < num_experts
    exists = token < num_tokens
    live = exists
    if mask is not None:
        live = exists & (tl.load(mask + token, mask=exists, other=0) != 0)
    slots = tl.sum(tl.load(tokens_per_expert + expert, mask=held, other=0), 0)
    count = tl.maximum(slots // TOP_K, 1).to(ACC)

    rank = tl.full([TOKENS, EXPERTS], -1, tl.int32)
    g = tl.full([TOKENS, EXPERTS], 0.0, ACC)
    for k in range(TOP_K):
        slot = token * TOP_K + k
        hit = expert[None, :] == tl.load(expert_indices + slot, mask=live, other=-1)[:, None]
        rank = tl.where(hit, k, rank)
        g = tl.where(hit, tl.load(grad_routed_weights + slot, mask=live, other=0.0)[:, None], g)
    x, p, lse, nan = _softmax(logits, token, expert, live, num_experts, ACC)
    top, share, scale, total = _shares(p, rank, FIXED)
    inner = tl.sum(tl.where(rank >= 0, g * share, 0.0), 1)
    if FIXED is None:
        of_top = inner - tl.load(grad_shared_weight + token, mask=live, other=0.0)
        grad = (g - inner[:, None]) * scale[:, None] * share + tl.where(rank == 0, of_top[:, None], 0.0)
    else:
        grad = (g - inner[:, None]) * (scale / total)[:, None]
    grad = tl.where(rank >= 0, grad, 0.0)
    grad = p * (grad - tl.sum(grad * p, 1)[:, None])

    if clean is not None:
        x, p, lse, nan = _softmax(clean, token, expert, live, num_experts, ACC)
    of_prob = tl.load(grad_mean_prob + expert, mask=held, other=0.0)[None, :] / count
    of_z = 2.0 * tl.load(grad_mean_z) * lse / count
    statistics = p * (of_prob - tl.sum(of_prob * p, 1)[:, None]) + of_z[:, None] * p
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    both = exists[:, None] & held[None, :]
    if clean is None:
        grad += statistics
    else:
        statistics = tl.where(live[:, None], statistics, 0.0)
        tl.store(grad_clean + at, statistics.to(grad_clean.dtype.element_ty), mask=both)
    grad = tl.where(live[:, None], grad, 0.0)
    tl.store(grad_logits + at, grad.to(grad_logits.dtype.element_ty), mask=both)


# The sort: slots are counted by block and group, where the last group is that of slots without an expert; the counts
# are scanned, group by group; and each block places its slots behind those of the blocks before it.


@triton.jit
def _groups_of(expert_indices, slot, num_slots, num_experts):
    exists = slot < num_slots
    index = tl.load(expert_indices + slot, mask=exists, other=-1)
    return tl.where((index < 0) | (index >= num_experts), num_experts, index), exists


@triton.jit
def _sort_count(expert_indices, counts, num_slots, num_experts, SLOTS: tl.constexpr, GROUPS: tl.constexpr):
    block = tl.program_id(0)
    index, exists = _groups_of(expert_indices, block * SLOTS + tl.arange(0, SLOTS), num_slots, num_experts)
    group = tl.arange(0, GROUPS)
    hit = (index[:, None] == group[None, :]) & exists[:, None]
    at = block.to(tl.int64) * (num_experts + 1) + group
    tl.store(counts + at, tl.sum(hit.to(tl.int32), 0), mask=group <= num_experts)


@triton.jit
def _sort_scan(counts, starts, expert_offsets, num_blocks, num_experts, BLOCKS: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    held = group <= num_experts
    total = tl.full([GROUPS], 0, tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = block.to(tl.int64)[:, None] * (num_experts + 1) + group[None, :]
        total += tl.sum(tl.load(counts + at, mask=(block < num_blocks)[:, None] & held[None, :], other=0), 0)
    running = tl.cumsum(total, 0) - total
    tl.store(expert_offsets + group, running, mask=held)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        at = block.to(tl.int64)[:, None] * (num_experts + 1) + group[None, :]
        both = (block < num_blocks)[:, None] & held[None, :]
        count = tl.load(counts + at, mask=both, other=0)
        tl.store(starts + at, running[None, :] + tl.cumsum(count, 0) - count, mask=both)
        running += tl.sum(count, 0)


@triton.jit
def _sort_scatter(
    expert_indices,
    starts,
    slot_to_sorted,
    sorted_to_slot,
    num_slots,
    num_experts,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    block = tl.program_id(0)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    index, exists = _groups_of(expert_indices, slot, num_slots, num_experts)
    group = tl.arange(0, GROUPS)
    hit = (index[:, None] == group[None, :]) & exists[:, None]
    before = tl.cumsum(hit.to(tl.int32), 0) - 1
    at = block.to(tl.int64) * (num_experts + 1) + group
    start = tl.load(starts + at, mask=group <= num_experts, other=0)
    place = tl.sum(tl.where(hit, start[None, :] + before, 0), 1)
    tl.store(slot_to_sorted + slot, place, mask=exists)
    tl.store(sorted_to_slot + place, slot, mask=exists)


def _fixed(gate: str, weight: float) -> float | None:
    """The shared weight of the fixed gate, or None for the other one; a constant of the kernels."""
    return float(weight) if gate == "fixed" else None


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _token_tile(logits: Tensor) -> dict[str, int]:
    held = power_of_2(logits.shape[1])
    elements = _TILE // max(logits.element_size() // 4, 1)
    return {"TOKENS": max(elements // held, 1), "EXPERTS": held}


def route(
    logits: Tensor,
    mask: Tensor | None,
    clean_logits: Tensor | None,
    top_k: int,
    gate: str,
    fixed_shared_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_rows("route", "logits", logits.shape[0] * top_k)
    fixed = _fixed(gate, fixed_shared_weight)
    logits, clean = logits.contiguous(), None if clean_logits is None else clean_logits.contiguous()
    (tokens, experts), acc, tile = logits.shape, accumulator(logits), _token_tile(logits)
    shared, routed = logits.new_empty(tokens, dtype=acc), logits.new_empty((tokens, top_k), dtype=acc)
    indices = logits.new_empty((tokens, top_k), dtype=torch.int32)
    counts = logits.new_empty(experts, dtype=torch.int32)
    mean_prob, mean_z = logits.new_empty(experts, dtype=acc), logits.new_empty((), dtype=acc)

    n = blocks(tokens, tile["TOKENS"])
    by_block = (
        logits.new_empty((n, experts), dtype=torch.float64),
        logits.new_empty(n, dtype=torch.float64),
        logits.new_empty((n, experts), dtype=torch.int32),
        logits.new_empty(n, dtype=torch.int32),
    )
    constants = {"ACC": wide(logits), **tile}
    tensors = logits, clean, _bytes(mask), shared, routed, indices, *by_block
    launch(_route, (n,), logits, *tensors, tokens, experts, TOP_K=top_k, FIXED=fixed, **constants)
    del constants["TOKENS"]
    rows = max(_TILE // constants["EXPERTS"], 1)
    results = counts, mean_prob, mean_z
    launch(_route_statistics, (1,), logits, *by_block, *results, n, experts, BLOCKS=rows, **constants)
    return shared, routed, indices, counts, mean_prob, mean_z


def route_backward(
    grad_shared_weight: Tensor,
    grad_routed_weights: Tensor,
    grad_mean_prob: Tensor,
    grad_mean_z: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    clean_logits: Tensor | None,
    expert_indices: Tensor,
    tokens_per_expert: Tensor,
    gate: str,
    fixed_shared_weight: float,
) -> tuple[Tensor, Tensor]:
    (tokens, experts), top_k = logits.shape, expert_indices.shape[1]
    check_rows("route_backward", "logits", tokens * top_k)
    fixed = _fixed(gate, fixed_shared_weight)
    grads = grad_shared_weight, grad_routed_weights, grad_mean_prob, grad_mean_z
    logits, clean = logits.contiguous(), None if clean_logits is None else clean_logits.contiguous()
    grad_logits = torch.empty_like(logits)
    grad_clean = None if clean is None else torch.empty_like(clean)
    tile = _token_tile(logits)
    launch(
        _route_backward,
        (blocks(tokens, tile["TOKENS"]),),
        logits,
        *(grad.contiguous() for grad in grads),
        logits,
        clean,
        _bytes(mask),
        expert_indices.contiguous(),
        tokens_per_expert.contiguous(),
        grad_logits,
        grad_clean,
        tokens,
        experts,
        TOP_K=top_k,
        FIXED=fixed,
        ACC=wide(logits),
        **tile,
    )
    return grad_logits, logits.new_empty(0) if grad_clean is None else grad_clean


def sort_slots(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = expert_indices.numel()
    check_rows("sort_slots", "expert_indices", slots)
    indices = expert_indices.contiguous()
    groups = power_of_2(num_experts + 1)
    tile = {"SLOTS": max(4 * _TILE // groups, 1), "GROUPS": groups}
    n = blocks(slots, tile["SLOTS"])
    slot_to_sorted, sorted_to_slot = indices.new_empty(slots), indices.new_empty(slots)
    offsets = indices.new_empty(num_experts + 1)
    counts, starts = indices.new_empty((n, num_experts + 1)), indices.new_empty((n, num_experts + 1))
    launch(_sort_count, (n,), indices, indices, counts, slots, num_experts, **tile)
    scan = {"BLOCKS": max(4 * _TILE // groups, 1), "GROUPS": groups}
    launch(_sort_scan, (1,), indices, counts, starts, offsets, n, num_experts, **scan)
    maps = slot_to_sorted, sorted_to_slot
    launch(_sort_scatter, (n,), indices, indices, starts, *maps, slots, num_experts, **tile)
    return slot_to_sorted, sorted_to_slot, offsets
