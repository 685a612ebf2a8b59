"""The specification of the composed operators `moe_ffn`, `merge_ffn` and `merged_ffn`: as `reference.py`, for all that
takes experts whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import accumulator, merge_experts
from .reference import activation as activate


def _dense_ffn(x: Tensor, up: Tensor, down: Tensor, up_bias, down_bias, kind: str, glu: bool) -> Tensor:
    return F.linear(activate(F.linear(x, up, up_bias), kind, glu), down, down_bias)


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
    def pick(tensor: Tensor | None, e: int) -> Tensor | None:
        return None if tensor is None else tensor[e]

    def expert(rows, up, down, up_bias, down_bias, e):
        y = _dense_ffn(rows, up[e], down[e], pick(up_bias, e), pick(down_bias, e), activation, glu)
        return y.to(accumulator(x))

    out, num_shared = torch.zeros_like(x, dtype=accumulator(x)), shared_up.shape[0]
    for s in range(num_shared):
        y = expert(x, shared_up, shared_down, shared_up_bias, shared_down_bias, s)
        out = out + (shared_weight / num_shared).unsqueeze(-1) * y
    for e in range(routed_up.shape[0]):
        hit = expert_indices == e
        chosen = hit.any(-1, keepdim=True)  # masked before and after, so that a NaN stays with its token and expert
        y = expert(torch.where(chosen, x, 0.0), routed_up, routed_down, routed_up_bias, routed_down_bias, e)
        weight = torch.where(hit, routed_weights, 0.0).sum(-1, keepdim=True)
        out = out + torch.where(chosen, weight * y, 0.0)
    return out.to(x.dtype)


def merge_ffn_by(merge: Callable, coefficients: Tensor, experts: Sequence[Tensor | None]) -> list[Tensor]:
    """An FFN's tensors, each by `merge`, a merge_experts: gate and up rows have coefficients of their own."""
    merged, pairs = [], zip(experts[::2], experts[1::2], strict=True)
    for rows, (shared, routed) in zip((coefficients[:-1], coefficients[-1:]) * 2, pairs, strict=True):
        if shared is not None and routed is not None:
            parts = (list(tensor.chunk(len(rows), 1)) for tensor in (shared, routed))
            merged.append(torch.cat(merge(*parts, rows)))
    return merged


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
    biases = shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias
    return merge_ffn_by(merge_experts, coefficients, (shared_up, routed_up, shared_down, routed_down, *biases))


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
    biases = shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias
    experts = shared_up, routed_up, shared_down, routed_down, *biases
    merged = [t.to(x.dtype) for t in merge_ffn_by(merge_experts, coefficients, experts)]
    up, down = merged[:2]
    biases_of = iter(merged[2:])
    up_bias = None if routed_up_bias is None or shared_up_bias is None else next(biases_of)
    down_bias = None if routed_down_bias is None or shared_down_bias is None else next(biases_of)
    return _dense_ffn(x, up, down, up_bias, down_bias, activation, glu)
