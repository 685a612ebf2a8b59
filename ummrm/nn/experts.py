"""The stacked parameters of a layer's experts, and how a layer hands them to the operators.

Which experts a token goes to is the router's business, and what a layer computes is that of `upcycled_ffn.py` and
`merging_ffn.py`. Experts that lie on several processes run here, since no process can hand out the parameters of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import ops
from ..config import UpcycleConfig
from .dense import DenseFFN, FFNSpec

# Elements. torch draws 16 at a time on a CPU: the parts of a tensor get the numbers that the whole would.
_NOISE_PART = 16 << 16


class Experts(nn.Module):
    """The stacked parameters of n experts of one layer; they are run by `ops.moe_ffn` and `ops.merged_ffn`.

    Its forward hands out the parameters. The layers read them that way, never by attribute, since adapters on
    parameters (PEFT's `target_parameters`) and sharding put the effective tensors in place for a forward only. Called
    with indices and weights it runs the experts instead: so transformers' expert parallelism does, which replaces the
    forward by one that exchanges tokens and leaves `num_experts` those of this process.

    Parameters: `gate_up_proj` [n, 2I, H] (gate rows first) for a gated FFN or `up_proj` [n, I, H] for a plain one,
    `down_proj` [n, H, I], and `<name>_bias` [n, rows] where the dense FFN had biases.
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        spec: FFNSpec,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.spec = num_experts, spec

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, dtype=dtype, device=device))

        self.up_name = "gate_up_proj" if spec.glu else "up_proj"
        self.register_parameter(self.up_name, parameter(spec.up_rows, spec.hidden_size))
        self.down_proj = parameter(spec.hidden_size, spec.intermediate_size)
        self.register_parameter(f"{self.up_name}_bias", parameter(spec.up_rows) if spec.up_bias else None)
        self.register_parameter("down_proj_bias", parameter(spec.hidden_size) if spec.down_bias else None)
        self.reset_parameters()

    @classmethod
    def shared(
        cls,
        spec: FFNSpec,
        config: UpcycleConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Experts | None:
        """The shared experts that `config` has; None without any, since nobody likes parameters without elements."""
        return cls(config.num_shared_experts, spec, dtype, device) if config.num_shared_experts else None

    def forward(self, x: torch.Tensor, indices: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> Any:
        """The parameters, or what the experts compute.

        Args:
            x: [T, H]; without `indices` for wrappers of a forward alone.
            indices: integer [T, K] in [0, n), or n for a slot that is left out, as transformers' experts take it.
            weights: [T, K], of each slot.

        Returns:
            Without `indices` the effective `up`, `down`, `up_bias`, `down_bias`, absent ones None; else [T, H],
            `sum_k weights[t, k] * expert_{indices[t, k]}(x_t)`, in x's dtype.
        """
        held = {"up": self.up, "down": self.down_proj, "up_bias": self.up_bias, "down_bias": self.down_proj_bias}
        if indices is None or weights is None:
            return held
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        experts: dict[str, Any] = {f"shared_{name}": tensor for name, tensor in no_experts(held).items()}
        experts |= {f"routed_{name}": tensor for name, tensor in held.items()}
        return ops.moe_ffn(
            x,
            torch.zeros(x.shape[0], dtype=wide, device=x.device),
            weights.to(wide),
            torch.where(indices == self.num_experts, -1, indices).to(torch.int32),
            **experts,
            activation=self.spec.activation,
            glu=self.spec.glu,
        )

    def reset_parameters(self, std: float = 0.02, normal_=nn.init.normal_, zeros_=nn.init.zeros_) -> None:
        """Random experts: normal weights, zero biases. Upcycling fills them with copies instead."""
        for name, tensor in self.tensors().items():
            if name.endswith("bias"):
                zeros_(tensor)
            else:
                normal_(tensor, std=std)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Present parameters under the layout-independent names `up`, `down`, `up_bias`, `down_bias`."""
        named = {"up": self.up, "down": self.down_proj, "up_bias": self.up_bias, "down_bias": self.down_proj_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def up(self) -> nn.Parameter:
        """[n, 2I or I, H]"""
        return getattr(self, self.up_name)

    @property
    def up_bias(self) -> nn.Parameter | None:
        """[n, 2I or I], or None."""
        return getattr(self, f"{self.up_name}_bias")

    @torch.no_grad()
    def copy_from(self, ffn: DenseFFN, noise: float = 0.0) -> None:
        """Makes every expert a copy of `ffn`, plus normal noise of `noise` times each weight's own std."""
        fused = ffn.fused()
        for name, tensor in self.tensors().items():
            tensor.copy_(fused[name].unsqueeze(0).expand_as(tensor))
            if noise > 0 and not name.endswith("bias"):
                add_noise(tensor, noise * fused[name].float().std().item())

    def extra_repr(self) -> str:
        s = self.spec
        kind = f"{'gated' if s.glu else 'plain'} {s.activation}"
        return (
            f"{self.num_experts} x ({s.hidden_size} to {s.intermediate_size}, {kind}, biases={s.up_bias}/{s.down_bias})"
        )


def are_parted(experts: nn.Module) -> bool:
    """Whether this process holds some of the experts alone, as transformers' `grouped_gemm` rule leaves the module."""
    return any(getattr(module, "_is_expert_parallel", False) for module in experts.modules())  # below adapters too


def expert_arguments(shared: Experts | None, routed: Experts, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """An FFN's parameters as the operators take them, `shared_up`, `routed_up`, ...; x is for wrappers of a forward."""
    groups = {"routed": routed(x)}
    groups["shared"] = no_experts(groups["routed"]) if shared is None else shared(x)
    return {f"{group}_{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def no_experts(like: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Stacks of no expert, beside those in `like`."""
    return {name: None if t is None else t.new_empty(0, *t.shape[1:]) for name, t in like.items()}


@torch.no_grad()
def add_noise(tensor: torch.Tensor, std: float) -> None:
    """Adds normal noise, drawn in fp32, in place: on a CPU part by part, beside little memory.

    Args:
        tensor: contiguous.
        std: its standard deviation.
    """
    flat = tensor.view(-1)
    step, start = _NOISE_PART if tensor.device.type == "cpu" else flat.numel(), 0
    while start < flat.numel():
        end = start + step if flat.numel() - start >= 2 * step else flat.numel()
        part = flat[start:end]
        part.add_((torch.randn_like(part, dtype=torch.float32) * std).to(part.dtype))
        start = end


def flatten_tokens(x: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """x [..., H] as [T, H]."""
    if x.dim() == 0 or x.shape[-1] != hidden_size:
        raise ValueError(f"`x` must be [..., {hidden_size}] (the FFN's hidden size), got {list(x.shape)}.")
    return x.reshape(-1, hidden_size)
