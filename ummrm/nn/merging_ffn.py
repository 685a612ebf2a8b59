"""The merge phase of an FFN: frozen experts, folded by learnable weights into one dense FFN on every forward.

A plain `nn.Module`, made from an `UpcycledFFN`; how a whole model enters and leaves the phase is `ummrm/merge.py`'s
business.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .. import ops
from ..config import MergeConfig, UpcycleConfig
from .dense import FFNPaths, FFNSpec
from .experts import Experts, expert_arguments, flatten_tokens, no_experts
from .merge_weights import MergeShare, coefficients
from .parallel import plain_name
from .upcycled_ffn import UpcycledFFN


class MergingFFN(nn.Module):
    """The merge phase of an upcycled FFN: experts folded by learnable weights into one dense FFN on every forward.

    `merged tensor = lambda / S * sum_s W_s + (1 - lambda) * sum_e softmax(alpha)_e W_e`; everything but `alpha` (and
    lambda, if learned) is frozen.

    Args:
        spec: shape and kind of the FFN.
        config: the upcycling configuration it came from.
        merge_config: granularity of alpha.
        share: lambda, held by reference: one for the whole network, registered where `prepare_merge` puts it.
        dtype: of the experts; alpha is fp32.
        device: where parameters are created.
    """

    def __init__(
        self,
        spec: FFNSpec,
        config: UpcycleConfig,
        merge_config: MergeConfig,
        share: MergeShare,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.config, self.merge_config = spec, config, merge_config
        self.experts = Experts(config.num_experts, spec, dtype, device)
        self.shared_experts = Experts.shared(spec, config, dtype, device)
        for experts in (self.experts, self.shared_experts):
            if experts is not None:
                experts.requires_grad_(False)
        rows = (spec.num_projections,) if merge_config.alpha_per == "projection" else ()
        self.alpha = nn.Parameter(torch.zeros(*rows, config.num_experts, dtype=torch.float32, device=device))
        self._share = (share,)
        self.token_mask: torch.Tensor | None = None  # layers set it for any FFN; a dense forward has no use for it
        self._dense_template: tuple[nn.Module, FFNPaths] | None = None

    @classmethod
    def from_upcycled(cls, ffn: UpcycledFFN, merge_config: MergeConfig, share: MergeShare) -> MergingFFN:
        """Takes over the experts of `ffn` (no copy, not frozen yet); alpha starts uniform."""
        weight = ffn.experts.down_proj
        with torch.device("meta"):
            merged = cls(ffn.spec, ffn.config, merge_config, share, dtype=weight.dtype)
        merged.experts, merged.shared_experts = ffn.experts, ffn.shared_experts
        merged.alpha = nn.Parameter(torch.zeros(merged.alpha.shape, dtype=torch.float32, device=weight.device))
        merged._dense_template = ffn._dense_template
        return merged.train(ffn.training)

    def coefficients(self) -> torch.Tensor:
        """Merge coefficients [projections, S + E], shared experts first; each row sums to one.

        In fp32 (fp64 for fp64 experts), whatever dtype the network was cast to.
        """
        S, rows = self.config.num_shared_experts, self.spec.num_projections
        return coefficients(self.alpha, self._share[0], S, rows, self.experts.down_proj.dtype)

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., H] through the merged dense FFN. `token_mask` is accepted and has no effect: padding is computed."""
        flat = flatten_tokens(x, self.spec.hidden_size)
        experts: dict[str, Any] = expert_arguments(self.shared_experts, self.experts, flat)
        out = ops.merged_ffn(
            flat,
            self.coefficients(),
            **experts,
            activation=self.spec.activation,
            glu=self.spec.glu,
        )
        return out.view(x.shape)

    @torch.no_grad()
    def merged_tensors(self) -> dict[str, torch.Tensor]:
        """The dense FFN's tensors, laid out as `DenseFFN.fused`, bit for bit those that `forward` uses."""
        routed = self.experts.tensors()
        shared: Any = no_experts(routed) if self.shared_experts is None else self.shared_experts.tensors()
        groups = {"shared": shared, "routed": routed}
        tensors = {f"{kind}_{name}": t for kind, group in groups.items() for name, t in group.items()}
        merged = ops.merge_ffn(self.coefficients(), **tensors, glu=self.spec.glu)
        return dict(zip(routed, merged, strict=True))

    def to_dense(self) -> nn.Module:
        """A module of the class that `UpcycledFFN.from_dense` was given, holding the merged weights.

        Raises:
            ValueError: this FFN was not made by `from_dense` (a Hugging Face model: use `ummrm.merge(model)`).
        """
        if self._dense_template is None:
            raise ValueError(
                "MergingFFN.to_dense needs the module that UpcycledFFN.from_dense was given, and this one has none; "
                "for a Hugging Face model call ummrm.merge(model) on the whole model."
            )
        template, paths = self._dense_template
        dense = copy.deepcopy(template)
        paths.read(dense).write(self.merged_tensors())
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"alpha_per={self.merge_config.alpha_per!r}"


def merging_ffns(model: nn.Module) -> dict[str, MergingFFN]:
    """The `MergingFFN` modules of a network by name, in order."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, MergingFFN)}
