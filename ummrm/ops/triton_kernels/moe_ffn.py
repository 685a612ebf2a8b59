"""The composed MoE FFN on Triton's kernels: what csrc/moe_ffn.cpp composes by the dispatcher, with neighbours fused.

Token rows are gathered as the GEMMs load them, so that no permuted copy is made: neither of x, in forward and again in
backward, nor of the gradient. The activation is in the epilogue of the up-projection where
`configurations.choose_fused` has a tile for it; elsewhere its own kernel follows. What is saved for backward is the
same as there. Results are bits of the unfused kernels' where these sum by the same tiles.

The activation's backward is a kernel of its own. In the epilogue of the down-projection's input gradient, with the
gates' dot products, it would save writing and reading I elements a row; but with it no tile of more than 64 x 64
compiled without spills for sm_80 and sm_90, a fourth to an eighth of what the product alone has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activation as activate
from .activation import activation_backward
from .bias_grad import bias_grad
from .configurations import choose_fused
from .expert_gemm import product, weight_grad
from .groups import Rows, gathered
from .launch import blocks, launch, target_of, tile, wide
from .permute import permute, unpermute
from .routing import sort_slots
from .up_activation import up_activation

_SUM = 1024  # elements of a program's tile


@dataclass(frozen=True)
class Fusion:
    """What is fused. Operators take FUSED; the other ways are here to be measured and tested against it.

    Attributes:
        gather: rows are gathered in the loads, not taken from a permuted copy: of x in forward and once more in
            backward, and of the gradient. Each copy writes T*K*H elements that the GEMM then reads, and reads as many.
        epilogue: the activation is in the up-projection's epilogue, where a tile fits and rows are gathered. Without
            it the pre-activation, 2I or I elements a row, is read again, and in inference it is written for that alone.
    """

    gather: bool = True
    epilogue: bool = True


FUSED = Fusion()


@dataclass(frozen=True)
class Experts:
    """The experts' parameters, in the order of the operators' arguments."""

    shared_up: Tensor
    routed_up: Tensor
    shared_down: Tensor
    routed_down: Tensor
    shared_up_bias: Tensor | None
    routed_up_bias: Tensor | None
    shared_down_bias: Tensor | None
    routed_down_bias: Tensor | None

    @property
    def num_shared(self) -> int:
        return self.shared_up.shape[0]

    @property
    def num_experts(self) -> int:
        return self.routed_up.shape[0]


@triton.jit
def _gate_grad(
    dots,
    grad_out,
    slot_to_sorted,
    expert_indices,
    shared_bias,
    routed_bias,
    grad_shared_weight,
    grad_routed_weights,
    num_tokens,
    width,
    NUM_SHARED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """<dO Wd, A> + <dO, b>, whose first part is in `dots`. Program (tokens, k) serves the k-th slot of its tokens;
    k = TOP_K their shared experts."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    k = tl.program_id(1)
    exists = token < num_tokens
    products = tl.full([TOKENS, COLUMNS], 0.0, ACC)
    if k == TOP_K:
        if grad_shared_weight is not None:
            total = tl.full([TOKENS], 0.0, ACC)
            for s in range(NUM_SHARED):
                total += tl.load(dots + s * tl.cast(num_tokens, tl.int64) + token, mask=exists, other=0.0)
            if shared_bias is not None:
                for start in range(0, width, COLUMNS):
                    column = start + tl.arange(0, COLUMNS)
                    inside = column < width
                    bias = tl.full([COLUMNS], 0.0, ACC)
                    for s in range(NUM_SHARED):
                        bias += tl.load(shared_bias + s * width + column, mask=inside, other=0.0).to(ACC)
                    at = token.to(tl.int64)[:, None] * width + column[None, :]
                    g = tl.load(grad_out + at, mask=exists[:, None] & inside[None, :], other=0.0).to(ACC)
                    products += g * bias[None, :]
            total = (total + tl.sum(products, 1)) / max(NUM_SHARED, 1)
            tl.store(grad_shared_weight + token, total, mask=exists)
    else:
        if grad_routed_weights is not None:
            slot = token * TOP_K + k
            row = tl.load(slot_to_sorted + slot, mask=exists, other=0)
            total = tl.load(dots + NUM_SHARED * tl.cast(num_tokens, tl.int64) + row, mask=exists, other=0.0)
            if routed_bias is not None:
                expert = tl.load(expert_indices + slot, mask=exists, other=-1)
                live = (expert >= 0) & (expert < NUM_EXPERTS)
                for start in range(0, width, COLUMNS):
                    column = start + tl.arange(0, COLUMNS)
                    both = live[:, None] & (column < width)[None, :]
                    at = expert.to(tl.int64)[:, None] * width + column[None, :]
                    bias = tl.load(routed_bias + at, mask=both, other=0.0).to(ACC)
                    at = token.to(tl.int64)[:, None] * width + column[None, :]
                    products += tl.load(grad_out + at, mask=both, other=0.0).to(ACC) * bias
            tl.store(grad_routed_weights + slot, total + tl.sum(products, 1), mask=exists)


