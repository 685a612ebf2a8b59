"""Shortcut probes: how a model's reward goes with length, and how it changes under edits that keep an answer's content.

Changes are in standard deviations of the model's rewards over all answers of the data, so that models of different
scales compare. A pair is the unit; intervals are over prompts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..hf.texts import Text
from .accuracy import outcomes_of
from .edits import PROBES, Probe, edited
from .intervals import Estimate, bootstrap, mean_of, share_of
from .reading import LabelledPair


@dataclass(frozen=True)
class Edits:
    """The edited answers of one probe, to be scored.

    Attributes:
        probe: which edit.
        texts: prompt and edited answer in full.
        owners: (index of the pair, 0 chosen or 1 rejected) of each text.
        left_out: answers that the edit does not apply to.
    """

    probe: Probe
    texts: list[Text]
    owners: list[tuple[int, int]]
    left_out: int


@dataclass(frozen=True)
class EditEffect:
    """What an edit does to a model's reward.

    Attributes:
        change: mean change of the reward, in standard deviations of the rewards over the data; `count` prompts.
        rose: share of the edited answers whose reward rises, ties half.
        overturned: share of the pairs in the right order whose rejected answer gets at least the chosen one's reward
            once it alone is edited.
        edited: answers edited.
        left_out: answers that the edit does not apply to, or that it makes too long for the model.
        changes: the change of every edited answer, for a plot.
    """

    change: Estimate
    rose: Estimate
    overturned: Estimate
    edited: int
    left_out: int
    changes: np.ndarray


@dataclass(frozen=True)
class LengthEffect:
    """How a model's reward goes with the length of an answer.

    In characters; of texts whose prompt is not told apart, in those behind what both begin with. Pairs of equal length
    are left out of everything here.

    Attributes:
        correlation: of reward and log length within pairs, -1 to 1: both less their mean over the pair's two answers.
        per_doubling: by how many standard deviations the reward rises where an answer is twice as long as the other.
        longer_chosen: share of the pairs whose chosen answer is the longer one: the accuracy of preferring length.
        chosen_shorter: accuracy on pairs whose chosen answer is the shorter one.
        chosen_longer: accuracy on the others.
        log_ratios: log2 of chosen to rejected length, for a plot.
        gaps: difference of reward of these pairs, in standard deviations.
    """

    correlation: Estimate
    per_doubling: Estimate
    longer_chosen: Estimate
    chosen_shorter: Estimate
    chosen_longer: Estimate
    log_ratios: np.ndarray
    gaps: np.ndarray


def choose_pairs(pairs: Sequence[LabelledPair], most: int, seed: int) -> list[int]:
    """Indices of at most `most` pairs, drawn by seed, in order."""
    if len(pairs) <= most:
        return list(range(len(pairs)))
    return sorted(np.random.default_rng(seed).permutation(len(pairs))[:most].tolist())


def make_edits(pairs: Sequence[LabelledPair], chosen: Sequence[int], names: Sequence[str]) -> dict[str, Edits]:
    """Edited answers of some pairs.

    Args:
        pairs: all pairs.
        chosen: which of them.
        names: of probes.

    Returns:
        By name. An edit of an answer's beginning or form does not apply where the answer is not told from its prompt:
        to texts without a prompt of their own.
    """
    found = {}
    for probe in PROBES:
        if probe.name not in names:
            continue
        texts: list[Text] = []
        owners: list[tuple[int, int]] = []
        for number, index in enumerate(chosen):
            pair = pairs[index]
            for side, answer in enumerate((pair.chosen, pair.rejected)):
                unknown = probe.needs_answer and pair.prompt is None and isinstance(answer, str)
                changed = None if unknown else edited(answer, probe, number)
                if changed is not None:
                    texts.append(pair.whole(changed))
                    owners.append((index, side))
        found[probe.name] = Edits(probe, texts, owners, 2 * len(chosen) - len(texts))
    return found


def edit_effect(
    edits: Edits, after: np.ndarray, rewards: np.ndarray, keys: Sequence[str], usable: np.ndarray | None = None
) -> EditEffect | None:
    """What an edit does to one model's rewards.

    Args:
        edits: what was edited.
        after: fp64, rewards of its texts.
        rewards: fp64 [pairs, 2], of chosen and rejected answers as they are.
        keys: [pairs], the same for pairs of one prompt.
        usable: bool of its texts: False leaves one out, as where the model's limit cuts the edit off.

    Returns:
        None where nothing was edited, or all rewards are equal.
    """
    std = float(rewards.std())
    usable = np.ones(len(edits.texts), dtype=bool) if usable is None else usable
    if not usable.any() or std == 0:
        return None
    index, side = np.array(edits.owners)[usable].T
    after = after[usable]
    changes = (after - rewards[index, side]) / std
    groups = [keys[i] for i in index]
    tested = (side == 1) & (rewards[index, 0] > rewards[index, 1])
    overturned = (after >= rewards[index, 0])[tested].astype(np.float64)
    return EditEffect(
        mean_of(changes, groups),
        share_of(outcomes_of(changes), groups),
        share_of(overturned, [group for group, kept in zip(groups, tested, strict=True) if kept]),
        len(changes),
        edits.left_out + int((~usable).sum()),
        changes,
    )


def length_effect(pairs: Sequence[LabelledPair], rewards: np.ndarray) -> LengthEffect | None:
    """How one model's rewards go with length.

    Args:
        pairs: N.
        rewards: fp64 [N, 2], of chosen and rejected answers.

    Returns:
        None where all rewards are equal, or no two answers of a pair differ in length.
    """
    if not pairs:
        return None
    std = float(rewards.std())
    lengths = np.array([_lengths(pair) for pair in pairs], dtype=np.float64)
    differ = (lengths[:, 0] != lengths[:, 1]) & (lengths > 0).all(1)
    if std == 0 or not differ.any():
        return None
    ratios = np.log2(lengths[differ, 0] / lengths[differ, 1])
    gaps = (rewards[differ, 0] - rewards[differ, 1]) / std
    keys = [pair.key for pair, kept in zip(pairs, differ, strict=True) if kept]

    def correlation(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (weights @ (gaps * ratios)) / np.sqrt((weights @ gaps**2) * (weights @ ratios**2))

    def slope(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (weights @ (gaps * ratios)) / (weights @ ratios**2)

    longer = ratios > 0
    outcomes = outcomes_of(gaps)

    def right(which: np.ndarray) -> Estimate:
        return share_of(outcomes[which], [key for key, kept in zip(keys, which, strict=True) if kept])

    return LengthEffect(
        Estimate(*(bootstrap(correlation, keys) if np.any(gaps) else (math.nan,) * 3), len(gaps)),
        Estimate(*bootstrap(slope, keys), len(gaps)),
        share_of(longer.astype(np.float64), keys),
        right(~longer),
        right(longer),
        ratios,
        gaps,
    )


def _lengths(pair: LabelledPair) -> tuple[int, int]:
    chosen, rejected = pair.chosen, pair.rejected
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = len(os.path.commonprefix([chosen, rejected])) if pair.prompt is None else 0
        return len(chosen) - shared, len(rejected) - shared
    one, other = (sum(len(message["content"]) for message in answer) for answer in pair_messages(pair))
    return one, other


def pair_messages(pair: LabelledPair) -> list[list[dict]]:
    """Both answers of a conversation, as messages."""
    return [answer for answer in (pair.chosen, pair.rejected) if not isinstance(answer, str)]
