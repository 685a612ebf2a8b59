"""AdamW, clipping and the linear schedule as transformers' Trainer runs them, each replica by itself.

The arithmetic is torch.optim.AdamW's and torch.nn.utils.clip_grad_norm_'s; the norm that is clipped is a replica's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .replicas import Parameters

Loss = Callable[[Parameters, int], Tensor]
"""The loss [R] of a step, from the parameters."""


@dataclass(frozen=True)
class Optimisation:
    """How parameters are trained.

    Attributes:
        warmup_steps: steps of linear warm-up, from a rate of 0; linear decay to 0 follows.
        weight_decay: AdamW's, of matrices alone.
        max_grad_norm: a replica's gradient is clipped to this norm.
        betas: AdamW's.
        epsilon: AdamW's.
    """

    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


class AdamW:
    """torch's AdamW over replicas.

    Args:
        parameters: [R, ...] each, leaves that require gradients; changed in place.
        rates: fp32 [R], each replica's highest learning rate.
        undecayed: names of the parameters that are not decayed.
        settings: the rest.
    """

    def __init__(
        self, parameters: Parameters, rates: Tensor, undecayed: frozenset[str], settings: Optimisation
    ) -> None:
        self.parameters, self.rates, self.undecayed, self.settings = parameters, rates, undecayed, settings
        self.steps = 0
        self._first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self._second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Clips and applies the gradients at `factor` of the rates, and drops them."""
        settings, (beta1, beta2) = self.settings, self.settings.betas
        self.steps += 1
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()], 1).sum(1).sqrt()
        clip = (settings.max_grad_norm / (norms + 1e-6)).clamp_max(1.0)
        rates = self.rates * factor
        size = rates / (1 - beta1**self.steps)
        root = math.sqrt(1 - beta2**self.steps)
        for name, grad in grads.items():
            parameter, first, second = self.parameters[name], self._first[name], self._second[name]
            each = (-1,) + (1,) * (grad.dim() - 1)
            grad.mul_(clip.view(each))
            if settings.weight_decay and name not in self.undecayed:
                parameter.mul_(1 - rates.view(each) * settings.weight_decay)
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            change = first / (second.sqrt().div_(root).add_(settings.epsilon))
            parameter.sub_(change.mul_(size.view(each)))
            parameter.grad = None


def schedule(step: int, steps: int, warmup_steps: int) -> float:
    """transformers' linear schedule: the share of the rate at `step`, counted from 0."""
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    return max(0.0, (steps - step) / max(1, steps - warmup_steps))


def optimise(
    parameters: Parameters,
    loss: Loss,
    steps: int,
    rates: Tensor,
    undecayed: frozenset[str],
    settings: Optimisation,
    on_step: Callable[[int, int], None] | None = None,
) -> Parameters:
    """Minimises each replica's loss; `parameters` are left as they are.

    Args:
        parameters: where training starts, [R, ...].
        loss: of a step.
        steps: how many.
        rates: [R].
        undecayed: as `AdamW`.
        settings: as `AdamW`.
        on_step: told of steps done and steps in all.

    Returns:
        Trained parameters, without gradients.

    Raises:
        FloatingPointError: a replica's loss is not finite.
    """
    trained = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    optimiser = AdamW(trained, rates, undecayed, settings)
    for step in range(steps):
        losses = loss(trained, step)
        if not bool(losses.isfinite().all()):
            bad = (~losses.isfinite()).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the loss of replicas {bad} is not finite at step {step}; lower the learning rate."
            )
        losses.sum().backward()
        optimiser.step(schedule(step, steps, settings.warmup_steps))
        if on_step is not None:
            on_step(step + 1, steps)
    return {name: value.detach() for name, value in trained.items()}
