"""The specification of every operator, in plain torch: what the kernels must compute, term by term.

Same names and arguments as `ops`, differentiable by autograd, any float dtype; the truth that tests compare with is
this file run in fp64. It is also the path that serves `torch.func` transforms, so nothing here has a shape or a branch
that depends on data: experts are run densely over all rows and masked. That is slow, and not this file's concern.
The `*_backward` functions write out the fused backwards by hand; tests hold them to autograd of the forwards.

The operators that take experts whole are in `composed_reference.py`.

Words: T tokens, K routed experts per token, E routed and S shared experts, R = T*K slots (slot t*K + k). A combined row
buffer [S*T + R, ...] holds the shared rows first (expert s, token t at s*T + t), then the sorted rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The activations that an expert may have, by the names that the kernels know them by.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


class RouteOutput(NamedTuple):
    """What `route` returns; see `ummrm.ops.route` for shapes and meaning."""

    shared_weight: Tensor
    routed_weights: Tensor
    expert_indices: Tensor
    tokens_per_expert: Tensor
    mean_prob: Tensor
    mean_z: Tensor


def accumulator(tensor: Tensor) -> torch.dtype:
    """dtype of statistics, gate weights and sums over `tensor`: fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _live(mask: Tensor | None, logits: Tensor) -> Tensor:
    return torch.ones_like(logits[:, 0], dtype=torch.bool) if mask is None else mask


def _live_rows(values: Tensor, live: Tensor) -> Tensor:
    """`values` in accumulation precision, dead rows zeroed: their NaN reaches neither values nor gradients."""
    return torch.where(live.unsqueeze(-1), values.to(accumulator(values)), 0.0)


def route(
    logits: Tensor,
    mask: Tensor | None = None,
    clean_logits: Tensor | None = None,
    *,
    top_k: int,
    gate: str = "shared_complement",
    fixed_shared_weight: float = 0.5,
) -> RouteOutput:
    live = _live(mask, logits)
    scores = _live_rows(logits, live)
    p = scores.softmax(-1)
    # Softmax is monotone, so ranking logits ranks p, free of exp's rounding. A row whose p is NaN ranks by index.
    rank_by = torch.where(p.isnan().any(-1, keepdim=True), 0.0, scores).detach()
    order = rank_by.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    top = p.gather(-1, order)
    if gate == "shared_complement":
        shared = 1 - top[:, 0]
        routed = top[:, :1] * top.softmax(-1)
    else:
        shared = torch.full_like(top[:, 0], fixed_shared_weight)
        routed = (1 - fixed_shared_weight) * top / top.sum(-1, keepdim=True)

    indices = torch.where(live.unsqueeze(-1), order, -1)
    experts = torch.arange(logits.shape[-1], device=logits.device)
    clean = scores if clean_logits is None else _live_rows(clean_logits, live)
    count = live.sum().clamp(min=1)
    return RouteOutput(
        shared_weight=torch.where(live, shared, 1.0),
        routed_weights=torch.where(live.unsqueeze(-1), routed, 0.0),
        expert_indices=indices.to(torch.int32),
        tokens_per_expert=(indices.unsqueeze(-1) == experts).sum((0, 1)).to(torch.int32),
        mean_prob=_live_rows(clean.softmax(-1), live).sum(0) / count,
        mean_z=torch.where(live, clean.logsumexp(-1).square(), 0.0).sum() / count,
    )


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
    live = _live(mask, logits)
    p = _live_rows(logits, live).softmax(-1)
    order = expert_indices.clamp(min=0).long()
    top, g = p.gather(-1, order), grad_routed_weights
    if gate == "shared_complement":
        q = top.softmax(-1)
        inner = (g * q).sum(-1, keepdim=True)
        grad_top = top[:, :1] * q * (g - inner)
        grad_top[:, :1] += inner - grad_shared_weight.unsqueeze(-1)
    else:
        total = top.sum(-1, keepdim=True)
        grad_top = (1 - fixed_shared_weight) / total * (g - (g * top / total).sum(-1, keepdim=True))
    grad_p = torch.zeros_like(p).scatter(-1, order, grad_top)
    grad = p * (grad_p - (grad_p * p).sum(-1, keepdim=True))

    clean = logits if clean_logits is None else clean_logits
    scores = _live_rows(clean, live)
    p = scores.softmax(-1)
    count = live.sum().clamp(min=1)
    grad_clean = p * (grad_mean_prob - (grad_mean_prob * p).sum(-1, keepdim=True)) / count
    grad_clean = grad_clean + grad_mean_z * 2 * scores.logsumexp(-1, keepdim=True) * p / count
    if clean_logits is None:
        return _live_rows(grad + grad_clean, live).to(logits.dtype), logits.new_empty(0)
    return _live_rows(grad, live).to(logits.dtype), _live_rows(grad_clean, live).to(clean_logits.dtype)


