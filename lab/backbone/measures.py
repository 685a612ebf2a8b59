"""Scores of every answer that is measured, and what is read off them, seed by seed: the measures of every study.

Best-of-n, curves and accuracies are the laboratory's; calibration is this module's.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ummrm import combine_scores

from ..best_of_n import best_of_n, standardised
from ..fits import fit_best_of_n
from ..tasks import PolicySamples, Sequences
from ..units import VALUES, curve_values, policy_accuracies, share_right
from .data import Answers, Block, Features

COLUMNS = (*VALUES, "calibration_error", "preference_loss", "correlation", "member_correlation")
"""Columns of runs.csv after regime, seed, arm and optimiser."""

_AT_ONCE = 128  # answers a seed, so that activations stay in the cache: a third faster here than 512
_REFERENCE = 512
_BINS = 10

Rewards = Callable[[Features], Tensor]
"""Rewards [S, n] of features of n answers of each seed."""


@dataclass(frozen=True)
class Scores:
    """Rewards of one model of each seed, fp64 [S, answers].

    Attributes:
        sets: rewards by the name of the set of answers (`answer_sets`).
        members: of an ensemble: each member's rewards of the policy's answers.
    """

    sets: dict[str, Tensor]
    members: tuple[Tensor, ...] = ()


def answer_sets(block: Block) -> dict[str, Answers]:
    """The answers that are scored; `reference` are some without labels, over which ensembles normalise."""
    return {
        "test chosen": block.test.chosen,
        "test rejected": block.test.rejected,
        "shifted chosen": block.shifted.chosen,
        "shifted rejected": block.shifted.rejected,
        "policy": block.policy,
        "reference": reference(block.unlabelled),
    }


def reference(unlabelled: Answers) -> Answers:
    """Some of the answers without labels, taken evenly from all."""
    step = max(1, len(unlabelled) // _REFERENCE)
    return Answers(
        {name: value[:, ::step] for name, value in unlabelled.features.items()},
        unlabelled.lengths[:, ::step],
        unlabelled.shortcut[:, ::step],
    )


@torch.no_grad()
def score(block: Block, answers: Answers, rewards: Rewards) -> Tensor:
    """Rewards of all answers, fp64 [S, n]."""
    seeds = torch.arange(len(block.seeds))
    parts = []
    for first in range(0, len(answers), _AT_ONCE):
        index = torch.arange(first, min(first + _AT_ONCE, len(answers))).expand(len(seeds), -1)
        parts.append(rewards(answers.take(seeds, index)).double())
    return torch.cat(parts, 1)


def score_all(block: Block, rewards: Rewards) -> Scores:
    """Rewards of all sets."""
    return Scores({name: score(block, answers, rewards) for name, answers in answer_sets(block).items()})


def combined(members: list[Scores], rule: str, uncertainty: float) -> Scores:
    """An ensemble's scores, each member normalised over the reference answers, in the members' mean unit."""
    if len(members) == 1:
        return members[0]
    scales = [(m.sets["reference"].mean(1, keepdim=True), m.sets["reference"].std(1, keepdim=True)) for m in members]
    unit = torch.stack([std for _, std in scales]).mean(0)
    sets = {}
    for name, first in members[0].sets.items():
        # each seed has scales of its own
        normal = [(m.sets[name] - mean) / std for m, (mean, std) in zip(members, scales, strict=True)]
        scores = combine_scores(torch.stack([n.flatten() for n in normal], 1), rule, uncertainty=uncertainty)
        sets[name] = unit * scores.view_as(first)
    return Scores(sets, tuple(m.sets["policy"] for m in members if "policy" in m.sets))


def measure(block: Block, scores: Scores, fixed_kl: float) -> list[dict]:
    """What a study keeps of a reward model.

    Returns:
        For each seed its `values`, by the names in `COLUMNS` that come from scores, and its best-of-n `curve`.
    """
    return [_of_seed(block, scores, s, fixed_kl) for s in range(len(block.seeds))]


def _of_seed(block: Block, scores: Scores, seed: int, fixed_kl: float) -> dict:
    sets = {name: values[seed] for name, values in scores.sets.items()}
    gold = block.gold[seed]
    shortcut, proxy = block.policy.shortcut[seed].view_as(gold), sets["policy"].view_as(gold)
    result = best_of_n(standardised(proxy), standardised(gold), shortcut)
    curve = [
        {"step": n, "kl": kl, "proxy": p, "gold": g, "shortcut": s}
        for n, kl, p, g, s in zip(result.n, result.kl, result.proxy, result.gold, result.shortcut, strict=True)
    ]
    fit = fit_best_of_n([math.sqrt(kl) for kl in result.kl], [g - result.gold[0] for g in result.gold])
    most_trained = max(answers.shortcut[seed].max().item() for answers in (block.train.chosen, block.train.rejected))
    samples = PolicySamples(_NO_SEQUENCES, gold, shortcut)
    chosen, rejected = sets["test chosen"], sets["test rejected"]
    values = {
        **curve_values(curve, fixed_kl, 1),
        **dict(zip(("fit_a", "fit_b", "fit_r2"), fit, strict=True)),
        "accuracy": share_right(chosen, rejected),
        "accuracy_shifted": share_right(sets["shifted chosen"], sets["shifted rejected"]),
        **policy_accuracies(proxy, samples, most_trained),
        "accuracy_policy": all_pairs_right(proxy, gold),
        "calibration_error": calibration_error(chosen - rejected, block.label_noise[seed]),
        "preference_loss": -torch.nn.functional.logsigmoid(chosen - rejected).mean().item(),
        "correlation": _correlation(proxy, gold),
    }
    if scores.members:
        each = [member[seed].view_as(gold) for member in scores.members]
        pairs = [_correlation(a, b) for a, b in itertools.combinations(each, 2)]
        values["member_correlation"] = statistics.fmean(pairs)
    return {"values": values, "curve": curve}


def all_pairs_right(proxy: Tensor, gold: Tensor) -> float:
    """Share of pairs of answers to one prompt that differ in gold which the proxy puts in the right order.

    Over all pairs, not over each answer in one pair as `units.policy_accuracies` has it: the same mean, less noise.

    Args:
        proxy: [prompts, samples]; a tie counts half.
        gold: [prompts, samples].
    """
    right, pairs = 0.0, 0
    for p, g in zip(proxy, gold, strict=True):
        ahead = (g[:, None] - g).triu(1).sign()
        right += ((p[:, None] - p).sign() * ahead).sum().item()
        pairs += int(ahead.count_nonzero())
    return 0.5 + 0.5 * right / pairs if pairs else math.nan


def calibration_error(difference: Tensor, label_noise: float) -> float:
    """Expected calibration error of the preference probabilities, over ten bins of the more likely side's probability.

    Args:
        difference: [n], reward of the answer that gold prefers minus the other's.
        label_noise: share of training labels that are wrong: a model can know labels no better, so that an answer that
            gold prefers counts as preferred in all but this share.
    """
    probability = difference.abs().sigmoid()
    right = label_noise + (1 - 2 * label_noise) * (difference > 0).double()
    bins = ((probability - 0.5) * 2 * _BINS).long().clamp_max(_BINS - 1)
    gap = torch.zeros(_BINS, dtype=torch.float64).index_add(0, bins, (probability - right).double())
    return (gap.abs().sum() / len(difference)).item()


def _correlation(proxy: Tensor, gold: Tensor) -> float:
    """Correlation within prompts."""
    x, y = (v.double() - v.double().mean(1, keepdim=True) for v in (proxy, gold))
    return ((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-12)).item()


_NO_SEQUENCES = Sequences(torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long), 0)
