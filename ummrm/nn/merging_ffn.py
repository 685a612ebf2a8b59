"""The merge phase of an FFN: frozen experts, folded by learnable weights into one dense FFN on every forward.

A plain `nn.Module`, made from an `UpcycledFFN`; how a whole model enters and leaves the phase is `ummrm/merge.py`'s
business.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import ops
from ..config import MergeConfig, UpcycleConfig
from .dense import FFNPaths, FFNSpec
from .experts import Experts, expert_arguments, flatten_tokens
from .upcycled_ffn import UpcycledFFN


class MergeShare(nn.Module):
    """lambda, the shared experts' share of the merge: one number for a model, fixed or learned as sigmoid(l).

    In the state dict either way: `share` [1] if fixed, `logit` [1] if learned. Either starts at `config.shared_share`;
    from then on the tensor says what lambda is, whoever loads or sets it. The fixed one is fp32 whatever the network is
    cast to, and `to_empty` keeps it.
    """

    share: torch.Tensor
    logit: nn.Parameter

    def __init__(self, config: MergeConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        # one element, not a scalar: sharding libraries refuse parameters without dimensions
        start = torch.empty(1, dtype=torch.float32, device=device)
        if config.learn_shared_share:
            self.logit = nn.Parameter(start)
        else:
            self.register_buffer("share", start)
        self.reset_parameters()

    def reset_parameters(self, constant_: Callable[..., object] = nn.init.constant_) -> None:
        """Starts lambda at `config.shared_share`."""
        share = self.config.shared_share
        if self.config.learn_shared_share:
            constant_(self.logit, math.log(share / (1 - share)))
        else:
            constant_(self.share, share)

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """lambda, [1], of `like`'s dtype and device."""
        return self.logit.sigmoid().to(like) if self.config.learn_shared_share else self.share.to(like)

    @property
    def merge_config(self) -> MergeConfig:
        """`config` with `shared_share()`.

        Raises:
            ValueError: the tensor was set to no number in [0, 1].
        """
        return dataclasses.replace(self.config, shared_share=self.shared_share())

    def shared_share(self) -> float:
        """The start of a learned lambda; of a fixed one the fewest digits that are, in fp32, what the tensor holds."""
        configured = self.config.shared_share
        if self.config.learn_shared_share or self.share.is_meta:
            return configured
        value = self.share.item()
        shorter = (float(f"{value:.{digits}g}") for digits in range(1, 10))
        return next((s for s in (configured, *shorter) if torch.tensor(s, dtype=torch.float32).item() == value), value)

    def _apply(self, fn, recurse=True):
        held = self._buffers.get("share")
        super()._apply(fn, recurse)
        if held is None or self.share.is_meta:
            return self
        if held.is_meta:
            self.share = torch.empty(1, dtype=torch.float32, device=self.share.device)
            self.reset_parameters()
        else:  # not what `fn` made of it, which a cast has rounded and to_empty left unset
            self.share = held.to(self.share.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors):
        share = state_dict.get(f"{prefix}share")
        if torch.is_tensor(share) and share.numel() == 1 and not share.is_meta and not 0 <= share.item() <= 1:
            errors.append(f"`{prefix}share`, a fixed lambda, must be a number in [0, 1], got {share.item()}.")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors)
        if not self.config.learn_shared_share:
            self.share = self.share.float()  # which assigning, in place of copying, leaves in the loaded dtype

    def extra_repr(self) -> str:
        return f"{self.shared_share()}, learned={self.config.learn_shared_share}"


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
        self.shared_experts = Experts(config.num_shared_experts, spec, dtype, device)
        for experts in (self.experts, self.shared_experts):
            experts.reset_parameters()
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
        wide = torch.float64 if self.experts.down_proj.dtype == torch.float64 else torch.float32
        alpha = self.alpha.to(wide)
        share = self._share[0](alpha)
        alpha = alpha if alpha.dim() == 2 else alpha.expand(self.spec.num_projections, -1)
        shared = (share / self.config.num_shared_experts).expand(alpha.shape[0], self.config.num_shared_experts)
        return torch.cat([shared, (1 - share) * alpha.softmax(-1)], dim=-1)

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
        groups = {"shared": self.shared_experts, "routed": self.experts}
        tensors = {f"{kind}_{name}": t for kind, group in groups.items() for name, t in group.tensors().items()}
        merged = ops.merge_ffn(self.coefficients(), **tensors, glu=self.spec.glu)
        return dict(zip(self.experts.tensors(), merged, strict=True))

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
    return {name: module for name, module in model.named_modules() if isinstance(module, MergingFFN)}
