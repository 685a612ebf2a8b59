"""A linear layer whose weight is one of E, by the sequence that a row belongs to (`experts_in="linear"`, `"all"`).

A drop-in for an `nn.Linear` (or a transposed one), assigned by sequence alone. Its merge phase is `merging_linear.py`'s
business.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .. import ops
from ..config import UpcycleConfig
from .assignment import BySequence, RowGroups
from .dense import Projection, is_linear
from .experts import add_noise
from .parallel import plain_name
from .upcycled_ffn import UpcycledFFN


class UpcycledLinear(BySequence):
    """E linear layers of one shape; each row of a batch goes through its expert's: [rows, ..., D] to [rows, ..., N].

    Not an `nn.Linear`, so that adapter libraries that wrap "all linear layers" leave it alone; LoRA reaches it through
    `target_parameters`.

    Parameters: `expert_weight` [E, N, D], `expert_bias` [E, N] or None.

    Args:
        in_features: D.
        out_features: N.
        bias: whether there is one.
        config: the upcycling configuration, with `experts_in="linear"` or `"all"`.
        dtype: of the parameters.
        device: where they are created.
    """

    expert_weight: nn.Parameter
    expert_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: UpcycleConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not config.has_linear_experts:
            raise ValueError(
                'UpcycledLinear: `config` must have assignment="sequence" and experts_in="linear" or "all", got '
                f"assignment={config.assignment!r} and experts_in={config.experts_in!r}."
            )
        self.in_features, self.out_features, self.config = in_features, out_features, config
        shape, kind = (config.num_experts, out_features), dict[str, Any](dtype=dtype, device=device)
        self.expert_weight = nn.Parameter(torch.empty(*shape, in_features, **kind))
        self.register_parameter("expert_bias", nn.Parameter(torch.empty(*shape, **kind)) if bias else None)
        self._dense_template: tuple[nn.Module] | None = None  # in a tuple, so that it is no part of this one
        self._start_by_sequence()
        self.reset_parameters()

    @classmethod
    def from_dense(cls, linear: nn.Module, config: UpcycleConfig) -> UpcycledLinear:
        """Upcycles one linear layer; `linear` itself is left as it is.

        Raises:
            TypeError: `linear` is no linear layer, or `config` of another type.
            ValueError: `config` does not say `experts_in="linear"` or `"all"`.
        """
        if not is_linear(linear):
            raise TypeError(f"`linear` must be an nn.Linear, got {type(linear).__name__}.")
        if not isinstance(config, UpcycleConfig):
            raise TypeError(f"`config` must be an UpcycleConfig, got {type(config).__name__}.")
        upcycled = cls.like(linear, config)
        upcycled.copy_from(linear, config.expert_noise)
        upcycled._dense_template = (copy.deepcopy(linear).to("meta"),)
        return upcycled.train(linear.training)

    @classmethod
    def like(cls, linear: nn.Module, config: UpcycleConfig) -> UpcycledLinear:
        """One of the shape, dtype and device of a linear layer, its parameters random."""
        dense = Projection(linear)
        kind = dense.weight.dtype, dense.weight.device
        return cls(dense.in_features, dense.out_features, dense.bias is not None, config, *kind)

    def reset_parameters(self, std: float = 0.02, normal_=nn.init.normal_, zeros_=nn.init.zeros_) -> None:
        """Random experts: normal weights, zero biases. Upcycling fills them with copies instead."""
        normal_(self.expert_weight, std=std)
        if self.expert_bias is not None:
            zeros_(self.expert_bias)

    @torch.no_grad()
    def copy_from(self, linear: nn.Module, noise: float = 0.0) -> None:
        """Makes every expert a copy of `linear`, plus normal noise of `noise` times the weight's own std."""
        dense = Projection(linear)
        self.expert_weight.copy_(dense.weight.unsqueeze(0).expand_as(self.expert_weight))
        if noise > 0:
            add_noise(self.expert_weight, noise * dense.weight.float().std().item())
        if self.expert_bias is not None and dense.bias is not None:
            self.expert_bias.copy_(dense.bias.unsqueeze(0).expand_as(self.expert_bias))

    def forward(self, x: torch.Tensor, groups: RowGroups | None = None) -> torch.Tensor:
        """x [rows, ..., D] through the experts of its rows."""
        rows = self._row_groups(groups, x)
        weight, bias = self.expert_weight, self.expert_bias
        out = rows(lambda flat, offsets: ops.grouped_linear(flat, weight, offsets, bias), _flat(x, self.in_features))
        return out.view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "groups": None, "used_groups": None}

    def extra_repr(self) -> str:
        shape = f"{self.in_features} to {self.out_features}"
        return f"{self.config.num_experts} x ({shape}, bias={self.expert_bias is not None})"


def _flat(x: torch.Tensor, features: int) -> torch.Tensor:
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"`x` must be [..., {features}] (the layer's input features), got {list(x.shape)}.")
    return x.reshape(-1, features)


def mixture_parts(model: nn.Module) -> dict[str, UpcycledFFN | UpcycledLinear]:
    """The modules of a network in its mixture phase that hold experts, by name, in order."""
    return {plain_name(n): m for n, m in model.named_modules() if isinstance(m, (UpcycledFFN, UpcycledLinear))}
