"""What is trained: language models, dense reward models, members by sequence, and students of a teacher's scores.

Each function takes S seeds side by side and draws everything from the seeds themselves. The token mixture is
`mixture.py`'s; the optimiser's arithmetic is `optimiser.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ummrm import draw_groups
from ummrm.nn.losses import preference_loss

from ..seeds import derive
from .data import Answers, Block, Pairs
from .llama import Llama
from .optimiser import Optimisation, optimise
from .replicas import Parameters, shared_name

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Sequencing:
    """Assignment by sequence.

    Attributes:
        experts: E.
        experts_in: what becomes experts: `"ffn"`, `"linear"` or `"all"`, as in `ummrm.UpcycleConfig`: a reward head for
            each expert too, fresh ones but for the first.
        shared_weight: weight of an always-on shared expert; 0: there is none.
        whole_batch: every expert sees a whole batch, in its own order, at E times the cost.
    """

    experts: int = 4
    experts_in: str = "ffn"
    shared_weight: float = 0.0
    whole_batch: bool = False


def generators(seeds: Sequence[int], *labels: object) -> list[torch.Generator]:
    """A generator for what `labels` name, for each seed."""
    return [torch.Generator().manual_seed(derive(seed, *labels)) for seed in seeds]


def order(seed: int, label: object, rows: int, steps: int, batch: int) -> Tensor:
    """Which rows each step sees, epoch by epoch: int64 [steps, batch]."""
    generator = torch.Generator().manual_seed(derive(seed, "order", label))
    epochs = max(1, -(-steps * batch // rows))
    drawn = torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])
    return drawn[: steps * batch].view(steps, batch)


def orders(seeds: Sequence[int], label: object, rows: int, steps: int, batch: int) -> Tensor:
    """`order` of all seeds: [steps, S, batch]."""
    return torch.stack([order(seed, label, rows, steps, batch) for seed in seeds], 1)


def pretrain(
    network: Llama,
    corpus: Answers,
    seeds: Sequence[int],
    steps: int,
    batch: int,
    rate: float,
    settings: Optimisation,
    on_step: OnStep | None = None,
) -> tuple[Parameters, list[float]]:
    """Language models of each seed's corpus, and each one's mean loss over its last tenth of steps."""
    everyone = torch.arange(len(seeds))
    index = orders(seeds, "corpus", len(corpus), steps, batch)
    losses: list[Tensor] = []

    def loss(parameters: Parameters, step: int) -> Tensor:
        losses.append(network.next_token_loss(parameters, corpus.take(everyone, index[step])))
        return losses[-1]

    start = network.initial(generators(seeds, "backbone"))
    trained = optimise(start, loss, steps, rates_of(rate, seeds), network.undecayed, settings, on_step)
    last = torch.stack([one.detach() for one in losses[-max(1, steps // 10) :]]).mean(0)
    return trained, last.tolist()


def train_dense(
    block: Block,
    steps: int,
    batch: int,
    rate: float,
    settings: Optimisation,
    run: int | str = 0,
    pairs: Pairs | None = None,
    weights: Tensor | None = None,
    on_step: OnStep | None = None,
    own_head: bool = False,
) -> Parameters:
    """Dense reward models from the start; runs differ in the order of their data, and in their heads if so.

    Args:
        block: the seeds.
        steps: how many.
        batch: pairs a step.
        rate: learning rate.
        settings: of the optimiser.
        run: number of the run, or another name for it.
        pairs: in the training pairs' place.
        weights: [S, pairs], of each pair's loss, mean 1; None: all 1.
        on_step: told of steps.
        own_head: a run after the first starts from a fresh head of its own, not from the block's.
    """
    train = block.train if pairs is None else pairs
    index = orders(block.seeds, run, len(train), steps, batch)
    loss = _preference(block, train, index, 0.0, weights)
    rates = rates_of(rate, block.seeds)
    start = block.start
    if own_head and run:
        start = start | block.network.fresh_head(generators(block.seeds, "head", run))
    return optimise(start, loss, steps, rates, block.network.undecayed, settings, on_step)


def train_sequence(
    block: Block,
    steps: int,
    batch: int,
    rate: float,
    settings: Optimisation,
    sequencing: Sequencing,
    pairs: Pairs | None = None,
    weights: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Parameters:
    """Experts, each on whole sequences: the start copied E times, groups drawn anew at each step.

    The product's own draw says which expert each pair goes to; both answers of a pair go to the same.

    Returns:
        Expert tensors [S, E, ...] beside those that all members share.
    """
    train, experts = block.train if pairs is None else pairs, sequencing.experts
    if sequencing.whole_batch:
        index = torch.cat([orders(block.seeds, f"member {e}", len(train), steps, batch) for e in range(experts)], 2)
    else:
        index = orders(block.seeds, 0, len(train), steps, batch)
        drawn = [[by_group(seed, step, batch, experts) for seed in block.seeds] for step in range(steps)]
        index = index.gather(2, torch.stack([torch.stack(each) for each in drawn]))
    loss = _preference(block, train, index, sequencing.shared_weight, weights)
    start = upcycled(block, sequencing)
    rates = rates_of(rate, block.seeds)
    shared = frozenset(shared_name(name) for name in block.network.undecayed)
    return optimise(start, loss, steps, rates, block.network.undecayed | shared, settings, on_step)


def by_group(seed: int, step: int, pairs: int, experts: int) -> Tensor:
    """A step's pairs in the order of their experts, int64 [pairs], each expert's equally many.

    Raises:
        ValueError: they can't be equally many.
    """
    if pairs % experts:
        raise ValueError(f"`batch` must be a multiple of the {experts} experts here, got {pairs} pairs.")
    return draw_groups(pairs, experts, seed=seed, step=step).argsort(stable=True)


def upcycled(block: Block, sequencing: Sequencing) -> Parameters:
    """The start with E copies of what becomes experts, and a shared one where it has a weight."""
    names = block.network.expert_names(sequencing.experts_in)
    made = {
        name: value[:, None].repeat(1, sequencing.experts, *[1] * (value.dim() - 1)) if name in names else value
        for name, value in block.start.items()
    }
    if sequencing.experts_in == "all":
        fresh = [block.network.fresh_head(generators(block.seeds, "head", e)) for e in range(1, sequencing.experts)]
        made |= {
            name: torch.stack([block.start[name], *(one[name] for one in fresh)], 1) for name in block.network.head
        }
    if sequencing.shared_weight:
        made |= {shared_name(name): block.start[name] for name in names}
    return made


def merged_by_mean(block: Block, parameters: Parameters, sequencing: Sequencing) -> Parameters:
    """The dense models whose tensors are the experts' mean, a shared expert counted by its weight."""
    names, share = block.network.expert_names(sequencing.experts_in), sequencing.shared_weight
    merged = {name: value for name, value in parameters.items() if not name.startswith(shared_name(""))}
    for name in names:
        mean = parameters[name].double().mean(1)
        if share:
            mean = share * parameters[shared_name(name)].double() + (1 - share) * mean
        merged[name] = mean.float()
    return merged


