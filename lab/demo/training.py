"""Training on preference pairs: one plain loop for the dense model, the mixture and the merge weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from ummrm import preference_loss

from ..tasks import PreferencePairs
from .config import TrainConfig

OnStep = Callable[[int, float], None]


@dataclass
class History:
    """What a training stage went through.

    Attributes:
        loss: preference loss of each step's batch.
        auxiliary: weighted auxiliary loss of each step's batch.
        evaluated: steps after which `accuracy` was measured.
        accuracy: test set name to accuracies at `evaluated`.
    """

    loss: list[float] = field(default_factory=list)
    auxiliary: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    accuracy: dict[str, list[float]] = field(default_factory=dict)

    def mean_loss(self, last: int) -> float:
        """Mean preference loss of the last steps."""
        return sum(self.loss[-last:]) / len(self.loss[-last:])


def train(
    model: nn.Module,
    pairs: PreferencePairs,
    config: TrainConfig,
    seed: int,
    auxiliary: Callable[[nn.Module], torch.Tensor] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    on_step: OnStep | None = None,
) -> History:
    """Trains every parameter of `model` that requires a gradient, in place.

    Args:
        model: maps `input_ids`, `attention_mask` to an output with `logits` [N, 1].
        pairs: training pairs; each batch is padded to its own longest answer.
        config: steps, batch size, optimiser.
        seed: of the data order and dropout. Equal seeds and settings give equal batches.
        auxiliary: a loss to add after each forward, such as `ummrm.auxiliary_loss`.
        evaluate: accuracies by test set name, measured `config.evaluations` times.
        on_step: called after each step with the number of steps done and the preference loss.

    Returns:
        The losses and accuracies on the way. The model is left in eval mode.

    Raises:
        ValueError: nothing in `model` requires a gradient, or there are fewer pairs than a batch.
        FloatingPointError: the loss became NaN or infinite.
    """
    if len(pairs) < config.batch_size:
        raise ValueError(f"`pairs` must hold at least one batch of {config.batch_size} pairs, got {len(pairs)}.")
    optimizer = _optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    stops = {round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
    history = History()
    torch.manual_seed(seed)
    batches = batch_indices(len(pairs), config.batch_size, seed)
    model.train()
    for step in range(1, config.steps + 1):
        batch = pairs.select(next(batches))
        chosen, rejected = model(**batch.inputs(device)).logits.squeeze(-1).chunk(2)
        loss = preference_loss(chosen, rejected)
        extra = auxiliary(model) if auxiliary is not None else loss.new_zeros(())
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at step {step}; lower `learning_rate`.")
        with torch.autocast(device.type, enabled=False):  # where forwards run under it, backwards must not
            (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.loss.append(value)
        history.auxiliary.append(extra.item())
        if evaluate is not None and step in stops:
            model.eval()
            history.evaluated.append(step)
            for name, accuracy in evaluate(model).items():
                history.accuracy.setdefault(name, []).append(accuracy)
            model.train()
        if on_step is not None:
            on_step(step, value)
    model.eval()
    return history


def batch_indices(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of indices below `count`: a new random order each epoch, its incomplete last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch_size].split(batch_size)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"`model` must have a parameter that requires a gradient, got a {type(model).__name__}.")
    decayed = [p for name, p in named if p.dim() >= 2 and not name.endswith("alpha")]
    exempt = [p for name, p in named if p.dim() < 2 or name.endswith("alpha")]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)


def _rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
