"""Training: one plain loop for the dense model, the mixture and the merge weights, and for distillation.

Knows pairs and answers as tokens. What is trained in which order is the business of `by_token.py` and `by_sequence.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from ummrm import draw_groups, preference_loss, set_reward_normalization
from ummrm.hf.ensembles import score_texts
from ummrm.hf.normalization import of_rewards
from ummrm.nn.ensembles import UNCERTAINTY, TargetScale

from ..tasks import PreferencePairs, Sequences
from .config import TrainConfig

OnStep = Callable[[int, float], None]
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass
class History:
    """What a training stage went through.

    Attributes:
        loss: preference loss (of distillation: mean squared difference) of each step's batch.
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
    evaluate: Evaluate | None = None,
    on_step: OnStep | None = None,
    num_experts: int | None = None,
) -> History:
    """Trains every parameter of `model` that requires a gradient, in place.

    Args:
        model: maps `input_ids`, `attention_mask` (and `groups`) to an output with `logits` [N, 1].
        pairs: training pairs; each batch is padded to its own longest answer.
        config: steps, batch size, optimiser.
        seed: of the data order and dropout. Equal seeds and settings give equal batches.
        auxiliary: a loss to add after each forward, such as `ummrm.auxiliary_loss`.
        evaluate: accuracies by test set name, measured `config.evaluations` times.
        on_step: called after each step with the number of steps done and the preference loss.
        num_experts: of a mixture assigned by sequence, whose experts the pairs of each step are dealt to
            (`ummrm.draw_groups`), as `ummrm.UmmRewardTrainer` deals them; else None.

    Returns:
        The losses and accuracies on the way. The model is left in eval mode.

    Raises:
        ValueError: nothing in `model` requires a gradient, or there are fewer pairs than a batch.
        FloatingPointError: the loss became NaN or infinite.
    """
    if len(pairs) < config.batch_size:
        raise ValueError(f"`pairs` must hold at least one batch of {config.batch_size} pairs, got {len(pairs)}.")

    def losses(rows: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = pairs.select(rows).inputs(next(model.parameters()).device)
        if num_experts is not None:
            groups = draw_groups(len(rows), num_experts, seed=seed, step=step - 1)
            inputs["groups"] = groups.repeat(2)  # all chosen answers, then all rejected ones
        chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
        loss = preference_loss(chosen, rejected)
        return loss, auxiliary(model) if auxiliary is not None else loss.new_zeros(())

    return _steps(model, len(pairs), config, seed, losses, evaluate, on_step)


def distil(
    model: PreTrainedModel,
    mixture: PreTrainedModel,
    answers: Sequences,
    config: TrainConfig,
    seed: int,
    batch_size: int,
    evaluate: Evaluate | None = None,
    on_step: OnStep | None = None,
) -> History:
    """Trains `model` on the members' mean score, in place: what `ummrm.UmmDistillTrainer` does, on tokens, without TRL.

    Members' scores are normalised over the answers, averaged and standardised; the loss is the mean squared difference
    between that and the model's own scores, normalised by the mean and spread that they have at the start, which the
    model's configuration keeps.

    Args:
        model: the student, a stock reward model.
        mixture: the teacher, assigned by sequence.
        answers: N of them, without labels.
        config: steps, answers a step, optimiser.
        seed: of the data order and dropout.
        batch_size: answers a forward where both are scored before training.
        evaluate: as in `train`.
        on_step: as in `train`, with the squared difference.

    Returns:
        The losses, in the teacher's variance, and accuracies on the way. The model is left in eval mode.

    Raises:
        ValueError, FloatingPointError: as `train`.
    """
    if len(answers) < config.batch_size:
        raise ValueError(f"`answers` must hold at least one batch of {config.batch_size} answers, got {len(answers)}.")
    targets = teacher_targets(mixture, answers, batch_size)
    scale = of_rewards(member_scores_of(model, answers, batch_size).squeeze(1))
    set_reward_normalization(model, scale)

    def losses(rows: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = answers.select(rows).inputs(next(model.parameters()).device)
        scores = scale(model(**inputs).logits.squeeze(-1))
        loss = (scores - targets[rows].to(scores)).square().mean()
        return loss, loss.new_zeros(())

    return _steps(model, len(answers), config, seed, losses, evaluate, on_step)


def teacher_targets(mixture: PreTrainedModel, answers: Sequences, batch_size: int) -> torch.Tensor:
    """The mean of the members' normalised scores, standardised over `answers`: fp64 [N]."""
    scores = member_scores_of(mixture, answers, batch_size)
    names = [f"member {e}" for e in range(scores.shape[1])]
    return TargetScale.measured(scores, "mean", UNCERTAINTY, names).targets(scores, "mean", UNCERTAINTY)


def member_scores_of(model: PreTrainedModel, sequences: Sequences, batch_size: int) -> torch.Tensor:
    """Scores by each member of a mixture, or by a reward model alone: fp64 [N, members]."""
    rows = [row[:length].tolist() for row, length in zip(sequences.tokens, sequences.lengths.tolist(), strict=True)]
    return score_texts(model, rows, batch_size)


def _steps(
    model: nn.Module,
    rows: int,
    config: TrainConfig,
    seed: int,
    losses: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
    evaluate: Evaluate | None,
    on_step: OnStep | None,
) -> History:
    """The loop: `losses` gives the loss, and what is added to it, of the chosen rows at a step, counted from 1."""
    optimizer = _optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    stops = {round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
    history = History()
    torch.manual_seed(seed)
    batches = batch_indices(rows, config.batch_size, seed)
    model.train()
    for step in range(1, config.steps + 1):
        loss, extra = losses(next(batches), step)
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
