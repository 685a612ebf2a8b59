"""The merge phase of a linear layer whose weight is one of E: folded by learnable weights into one on every forward."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..config import MergeConfig, UpcycleConfig
from .dense import Projection
from .merge_weights import MergeShare, coefficients
from .merging_ffn import MergingFFN
from .upcycled_linear import UpcycledLinear


class MergingLinear(nn.Module):
    """`W = sum_e softmax(alpha)_e W_e` and the bias alike; everything but `alpha` is frozen.

    Args:
        in_features: D.
        out_features: N.
        bias: whether there is one.
        config: the upcycling configuration that it came from.
        merge_config: of the network.
        share: lambda of the network, which is 0: linear layers have no shared experts.
        dtype: of the experts; alpha is fp32.
        device: where parameters are created.
    """

    expert_weight: nn.Parameter
    expert_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: UpcycleConfig,
        merge_config: MergeConfig,
        share: MergeShare,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.merge_config, self._share = config, merge_config, (share,)
        shape = (config.num_experts, out_features)
        weight = torch.empty(*shape, in_features, dtype=dtype, device=device)
        self.expert_weight = nn.Parameter(weight, requires_grad=False)
        bias_tensor = torch.empty(*shape, dtype=dtype, device=device) if bias else None
        held = None if bias_tensor is None else nn.Parameter(bias_tensor, requires_grad=False)
        self.register_parameter("expert_bias", held)
        self.alpha = nn.Parameter(torch.zeros(config.num_experts, dtype=torch.float32, device=device))
        self._dense_template: nn.Module | None = None

    @classmethod
    def from_upcycled(cls, linear: UpcycledLinear, merge_config: MergeConfig, share: MergeShare) -> MergingLinear:
        """Takes over the experts of `linear` (no copy, not frozen yet); alpha starts uniform."""
        weight, bias = linear.expert_weight, linear.expert_bias
        with torch.device("meta"):
            merged = cls(
                linear.in_features, linear.out_features, bias is not None, linear.config, merge_config, share, weight.dtype
            )
        merged.expert_weight, merged.expert_bias = weight, bias
        merged.alpha = nn.Parameter(torch.zeros(merged.alpha.shape, dtype=torch.float32, device=weight.device))
        merged._dense_template = linear._dense_template
        return merged.train(linear.training)

    def coefficients(self) -> torch.Tensor:
        """Merge coefficients [1, E]; they sum to one."""
        return coefficients(self.alpha, self._share[0], 0, 1, self.expert_weight.dtype)

    def _merged(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        held = [t for t in (self.expert_weight, self.expert_bias) if t is not None]
        none = [t.new_empty(0, *t.shape[1:]) for t in held]
        merged = ops.merge_experts(none, held, self.coefficients().expand(len(held), -1).contiguous())
        return merged[0], merged[1] if len(merged) > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] through the merged linear layer."""
        weight, bias = self._merged()
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def write_to(self, linear: nn.Module) -> None:
        """Gives a linear layer the merged weight and bias, bit for bit those that `forward` uses."""
        weight, bias = self._merged()
        Projection(linear).write(weight, bias)

    def merged_tensors(self) -> dict[str, torch.Tensor]:
        """The merged `weight` [N, D] and, where there is one, `bias` [N]."""
        with torch.no_grad():
            weight, bias = self._merged()
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def to_dense(self) -> nn.Module:
        """A module of the class that `UpcycledLinear.from_dense` was given, holding the merged weights.

        Raises:
            ValueError: this one was not made by `from_dense`.
        """
        if self._dense_template is None:
            raise ValueError(
                "MergingLinear.to_dense needs the module that UpcycledLinear.from_dense was given, and this one has "
                "none; for a Hugging Face model call ummrm.merge(model) on the whole model."
            )
        dense = copy.deepcopy(self._dense_template)
        self.write_to(dense)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        experts, rows, columns = self.expert_weight.shape
        return f"{experts} x ({columns} to {rows}, bias={self.expert_bias is not None})"


def merging_parts(model: nn.Module) -> dict[str, MergingFFN | MergingLinear]:
    """The modules of a network in its merge phase that hold experts, by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (MergingFFN, MergingLinear))}
