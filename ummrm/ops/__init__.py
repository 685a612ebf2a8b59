"""The functional API: every operator as a documented function, with defaults and keywords.

Each is one call of the `torch.ops.ummrm` operator of the same name, on whatever backend serves the device; they work
under autograd, autocast, `torch.compile`, activation checkpointing and `torch.func`. `reference.py` says in plain torch
what each computes. Inputs are never changed.

Words: T tokens, H hidden size, I intermediate size, E routed experts, K routed experts per token, S shared experts;
a slot is one (token, k) assignment t*K + k, and R = T*K. Sorted rows are slots grouped by expert. A combined row buffer
[S*T + R, ...] holds the shared rows first (expert s, token t at s*T + t), then the sorted rows. "Float" is fp64, fp32,
bf16 or fp16; statistics and gate weights are fp32, or fp64 beside fp64 inputs. Accumulation is in fp32 (fp64).

Every function raises, naming the argument, what it expected, what came and the remedy: ValueError for shapes, devices
and settings, TypeError for dtypes, IndexError for an index out of range (on CUDA only under `ummrm.check(True)`). NaN
propagates and never raises.

Kernels compute first derivatives. Where a gradient is to be differentiated again (`create_graph=True`, `torch.func`) or
comes in batches (`is_grads_batched`), `reference.py` computes it instead: right to any order, dense over all experts
and so slower, and its values may differ from the kernels' in the order of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends  # noqa: F401  (registers the operators)
from .grad_sums import accumulate_in_place
from .grouped import grouped_ffn, grouped_linear
from .reference import RouteOutput

__all__ = [
    "RouteOutput",
    "accumulate_in_place",
    "activation",
    "expert_gemm",
    "grouped_ffn",
    "grouped_linear",
    "merge_experts",
    "merge_ffn",
    "merged_ffn",
    "moe_ffn",
    "permute",
    "route",
    "sort_slots",
    "unpermute",
]

_ops = torch.ops.ummrm


def route(
    logits: Tensor,
    mask: Tensor | None = None,
    clean_logits: Tensor | None = None,
    *,
    top_k: int,
    gate: str = "shared_complement",
    fixed_shared_weight: float = 0.5,
) -> RouteOutput:
    """Routes tokens: softmax, top-k, gate weights and statistics in one pass.

    With p = softmax(logits) and p_(1) >= ... >= p_(K) its K largest, ties going to the lower expert index:

    - `gate="shared_complement"` (XFT, arXiv 2404.15247): `shared = 1 - p_(1)`,
      `routed_j = p_(1) * softmax(p_(1), ..., p_(K))_j`; the second softmax is over probabilities, not logits.
    - `gate="fixed"`: `shared = fixed_shared_weight`, `routed_j = (1 - shared) * p_(j) / sum_i p_(i)`.

    A masked token has indices -1, routed weights 0, shared weight 1, counts in no statistic and receives no gradient,
    whatever its logits. A live token with NaN logits has NaN weights and valid, distinct indices.

    Args:
        logits: [T, E], float.
        mask: bool [T], True for live tokens; None: all are live.
        clean_logits: float [T, E], what the statistics are taken from when `logits` carry router noise.
        top_k: K, 1 to E.
        gate: `"shared_complement"` or `"fixed"`.
        fixed_shared_weight: the shared weight of `gate="fixed"`, 0 to 1.

    Returns:
        RouteOutput, differentiable in all but the two int32 tensors:
        `shared_weight` [T] and `routed_weights` [T, K], which sum to one for each token;
        `expert_indices` int32 [T, K], by descending probability; `tokens_per_expert` int32 [E], slots sent to each;
        `mean_prob` [E], mean over live tokens of the clean softmax; `mean_z` [], mean over live tokens of
        logsumexp(clean logits)^2. The means are 0 if no token is live.
    """
    return RouteOutput(*_ops.route(logits, mask, clean_logits, top_k, gate, fixed_shared_weight))


def sort_slots(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups slots by expert: a stable counting sort of the indices.

    Args:
        expert_indices: int32 [T, K], values in [-1, num_experts); -1 marks a masked token.
        num_experts: E.

    Returns:
        `slot_to_sorted` int32 [R], the sorted row of each slot, and `sorted_to_slot` int32 [R], its inverse: both are
        full permutations, with the slots of index -1 last, in order. `expert_offsets` int32 [E + 1]: expert e owns the
        sorted rows from offsets[e] to offsets[e + 1]; offsets[E] is the number of live rows.
    """
    return _ops.sort_slots(expert_indices, num_experts)