def _rows(tokens: Tensor, sorted_to_slot: Tensor, offsets: Tensor, top_k: int, fusion: Fusion) -> Rows:
    if fusion.gather:
        return gathered(tokens, sorted_to_slot, top_k)
    return Rows(tokens, permute(tokens, sorted_to_slot, offsets, top_k))


def _split(rows: Tensor, tokens: int, p: Experts) -> Rows:
    """Of the combined buffer: the shared experts' rows come first."""
    return Rows(rows[: p.num_shared * tokens], rows[p.num_shared * tokens :])


def up_side(
    rows: Rows,
    p: Experts,
    offsets: Tensor,
    tokens: int,
    activation: str,
    glu: bool,
    need_pre_activation: bool,
    fusion: Fusion = FUSED,
) -> tuple[Tensor | None, Tensor]:
    """(pre-activation or None, activation) of every expert's rows, in one launch where a tile for that fits."""
    up, biases = (p.shared_up, p.routed_up), (p.shared_up_bias, p.routed_up_bias)
    c = None
    if fusion.epilogue and rows.index is not None:
        each = blocks(p.num_shared * tokens + rows.slots, max(p.num_shared + p.num_experts, 1))
        kind = ("up_gated" if glu else "up_plain") + ("_gelu" if activation == "gelu" else "")
        width, hidden = p.routed_down.shape[2], p.routed_down.shape[1]
        c = choose_fused(kind, target_of(rows.routed), rows.routed.dtype, each, width, hidden)
    if c is not None:
        return up_activation(rows, *up, *biases, offsets, tokens, activation, glu, need_pre_activation, c)
    pre_activation = product(rows, *up, offsets, tokens, *biases)
    return pre_activation if need_pre_activation else None, activate(pre_activation, activation, glu)