def sort_slots(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = expert_indices.reshape(-1)
    group = torch.where(slots < 0, num_experts, slots)
    sorted_to_slot = group.argsort(stable=True)
    slot_to_sorted = sorted_to_slot.argsort()
    experts = torch.arange(num_experts + 1, device=slots.device)
    expert_offsets = (group < experts.unsqueeze(-1)).sum(-1)
    return slot_to_sorted.to(torch.int32), sorted_to_slot.to(torch.int32), expert_offsets.to(torch.int32)


def permute(x: Tensor, sorted_to_slot: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    row = torch.arange(sorted_to_slot.numel(), device=x.device)
    live = (row < expert_offsets[-1]).unsqueeze(-1)
    return torch.where(live, x.index_select(0, sorted_to_slot // top_k), 0.0)


def unpermute(
    rows: Tensor,
    slot_to_sorted: Tensor,
    expert_offsets: Tensor,
    shared_weight: Tensor | None = None,
    routed_weights: Tensor | None = None,
    num_shared_experts: int = 0,
    top_k: int = 1,
) -> Tensor:
    num_tokens, acc = slot_to_sorted.numel() // top_k, accumulator(rows)
    shared, routed = _slot_rows(rows, slot_to_sorted, expert_offsets, num_shared_experts, top_k)
    out = shared.to(acc).sum(0)
    if shared_weight is not None:
        out = out * (shared_weight / max(num_shared_experts, 1)).unsqueeze(-1)
    routed = routed.to(acc)
    if routed_weights is not None:
        live = (slot_to_sorted < expert_offsets[-1]).view(num_tokens, top_k, 1)
        routed = torch.where(live, routed * routed_weights.unsqueeze(-1), 0.0)
    return (out + routed.sum(1)).to(rows.dtype)


def _slot_rows(
    rows: Tensor, slot_to_sorted: Tensor, expert_offsets: Tensor, num_shared_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """A combined row buffer as shared rows [S, T, H] and rows in slot order [T, K, H], dead slots zero."""
    num_tokens, hidden = slot_to_sorted.numel() // top_k, rows.shape[-1]
    num_shared_rows = num_shared_experts * num_tokens
    live = (slot_to_sorted < expert_offsets[-1]).unsqueeze(-1)
    routed = torch.where(live, rows[num_shared_rows:].index_select(0, slot_to_sorted), 0.0)
    shared = rows[:num_shared_rows].view(num_shared_experts, num_tokens, hidden)
    return shared, routed.view(num_tokens, top_k, hidden)


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
    num_tokens, hidden, acc = slot_to_sorted.numel() // top_k, rows.shape[-1], accumulator(rows)
    shared, routed = _slot_rows(rows, slot_to_sorted, expert_offsets, num_shared_experts, top_k)
    live = (slot_to_sorted < expert_offsets[-1]).view(num_tokens, top_k)
    g = grad_out.to(acc)
    grad_shared_weight = grad_routed_weights = g.new_empty(0)
    grad_shared, grad_slots = g, g.unsqueeze(1).expand(num_tokens, top_k, hidden)
    if shared_weight is not None:
        grad_shared_weight = (g * shared.to(acc).sum(0)).sum(-1) / max(num_shared_experts, 1)
        grad_shared = g * (shared_weight / max(num_shared_experts, 1)).unsqueeze(-1)
    if routed_weights is not None:
        grad_routed_weights = torch.where(live, (g.unsqueeze(1) * routed.to(acc)).sum(-1), 0.0)
        grad_slots = grad_slots * routed_weights.unsqueeze(-1)
    grad_slots = torch.where(live.unsqueeze(-1), grad_slots, 0.0).reshape(num_tokens * top_k, hidden)
    grad_sorted = torch.zeros_like(grad_slots).index_copy(0, slot_to_sorted.long(), grad_slots)
    grad_rows = torch.cat([grad_shared.repeat(num_shared_experts, 1), grad_sorted]).to(rows.dtype)
    return grad_rows, grad_shared_weight, grad_routed_weights


def _groups(rows: Tensor, routed_rows: Tensor, expert_offsets: Tensor, num_tokens: int, num_shared_experts: int):
    """(rows, their membership or None for all) of each shared, then each routed expert; non-members' rows are zero."""
    repeated = rows.shape[0] != num_tokens or num_shared_experts == 1
    for s in range(num_shared_experts):
        yield (rows[s * num_tokens : (s + 1) * num_tokens] if repeated else rows), None
    position = torch.arange(routed_rows.shape[0], device=routed_rows.device)
    for e in range(expert_offsets.numel() - 1):
        member = ((position >= expert_offsets[e]) & (position < expert_offsets[e + 1])).unsqueeze(-1)
        yield torch.where(member, routed_rows, 0.0), member


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
    num_shared = shared_proj.shape[0]
    width = routed_proj.shape[2] if transpose else routed_proj.shape[1]
    out, routed = [], routed_rows.new_zeros(routed_rows.shape[0], width)
    groups = _groups(shared_rows, routed_rows, expert_offsets, num_tokens, num_shared)
    for i, (rows, member) in enumerate(groups):
        e, proj, bias = (i, shared_proj, shared_bias) if member is None else (i - num_shared, routed_proj, routed_bias)
        y = rows @ proj[e] if transpose else F.linear(rows, proj[e], None if bias is None else bias[e])
        if member is None:
            out.append(y)
        else:
            routed = torch.where(member, y, routed)
    return torch.cat([*out, routed])


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
    if out_dtype is not None:
        tensors = grad_shared_rows, grad_routed_rows, shared_rows, routed_rows
        grad_shared_rows, grad_routed_rows, shared_rows, routed_rows = (t.to(out_dtype) for t in tensors)
    grads = _groups(grad_shared_rows, grad_routed_rows, expert_offsets, num_tokens, num_shared_experts)
    groups = _groups(shared_rows, routed_rows, expert_offsets, num_tokens, num_shared_experts)
    products = [g.T @ rows for (g, _), (rows, _) in zip(grads, groups, strict=True)]
    empty = routed_rows.new_empty(0, grad_routed_rows.shape[1], routed_rows.shape[1])
    return _stack_needed(products, num_shared_experts, need_shared, need_routed, empty)


def expert_gemm_wgrad_add(
    grad_shared_rows: Tensor,
    grad_routed_rows: Tensor,
    shared_rows: Tensor,
    routed_rows: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    num_shared_experts: int,
    shared_sum: Tensor | None,
    routed_sum: Tensor | None,
) -> None:
    rows = grad_shared_rows, grad_routed_rows, shared_rows, routed_rows
    for i, total in enumerate((shared_sum, routed_sum)):
        if total is not None:
            needs = i == 0, i == 1, total.dtype
            total.add_(expert_gemm_wgrad(*rows, expert_offsets, num_tokens, num_shared_experts, *needs)[i])


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
    dtype, empty = routed_rows.dtype, routed_rows.new_empty(0, routed_rows.shape[1])
    shared, routed = shared_rows.to(accumulator(shared_rows)), routed_rows.to(accumulator(routed_rows))
    if row_weights is not None:
        num_shared_rows = num_shared_experts * num_tokens
        if shared.shape[0] == num_tokens:
            shared = shared.repeat(num_shared_experts, 1)
        shared = shared * row_weights[:num_shared_rows].unsqueeze(-1)
        routed = routed * row_weights[num_shared_rows:].unsqueeze(-1)
    groups = _groups(shared, routed, expert_offsets, num_tokens, num_shared_experts)
    sums = [rows.sum(0).to(dtype) for rows, _ in groups]
    return _stack_needed(sums, num_shared_experts, need_shared, need_routed, empty)


def _stack_needed(
    results: list[Tensor], num_shared: int, need_shared: bool, need_routed: bool, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """The results as one tensor for each kind of expert; [0] where not needed. `empty` stands for no experts."""
    groups = (results[:num_shared], need_shared), (results[num_shared:], need_routed)
    shared, routed = ((torch.stack(g) if g else empty) if needed else empty.new_empty(0) for g, needed in groups)
    return shared, routed


def activation(pre_activation: Tensor, kind: str = "silu", glu: bool = True) -> Tensor:
    z, act = pre_activation.to(accumulator(pre_activation)), ACTIVATIONS[kind]
    if glu:
        gate, up = z.chunk(2, dim=-1)
        return (act(gate) * up).to(pre_activation.dtype)
    return act(z).to(pre_activation.dtype)


def _activation_derivative(z: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        s = z.sigmoid()
        return s * (1 + z * (1 - s))
    if kind == "gelu":
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if kind == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)
    return (z > 0).to(z) if kind == "relu" else 2 * F.relu(z)


def activation_backward(
    grad: Tensor, pre_activation: Tensor, row_weights: Tensor | None, kind: str, glu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc, dtype = accumulator(pre_activation), pre_activation.dtype
    g, z = grad.to(acc), pre_activation.to(acc)
    weighted = g if row_weights is None else g * row_weights.unsqueeze(-1)
    if glu:
        gate, up = z.chunk(2, dim=-1)
        act = ACTIVATIONS[kind](gate)
        out = act * up
        grad_z = torch.cat([weighted * up * _activation_derivative(gate, kind), weighted * act], dim=-1)
    else:
        out = ACTIVATIONS[kind](z)
        grad_z = weighted * _activation_derivative(z, kind)
    if row_weights is None:
        return grad_z.to(dtype), grad.new_empty(0), g.new_empty(0)
    return grad_z.to(dtype), (row_weights.unsqueeze(-1) * out).to(dtype), (g * out).sum(-1)


def expert_glu(
    shared_rows: Tensor,
    routed_rows: Tensor,
    shared_proj: Tensor,
    routed_proj: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    shared_bias: Tensor | None,
    routed_bias: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    rows = shared_rows, routed_rows, shared_proj, routed_proj, expert_offsets, num_tokens
    pre_activation = expert_gemm(*rows, shared_bias, routed_bias)
    return pre_activation, activation(pre_activation, kind)


def expert_glu_backward(
    grad_shared_rows: Tensor,
    grad_routed_rows: Tensor,
    shared_proj: Tensor,
    routed_proj: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    pre_activation: Tensor,
    row_weights: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = grad_shared_rows, grad_routed_rows, shared_proj, routed_proj, expert_offsets, num_tokens
    return activation_backward(expert_gemm(*rows, transpose=True), pre_activation, row_weights, kind, True)


def merge_experts(shared: list[Tensor], routed: list[Tensor], coefficients: Tensor) -> list[Tensor]:
    merged = []
    for s, r, c in zip(shared, routed, coefficients, strict=True):
        total = r.new_zeros(r.shape[1:], dtype=accumulator(r))
        for weight, coefficient in zip([*s, *r], c, strict=True):
            total = total + coefficient * weight.to(total.dtype)
        merged.append(total.to(r.dtype))
    return merged


def merge_experts_dots(grads: list[Tensor], shared: list[Tensor], routed: list[Tensor]) -> Tensor:
    acc = accumulator(routed[0])
    return torch.stack(
        [
            torch.stack([(g.to(acc) * weight.to(acc)).sum() for weight in [*s, *r]])
            for g, s, r in zip(grads, shared, routed, strict=True)
        ]
    )


def merge_experts_grads(
    grad: Tensor, coefficients: Tensor, num_shared: int, need_shared: bool, need_routed: bool
) -> tuple[Tensor, Tensor]:
    parts, experts = coefficients.shape
    scaled = coefficients.unsqueeze(-1) * grad.to(coefficients.dtype).reshape(parts, 1, -1)  # [parts, S + E, rest]
    each = scaled.transpose(0, 1).reshape(experts, *grad.shape).to(grad.dtype)
    of_shared, of_routed = each[:num_shared], each[num_shared:]
    return of_shared.clone() if need_shared else grad.new_empty(
        0
    ), of_routed.clone() if need_routed else grad.new_empty(0)