def permute(x: Tensor, sorted_to_slot: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    """Gathers each slot's token in sorted order: `out[r] = x[sorted_to_slot[r] // top_k]`.

    Args:
        x: float [T, H].
        sorted_to_slot: int32 [R], from `sort_slots`.
        expert_offsets: int32 [E + 1], from `sort_slots`.
        top_k: K.

    Returns:
        [R, H] in x's dtype; rows from `expert_offsets[E]` on are zero.
    """
    return _ops.permute(x, sorted_to_slot, expert_offsets, top_k)


def unpermute(
    rows: Tensor,
    slot_to_sorted: Tensor,
    expert_offsets: Tensor,
    shared_weight: Tensor | None = None,
    routed_weights: Tensor | None = None,
    num_shared_experts: int = 0,
    top_k: int = 1,
) -> Tensor:
    """Combines expert outputs into tokens, accumulating in fp32 (fp64) and rounding once.

    `out_t = shared_weight[t] / S * sum_s rows[s*T + t]
             + sum_k routed_weights[t, k] * rows[S*T + slot_to_sorted[t*K + k]]`

    Without `shared_weight` the shared rows, and without `routed_weights` the routed rows, are summed as they are.
    Sorted rows from `expert_offsets[E]` on are never read.

    Args:
        rows: float [S*T + R, H], a combined row buffer.
        slot_to_sorted: int32 [R], from `sort_slots`.
        expert_offsets: int32 [E + 1], from `sort_slots`.
        shared_weight: [T], fp32 (fp64 beside fp64 rows).
        routed_weights: [T, K], likewise.
        num_shared_experts: S; 0 if the buffer holds sorted rows only.
        top_k: K.

    Returns:
        [T, H] in rows' dtype.
    """
    return _ops.unpermute(
        rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights, num_shared_experts, top_k
    )


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
    """Multiplies every expert's rows by its projection: a grouped GEMM over ragged groups, shared experts included.

    Group by group `rows @ proj[e].T + bias[e]`, or with `transpose` `rows @ proj[e]`. An expert without rows is free.
    On CUDA fp32 products are exact, or, from compute capability 8.0 on, of operands rounded to TF32 where torch's own
    may be (`torch.backends.cuda.matmul.fp32_precision = "tf32"`, or torch's older settings).

    Args:
        shared_rows: float [T, D], read by every shared expert without a copy, or [S*T, D], one block for each.
        routed_rows: [R, D], sorted rows.
        shared_proj: [S, N, D]. With `transpose` the rows are N wide.
        routed_proj: [E, N, D].
        expert_offsets: int32 [E + 1], from `sort_slots`.
        num_tokens: T.
        shared_bias: [S, N], not with `transpose`.
        routed_bias: [E, N], not with `transpose`.
        transpose: multiply by the projection itself instead of its transpose.

    Returns:
        [S*T + R, N] ([S*T + R, D] with `transpose`), a combined row buffer in the rows' dtype; sorted rows from
        `expert_offsets[E]` on are zero.
    """
    return _ops.expert_gemm(
        shared_rows,
        routed_rows,
        shared_proj,
        routed_proj,
        expert_offsets,
        num_tokens,
        shared_bias,
        routed_bias,
        transpose,
    )


def activation(pre_activation: Tensor, kind: str = "silu", glu: bool = True) -> Tensor:
    """Applies an FFN's activation, computed in fp32 (fp64) and rounded once.

    Args:
        pre_activation: float [rows, 2I] if `glu` (gate columns first), else [rows, I].
        kind: `"silu"`, `"gelu"` (erf), `"gelu_tanh"`, `"relu"` or `"relu2"` (relu squared).
        glu: `act(gate) * up` (arXiv 2002.05202) instead of `act(z)`.

    Returns:
        [rows, I] in pre_activation's dtype.
    """
    return _ops.activation(pre_activation, kind, glu)


def merge_experts(shared: list[Tensor], routed: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    """Folds experts into one (arXiv 2512.00724).

    `out[i] = sum_s coefficients[i, s] * shared[i][s] + sum_e coefficients[i, S + e] * routed[i][e]`, in one pass
    over any number of experts, accumulated in fp32 (fp64) in expert order and rounded once.

    Args:
        shared: n tensors [S, ...], float, all of one dtype. Each expert's slice should be contiguous (it is
            copied otherwise); the stride between experts may be anything, so that the gate rows `up[:, :I]` of a fused
            projection pass as they are.
        routed: n tensors [E, ...] of the same trailing shapes.
        coefficients: [n, S + E], shared experts first; fp32 (fp64 beside fp64 tensors).

    Returns:
        n tensors [...] in the experts' dtype.
    """
    return _ops.merge_experts(shared, routed, coefficients)


def moe_ffn(
    x: Tensor,
    shared_weight: Tensor,
    routed_weights: Tensor,
    expert_indices: Tensor,
    shared_up: Tensor,
    routed_up: Tensor,
    shared_down: Tensor,
    routed_down: Tensor,
    shared_up_bias: Tensor | None = None,
    routed_up_bias: Tensor | None = None,
    shared_down_bias: Tensor | None = None,
    routed_down_bias: Tensor | None = None,
    activation: str = "silu",
    glu: bool = True,
) -> Tensor:
    """Runs a mixture-of-experts FFN with always-on shared experts, as one autograd node.

    `out_t = shared_weight_t / S * sum_s FFN_s(x_t) + sum_k routed_weights[t, k] * FFN_{expert_indices[t, k]}(x_t)`,
    with `FFN(x) = down(act(up(x)))`, each projection with or without a bias.

    For backward it saves, besides references to the parameters,

        b * (T*H + (S*T + T*K) * W) + g * (T + T*K) + 4 * (3*T*K + E + 1) bytes:

    x, the pre-activations (W = 2I if `glu`, else I), the gate weights, and the routing metadata (expert indices, the
    two slot maps, the offsets), where b is the size of x's element and g that of a gate weight: 4, or 8 in fp64.
    Gathered rows, activations and expert outputs are not kept: the gate gradient is `<dO Wd, A> + <dO, b>`, with A
    computed again (after SonicMoE, arXiv 2512.14080). Gradients of frozen inputs are not computed, and without
    recording nothing is saved.

    Under autocast x, projections and biases are cast to the autocast dtype; gate weights stay as they are.

    Args:
        x: float [T, H].
        shared_weight: [T], from `route`; fp32 (fp64 beside fp64 x).
        routed_weights: [T, K], from `route`; likewise.
        expert_indices: int32 [T, K], from `route`; -1 for a masked token.
        shared_up: [S, 2I, H] if `glu` (gate rows first), else [S, I, H]; x's dtype, as all projections and biases.
        routed_up: [E, 2I or I, H].
        shared_down: [S, H, I].
        routed_down: [E, H, I].
        shared_up_bias: [S, 2I or I].
        routed_up_bias: [E, 2I or I].
        shared_down_bias: [S, H].
        routed_down_bias: [E, H].
        activation: as in `activation`.
        glu: gated (arXiv 2002.05202) or plain FFN.

    Returns:
        [T, H] in x's dtype.
    """
    return _ops.moe_ffn(
        x,
        shared_weight,
        routed_weights,
        expert_indices,
        shared_up,
        routed_up,
        shared_down,
        routed_down,
        shared_up_bias,
        routed_up_bias,
        shared_down_bias,
        routed_down_bias,
        activation,
        glu,
    )


def merge_ffn(
    coefficients: Tensor,
    shared_up: Tensor,
    routed_up: Tensor,
    shared_down: Tensor,
    routed_down: Tensor,
    shared_up_bias: Tensor | None = None,
    routed_up_bias: Tensor | None = None,
    shared_down_bias: Tensor | None = None,
    routed_down_bias: Tensor | None = None,
    glu: bool = True,
) -> list[Tensor]:
    """Merges an FFN's experts into the tensors of one dense FFN: those that `merged_ffn` runs on, bit for bit.

    `merge_experts` with a row of coefficients for each projection, whose bias it serves too.

    Args:
        coefficients: as in `merged_ffn`.
        shared_up: as in `moe_ffn`; all parameters share one dtype.
        routed_up: as in `moe_ffn`.
        shared_down: as in `moe_ffn`.
        routed_down: as in `moe_ffn`.
        shared_up_bias: as in `moe_ffn`; with `routed_up_bias` or not at all.
        routed_up_bias: as in `moe_ffn`.
        shared_down_bias: as in `moe_ffn`; with `routed_down_bias` or not at all.
        routed_down_bias: as in `moe_ffn`.
        glu: gated or plain FFN.

    Returns:
        The tensors that there are, in the parameters' dtype: up [2I or I, H], down [H, I], up's bias [2I or I], down's
        bias [H].
    """
    return _ops.merge_ffn(
        coefficients,
        shared_up,
        routed_up,
        shared_down,
        routed_down,
        shared_up_bias,
        routed_up_bias,
        shared_down_bias,
        routed_down_bias,
        glu,
    )


def merged_ffn(
    x: Tensor,
    coefficients: Tensor,
    shared_up: Tensor,
    routed_up: Tensor,
    shared_down: Tensor,
    routed_down: Tensor,
    shared_up_bias: Tensor | None = None,
    routed_up_bias: Tensor | None = None,
    shared_down_bias: Tensor | None = None,
    routed_down_bias: Tensor | None = None,
    activation: str = "silu",
    glu: bool = True,
) -> Tensor:
    """Merges the experts by `coefficients` and runs the merged dense FFN on x, as one autograd node.

    The merge is `merge_ffn`, in the parameters' dtype; the result is rounded to x's dtype
    where that is narrower. Backward keeps x and the pre-activation [T, 2I or I] and merges again.

    Under autocast x is cast to the autocast dtype; the parameters are merged in their own.

    Args:
        x: float [T, H].
        coefficients: [3, S + E] if `glu` (gate, up, down), else [2, S + E] (up, down); shared experts first; fp32 (fp64
            beside fp64 parameters).
        shared_up: as in `moe_ffn`; all parameters share one dtype, x's or a wider one.
        routed_up: as in `moe_ffn`.
        shared_down: as in `moe_ffn`.
        routed_down: as in `moe_ffn`.
        shared_up_bias: as in `moe_ffn`.
        routed_up_bias: as in `moe_ffn`.
        shared_down_bias: as in `moe_ffn`.
        routed_down_bias: as in `moe_ffn`.
        activation: as in `activation`.
        glu: gated or plain FFN.

    Returns:
        [T, H] in x's dtype.
    """
    return _ops.merged_ffn(
        x,
        coefficients,
        shared_up,
        routed_up,
        shared_down,
        routed_down,
        shared_up_bias,
        routed_up_bias,
        shared_down_bias,
        routed_down_bias,
        activation,
        glu,
    )
