"""The kernels behind transformers' experts interface: `experts_implementation="ummrm"` for any stock MoE.

transformers' MoE models (Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss, ...) hand the routed experts of a layer to a
function registered by name; importing ummrm registers this one. Routing and shared experts stay the model's own. What
differs between models (activation, gate, layout, biases, norm) is read off the experts module that calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import moe as hf_moe

from .. import ops
from ..ops.reference import accumulator

NAME = "ummrm"
_TRAITS = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Runs the routed experts of one stock layer: `sum_k weight[t, k] * expert_{index[t, k]}(x_t)`.

    One fused autograd node (`ops.moe_ffn`) where the experts are plain `act` or `act(gate) * up` FFNs stored as
    [E, out, in]; else permute, grouped GEMM and unpermute around the module's own gate.

    Args:
        experts: a module that transformers' `use_experts_implementation` decorates.
        hidden_states: float [T, H].
        top_k_index: integer [T, K]; an index of E or more (expert parallelism: another process's expert) is skipped.
        top_k_weights: float [T, K].

    Returns:
        [T, H] in the dtype of `hidden_states`.

    Raises:
        ValueError: the module's parameters are none that the kernels can take; names them and the remedy.
    """
    _check(experts)
    up, down, up_bias, down_bias = parameters = _parameters(experts)
    rows = hidden_states if _autocast(up) else hidden_states.to(up.dtype)  # a model's norms may compute wider
    weights = top_k_weights.to(accumulator(rows))
    indices = torch.where(top_k_index < down.shape[0], top_k_index, -1).to(torch.int32)
    kind = _fused_activation(experts)
    if kind is None:
        out = _composed(experts, rows, indices, weights, parameters)
    else:
        no_shared = [None if p is None else p.new_empty(0, *p.shape[1:]) for p in parameters]
        names = ("up", "down", "up_bias", "down_bias")
        stacks: dict[str, Any] = {f"shared_{n}": p for n, p in zip(names, no_shared, strict=True)}
        stacks |= {f"routed_{n}": p for n, p in zip(names, parameters, strict=True)}
        shared_weight = weights.new_zeros(rows.shape[0])
        glu = _trait(experts, "has_gate")
        out = ops.moe_ffn(rows, shared_weight, weights, indices, **stacks, activation=kind, glu=glu)
    return out.to(hidden_states.dtype)


def _composed(experts: Any, x: Tensor, indices: Tensor, weights: Tensor, parameters: tuple) -> Tensor:
    """Any gate, layout and norm: the operators one by one, with the module's own functions between them."""
    up, down, up_bias, down_bias = parameters
    tokens, top_k = indices.shape
    slot_to_sorted, sorted_to_slot, offsets = ops.sort_slots(indices, down.shape[0])
    expert_of_row = indices.flatten()[sorted_to_slot].clamp_min(0).long()

    def project(rows: Tensor, proj: Tensor, bias: Tensor | None) -> Tensor:
        rows = rows if _autocast(proj) else rows.to(proj.dtype)
        no_shared, transpose = proj.new_empty(0, *proj.shape[1:]), _trait(experts, "is_transposed")
        out = ops.expert_gemm(rows[:0], rows, no_shared, proj, offsets, tokens, transpose=transpose)
        return out if bias is None else out + bias[expert_of_row].to(out.dtype)

    rows = project(ops.permute(x, sorted_to_slot, offsets, top_k), up, up_bias)
    rows = experts._apply_gate(rows) if _trait(experts, "has_gate") else experts.act_fn(rows)
    rows = project(rows, down, down_bias)
    if _trait(experts, "has_post_expert_norm"):
        rows = experts.post_expert_norm(rows)
    return ops.unpermute(rows, slot_to_sorted, offsets, None, weights.to(accumulator(rows)), 0, top_k)


def _autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def _trait(experts: nn.Module, name: str) -> bool:
    """What transformers' decorator says about a module; what its version does not say yet is as it was before."""
    return getattr(experts, name, _TRAITS[name])


def _names(experts: nn.Module) -> tuple[str, str, str, str]:
    up = "gate_up_proj" if _trait(experts, "has_gate") else "up_proj"
    return up, "down_proj", f"{up}_bias", "down_proj_bias"


def _parameters(experts: nn.Module) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    up, down, up_bias, down_bias = _names(experts)
    biases = (getattr(experts, up_bias), getattr(experts, down_bias)) if _trait(experts, "has_bias") else (None, None)
    return getattr(experts, up), getattr(experts, down), *biases


def _check(experts: nn.Module) -> None:
    remedy = f'load it with experts_implementation="grouped_mm" or "eager" instead of "{NAME}".'
    for name in _names(experts)[: 4 if _trait(experts, "has_bias") else 2]:
        tensor = getattr(experts, name, None)
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS or tensor.dim() != 3 - name.endswith("bias"):
            found = type(tensor).__name__
            found += f" {tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else ""
            raise ValueError(
                f"{type(experts).__name__}.{name} must be a plain float tensor with one slice an expert, got {found} "
                f"(quantised or differently laid out experts are not served); {remedy}"
            )


_KINDS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
}


def _fused_activation(experts: nn.Module) -> str | None:
    """The kernels' name of the activation if the fused node computes exactly this module, else None."""
    gated, plain_gate = _trait(experts, "has_gate"), _trait(experts, "is_concatenated")
    plain_gate = plain_gate and getattr(type(experts), "_apply_gate", None) is hf_moe._default_apply_gate
    if _trait(experts, "is_transposed") or _trait(experts, "has_post_expert_norm") or (gated and not plain_gate):
        return None
    act = experts.act_fn
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if type(act) is activations.GELUActivation:
        return "gelu"
    return _KINDS.get(type(act))


def register() -> None:
    """Makes `experts_implementation="ummrm"` known to transformers."""
    hf_moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