def run_forward(
    x: Tensor,
    shared_weight: Tensor,
    routed_weights: Tensor,
    expert_indices: Tensor,
    *rest,
    need_pre_activation: bool,
    fusion: Fusion = FUSED,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """What moe_ffn_forward returns, unchecked; without `need_pre_activation` that is None, and where fused never
    written."""
    *parameters, activation, glu = rest
    p, (tokens, top_k) = Experts(*parameters), (x.shape[0], expert_indices.shape[-1])
    slot_to_sorted, sorted_to_slot, offsets = sort_slots(expert_indices, p.num_experts)
    rows = _rows(x.contiguous(), sorted_to_slot, offsets, top_k, fusion)
    pre_activation, act = up_side(rows, p, offsets, tokens, activation, glu, need_pre_activation, fusion)
    del rows
    down = p.shared_down, p.routed_down
    outputs = product(_split(act, tokens, p), *down, offsets, tokens, p.shared_down_bias, p.routed_down_bias)
    del act
    out = unpermute(outputs, slot_to_sorted, offsets, shared_weight, routed_weights, p.num_shared, top_k)
    return out, pre_activation, slot_to_sorted, sorted_to_slot, offsets


def moe_ffn_forward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return run_forward(*arguments, need_pre_activation=True)


def moe_ffn(*arguments) -> Tensor:
    return run_forward(*arguments, need_pre_activation=False)[0]


def moe_ffn_backward(*arguments) -> list[Tensor]:
    return run_backward(*arguments)


def moe_ffn_backward_add(*arguments) -> list[Tensor]:
    """Gradients of the projections in x's dtype, then added: they are written and read once more."""
    *arguments, shared_up, routed_up, shared_down, routed_down = arguments
    grads, need = run_backward(*arguments), arguments[-1]
    for i, total in zip((3, 4, 5, 6), (shared_up, routed_up, shared_down, routed_down), strict=True):
        if total is not None and need[i]:
            total.add_(grads[i])
            grads[i] = total.new_empty(0)
    return grads


def _gate_grads(dots, grad_out, slot_to_sorted, expert_indices, p: Experts, need_shared: bool, need_routed: bool):
    """Gradients of (shared_weight, routed_weights), None where not needed."""
    (tokens, top_k), width = expert_indices.shape, grad_out.shape[1]
    shared = dots.new_empty(tokens) if need_shared else None
    routed = dots.new_empty(tokens, top_k) if need_routed else None
    each, columns = tile(width, _SUM, grad_out.dtype, widest=128)
    launch(
        _gate_grad,
        (blocks(tokens, each), top_k + 1),
        grad_out,
        dots,
        grad_out,
        slot_to_sorted,
        expert_indices,
        None if p.shared_down_bias is None else p.shared_down_bias.contiguous(),
        None if p.routed_down_bias is None else p.routed_down_bias.contiguous(),
        shared,
        routed,
        tokens,
        width,
        NUM_SHARED=p.num_shared,
        NUM_EXPERTS=p.num_experts,
        TOP_K=top_k,
        ACC=wide(grad_out),
        TOKENS=each,
        COLUMNS=columns,
    )
    return shared, routed


def run_backward(
    grad_out: Tensor,
    x: Tensor,
    shared_weight: Tensor,
    routed_weights: Tensor,
    expert_indices: Tensor,
    *rest,
    fusion: Fusion = FUSED,
) -> list[Tensor]:
    """What moe_ffn_backward returns: a gradient for each of `need`, empty where it is False."""
    parameters, (pre_activation, slot_to_sorted, sorted_to_slot, offsets, activation, glu, need) = rest[:8], rest[8:]
    p, (tokens, top_k) = Experts(*parameters), expert_indices.shape
    num_shared = p.num_shared
    names = "x", "shared_weight", "routed_weights", *Experts.__dataclass_fields__
    need, grads = dict(zip(names, need, strict=True)), dict.fromkeys(names)
    need_up = any(need[n] for n in ("x", "shared_up", "routed_up", "shared_up_bias", "routed_up_bias"))
    need_gates, need_down = need["shared_weight"] or need["routed_weights"], need["shared_down"] or need["routed_down"]

    # The gate weight of each row of the combined buffer.
    of_shared = (shared_weight / max(num_shared, 1)).repeat(num_shared)
    row_weights = torch.cat([of_shared, routed_weights.reshape(-1).index_select(0, sorted_to_slot)])
    grad_out, x = grad_out.contiguous(), x.contiguous()
    grad_rows = _rows(grad_out, sorted_to_slot, offsets, top_k, fusion)
    walked = offsets, tokens
    grad_pre = weighted = dots = None
    if need_up or need_gates or need_down:
        grad_act = product(grad_rows, p.shared_down, p.routed_down, *walked, transpose=True)
        grad_pre, weighted, dots = activation_backward(grad_act, pre_activation, row_weights, activation, glu)
        del grad_act
    if need_gates:
        grads["shared_weight"], grads["routed_weights"] = _gate_grads(
            dots,
            grad_out,
            slot_to_sorted,
            expert_indices.contiguous(),
            p,
            need["shared_weight"],
            need["routed_weights"],
        )
    if need_down:
        pair = need["shared_down"], need["routed_down"]
        of_down = weight_grad(grad_rows, _split(weighted, tokens, p), *walked, num_shared, *pair)
        grads["shared_down"], grads["routed_down"] = of_down
    del weighted
    if pair := _wanted(need, "shared_down_bias", "routed_down_bias"):
        biases = bias_grad(grad_rows, row_weights, *walked, num_shared, *pair)
        grads["shared_down_bias"], grads["routed_down_bias"] = biases
    del grad_rows
    if need_up:
        of_pre = _split(grad_pre, tokens, p)
        if pair := _wanted(need, "shared_up", "routed_up"):
            fusion = fusion if need["routed_up"] else FUSED  # shared experts alone need no copy
            rows = _rows(x, sorted_to_slot, offsets, top_k, fusion)
            grads["shared_up"], grads["routed_up"] = weight_grad(of_pre, rows, *walked, num_shared, *pair)
            del rows
        if pair := _wanted(need, "shared_up_bias", "routed_up_bias"):
            biases = bias_grad(of_pre, None, *walked, num_shared, *pair)
            grads["shared_up_bias"], grads["routed_up_bias"] = biases
        if need["x"]:
            outputs = product(of_pre, p.shared_up, p.routed_up, *walked, transpose=True)
            grads["x"] = unpermute(outputs, slot_to_sorted, offsets, None, None, num_shared, top_k)
    return [x.new_empty(0) if grad is None or not need[name] else grad for name, grad in grads.items()]


def _wanted(need: dict[str, bool], shared: str, routed: str) -> tuple[bool, bool] | None:
    """Of a pair of gradients; None if neither is."""
    pair = need[shared], need[routed]
    return pair if any(pair) else None
