"""The router: logits, noise and gate weights of one layer, and what a forward leaves for the auxiliary losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..config import UpcycleConfig

NOISE_FLOOR = 0.01  # XFT (arXiv 2404.15247): smallest standard deviation of the learned router noise


@dataclass
class ForwardStatistics:
    """What one forward says about routing, for the auxiliary losses; means are over live tokens.

    Attributes:
        tokens_per_expert: int32 [E], slots sent to each expert.
        mean_prob: [E], mean clean router probability; carries the router's gradient.
        mean_z: [], mean squared logsumexp of the clean logits; carries the router's gradient.
        top_k: K.
        shared_weight: [T], the shared experts' gate weights, without gradient: 1 for a masked token.
        masked: whether the forward was given a token mask.
    """

    tokens_per_expert: torch.Tensor
    mean_prob: torch.Tensor
    mean_z: torch.Tensor
    top_k: int
    shared_weight: torch.Tensor
    masked: bool = False


def in_backward() -> bool:
    """True while autograd is running a backward: a forward seen then is a checkpoint's recomputation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class Router(nn.Module):
    """Top-k router with shared-expert gate weights (docs/method.md), in fp32 whatever the model's dtype.

    Not an `nn.Linear`, so that adapter libraries that wrap "all linear layers" leave it alone.

    Args:
        hidden_size: H.
        config: kind of router, gate and noise.
        device: where the parameters are created.
    """

    def __init__(self, hidden_size: int, config: UpcycleConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size

        def parameter(columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(config.num_experts, columns, device=device, dtype=torch.float32))

        self.weight = parameter(hidden_size)
        if config.router == "mlp":
            self.output_weight = parameter(config.num_experts)
        if config.router_noise == "learned":
            self.noise_weight = parameter(hidden_size)
        self.reset_parameters()

    def reset_parameters(self, normal_=nn.init.normal_, zeros_=nn.init.zeros_) -> None:
        """Normal initialisation of std `config.router_init_std`; the noise's weights start at zero."""
        normal_(self.weight, std=self.config.router_init_std)
        if self.config.router == "mlp":
            normal_(self.output_weight, std=self.config.router_init_std)
        if self.config.router_noise == "learned":
            zeros_(self.noise_weight)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Clean router logits: x [T, H] to fp32 [T, E]."""
        logits = F.linear(x.to(self._compute_dtype(x)), self.weight.to(self._compute_dtype(x)))
        if self.config.router == "mlp":
            logits = F.linear(logits.tanh(), self.output_weight.to(logits.dtype))
        return logits

    @staticmethod
    def _compute_dtype(x: torch.Tensor) -> torch.dtype:
        return torch.float64 if x.dtype == torch.float64 else torch.float32

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor | None = None) -> ops.RouteOutput:
        """Routes tokens.

        Args:
            x: [T, H].
            token_mask: bool [T], True for live tokens; None if all are.

        Returns:
            `ops.route`'s output: gate weights, expert indices and statistics.
        """
        with torch.autocast(x.device.type, enabled=False):
            clean = self.logits(x)
            noisy, kind = clean, self.config.router_noise
            if self.training and kind == "jitter":
                eps, x_wide = self.config.jitter_eps, x.to(clean.dtype)  # bf16 would quantise the noise away
                noisy = self.logits(x_wide * torch.empty_like(x_wide).uniform_(1 - eps, 1 + eps))
            elif self.training and kind == "learned":
                std = F.softplus(F.linear(x.to(clean.dtype), self.noise_weight.to(clean.dtype))) + NOISE_FLOOR
                noisy = clean + torch.randn_like(clean) * std
            return ops.route(
                noisy,
                mask=token_mask,
                clean_logits=clean if noisy is not clean else None,
                top_k=self.config.num_experts_per_tok,
                gate=self.config.gate,
                fixed_shared_weight=self.config.fixed_shared_weight,
            )

    def extra_repr(self) -> str:
        c = self.config
        kind = f"{c.router!r}, gate={c.gate!r}, noise={c.router_noise!r}"
        return f"{self.hidden_size}, experts={c.num_experts}, top_k={c.num_experts_per_tok}, {kind}"
