"""What the merge weights of a network are made of: alpha of each layer, and one lambda for all.

How they fold experts is `merging_ffn.py`'s and `merging_linear.py`'s business.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from ..config import MergeConfig

LEARNED = ("alpha", "logit")
"""Names of the parameters that the coefficients are made of."""


def coefficients(
    alpha: torch.Tensor, share: MergeShare, num_shared: int, rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """Merge coefficients [rows, S + E], shared experts first; each row sums to one.

    Args:
        alpha: [E], or [rows, E].
        share: lambda; of no effect without shared experts, where it is 0.
        num_shared: S.
        rows: how many.
        dtype: of the experts: coefficients are in fp32, or fp64 for fp64 experts.
    """
    alpha = alpha.to(torch.float64 if dtype == torch.float64 else torch.float32)
    alpha = alpha if alpha.dim() == 2 else alpha.expand(rows, -1)
    routed = alpha.softmax(-1)
    if not num_shared:
        return routed.contiguous()
    of_shared = share(alpha)
    shared = (of_shared / num_shared).expand(rows, num_shared)
    return torch.cat([shared, (1 - of_shared) * routed], dim=-1)


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
        share = self._configured()
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
        configured = self._configured()
        if self.config.learn_shared_share or self.share.is_meta:
            return configured
        value = self.share.item()
        shorter = (float(f"{value:.{digits}g}") for digits in range(1, 10))
        return next((s for s in (configured, *shorter) if torch.tensor(s, dtype=torch.float32).item() == value), value)

    def _configured(self) -> float:
        share = self.config.shared_share
        assert share is not None, "a configuration as MergeConfig.resolved gives it"
        return share

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
