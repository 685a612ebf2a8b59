"""The merge phase of a linear layer whose weight is one of E: folded by learnable weights into one on every forward."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..config import MergeConfig
from .dense import Projection
from .merge_weights import MergeShare, coefficients
from .merging_ffn import MergingFFN
from .parallel import plain_name
from .upcycled_linear import UpcycledLinear


class MergingLinear(nn.Module):
    """`W = sum_e softmax(alpha)_e W_e` and the bias alike; everything but `alpha` is frozen.

    Args:
        linear: whose experts it takes over: no copy, and not frozen yet. alpha starts uniform.
        merge_config: of the network.
        share: lambda of the network, which is 0: linear layers have no shared experts.
    """

    expert_weight: nn.Parameter
    expert_bias: nn.Parameter | None

    def __init__(self, linear: UpcycledLinear, merge_config: MergeConfig, share: MergeShare) -> None:
        super().__init__()
        self.config, self.merge_config, self._share = linear.config, merge_config, (share,)
        self.expert_weight = linear.expert_weight
        self.register_parameter("expert_bias", linear.expert_bias)
        device = linear.expert_weight.device
        self.alpha = nn.Parameter(torch.zeros(self.config.num_experts, dtype=torch.float32, device=device))
        self._dense_template = linear._dense_template
        self.train(linear.training)

    def coefficients(self) -> torch.Tensor:
        """Merge coefficients [1, E]; they sum to one."""
        return coefficients(self.alpha, self._share[0], 0, 1, self.expert_weight.dtype)

    def merged_tensors(self) -> dict[str, torch.Tensor]:
        """The merged `weight` [N, D] and, where there is one, `bias` [N]: bit for bit those that `forward` uses."""
        held: list[torch.Tensor] = [t for t in (self.expert_weight, self.expert_bias) if t is not None]
        none = [t.new_empty(0, *t.shape[1:]) for t in held]
        merged = ops.merge_experts(none, held, self.coefficients().expand(len(held), -1).contiguous())
        return dict(zip(("weight", "bias"), merged, strict=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] through the merged linear layer."""
        return F.linear(x, **self.merged_tensors())

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
        dense = copy.deepcopy(self._dense_template[0])
        Projection(dense).write(**self.merged_tensors())
        return dense.train(self.training)

    def extra_repr(self) -> str:
        experts, rows, columns = self.expert_weight.shape
        return f"{experts} x ({columns} to {rows}, bias={self.expert_bias is not None})"


def merging_parts(model: nn.Module) -> dict[str, MergingFFN | MergingLinear]:
    """The modules of a network in its merge phase that hold experts, by name, in order."""
    return {plain_name(n): m for n, m in model.named_modules() if isinstance(m, (MergingFFN, MergingLinear))}