def distil(
    block: Block,
    answers: Answers,
    student: Parameters,
    targets: Tensor,
    steps: int,
    batch: int,
    rate: float,
    settings: Optimisation,
    on_step: OnStep | None = None,
) -> Parameters:
    """Regresses a student on a teacher's scores of answers without labels.

    Args:
        block: the seeds.
        answers: n of each seed.
        student: where it starts.
        targets: [S, n], in the student's own scale.
        steps: how many.
        batch: answers a step.
        rate: learning rate.
        settings: of the optimiser.
        on_step: told of steps.
    """
    everyone = torch.arange(len(block.seeds))
    index = orders(block.seeds, "distillation", len(answers), steps, batch)
    wanted = targets.float()
    scale = wanted.std(1, keepdim=True).square()

    def loss(parameters: Parameters, step: int) -> Tensor:
        rewards = block.network.rewards(parameters, answers.take(everyone, index[step]))
        return ((rewards - wanted.gather(1, index[step])).square() / scale).mean(1)

    rates = rates_of(rate, block.seeds)
    return optimise(student, loss, steps, rates, block.network.undecayed, settings, on_step)


def shortcut_weights(pairs: Pairs) -> Tensor:
    """Weights [S, pairs], mean 1, under which the shortcut says nothing about the label.

    Measured on the training pairs alone: those in which the preferred answer has more of the shortcut weigh together as
    much as those in which it has less; where both have the same, 1.
    """
    lead = (pairs.chosen.shortcut - pairs.rejected.shortcut).sign()
    agrees, disagrees = (lead > 0).double(), (lead < 0).double()
    share = agrees.sum(1, keepdim=True) / (agrees + disagrees).sum(1, keepdim=True).clamp_min(1)
    weights = torch.ones_like(lead)
    weights = torch.where(lead > 0, 0.5 / share.clamp_min(1e-3), weights)
    weights = torch.where(lead < 0, 0.5 / (1 - share).clamp_min(1e-3), weights)
    return (weights / weights.mean(1, keepdim=True)).float()


def _preference(block: Block, pairs: Pairs, index: Tensor, shared_weight: float, weights: Tensor | None):
    everyone = torch.arange(len(block.seeds))

    def loss(parameters: Parameters, step: int) -> Tensor:
        rewards = block.network.rewards(parameters, pairs.take(everyone, index[step]), shared_weight)
        return pair_losses(rewards, None if weights is None else weights.gather(1, index[step]))

    return loss


def pair_losses(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """The preference loss [R] of rewards [R, 2m], both answers of a pair beside each other, the preferred one first.

    Args:
        rewards: as they come from `Pairs.take`.
        weights: [R, m] of the pairs; None: all 1.
    """
    chosen, rejected = rewards.view(len(rewards), -1, 2).unbind(-1)
    if weights is None:
        return torch.stack([preference_loss(c, r) for c, r in zip(chosen, rejected, strict=True)])
    return (-F.logsigmoid(chosen - rejected) * weights).mean(1)


def rates_of(rate: float, seeds: Sequence[int]) -> Tensor:
    """One learning rate for all seeds, fp32 [S]."""
    return torch.full((len(seeds),), rate)
