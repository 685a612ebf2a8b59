"""The whole evaluation: every text that any part needs is scored once by each model, then the parts read the rewards.

Models are loaded one after the other, so that memory holds one. Nothing here draws or writes: `report.py` does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..hf.texts import Text
from .accuracy import Accuracy, accuracy, accuracy_by_subset
from .agreement import Comparison, compare_models
from .best_of_n import Curve, best_of_n
from .calibration import Calibration, calibration
from .edits import LENGTH, NAMES
from .probes import EditEffect, Edits, LengthEffect, choose_pairs, edit_effect, length_effect, make_edits
from .reading import TIES, Candidates, EvaluationData
from .rewardbench import Benchmark, rewardbench, rewardbench2
from .scoring import RewardScorer, Scores, ScoringError

Model = RewardScorer | Callable[[], RewardScorer]
"""A scorer, or what loads one when its turn comes."""
TOO_LONG = ("cut", "drop")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured.

    Attributes:
        too_long: what becomes of pairs with a text over a model's limit: `cut` scores what is within, `drop` leaves
            them out for all models, as training does. Both are counted.
        probes: names of shortcut probes, of `NAMES`.
        probe_pairs: the edits are made on at most so many pairs, drawn by seed.
        seed: of that draw, the halves for the temperature, and simulated outcomes.

    Raises:
        ValueError: fields that can't be meant.
    """

    too_long: str = "cut"
    probes: tuple[str, ...] = NAMES
    probe_pairs: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if listed := isinstance(self.probes, (list, tuple)):
            object.__setattr__(self, "probes", tuple(self.probes))
        known = listed and all(name in NAMES for name in self.probes)
        for name, holds, expected in (
            ("too_long", self.too_long in TOO_LONG, f"one of {', '.join(TOO_LONG)}"),
            ("probes", known, f"names of {', '.join(NAMES)}"),
            ("probe_pairs", isinstance(self.probe_pairs, int) and self.probe_pairs >= 1, "an integer of at least 1"),
            ("seed", isinstance(self.seed, int) and self.seed >= 0, "an integer, at least 0"),
        ):
            if not holds:
                raise ValueError(f"EvaluationConfig: `{name}` must be {expected}, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class ModelResult:
    """What was found of one model. What the data do not tell of is None.

    Attributes:
        class_name: of the model.
        parameters: how many it has.
        dtype: what it computed in.
        max_length: most tokens that it takes; None if it names no limit.
        scored: different texts, those that probes and benchmarks made included.
        cut: how many of them were longer than the limit.
        flattened: conversations that were scored as texts, since the tokenizer has no chat template.
        cut_pairs: pairs with such a text.
        seconds: time of scoring, tokenisation included, in one pass; no measure by which to compare models.
        mean: of the rewards of the pairs' answers.
        std: their standard deviation.
        accuracy: over all pairs.
        subsets: by subset.
        subset_mean: mean of the subsets' accuracies, each counting the same.
        calibration: of sigmoid of the difference.
        length: the probe of length.
        edits: by name of the probe.
        benchmarks: RewardBench 1 and 2.
        best_of_n: against the gold rewards.
    """

    class_name: str
    parameters: int
    dtype: str
    max_length: int | None
    scored: int
    cut: int
    flattened: int
    cut_pairs: int
    seconds: float
    mean: float
    std: float
    accuracy: Accuracy | None
    subsets: dict[str, Accuracy]
    subset_mean: float
    calibration: Calibration | None
    length: LengthEffect | None
    edits: dict[str, EditEffect | None]
    benchmarks: list[Benchmark]
    best_of_n: Curve | None


@dataclass(frozen=True)
class Evaluation:
    """Results of several models on the same data.

    Attributes:
        models: by name.
        comparisons: of every two models.
        data: what was read, in words.
        notes: what a reader of the numbers must know, in words.
        pairs: that were used.
        prompts: different ones among them.
        dropped: pairs left out since a text of theirs is over a model's limit.
        gold: who gave the gold rewards of best-of-n, or None.
        config: what was measured.
    """

    models: dict[str, ModelResult]
    comparisons: list[Comparison]
    data: list[str]
    notes: list[str]
    pairs: int
    prompts: int
    dropped: int
    gold: str | None
    config: EvaluationConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: NaN is None, single rewards are left out."""
        return plain(self)


def plain(value: Any) -> Any:
    """Dataclasses as mappings without their arrays, NaN and infinity as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: plain(item) for name, item in items.items() if not isinstance(item, np.ndarray)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(number: int, noun: str) -> str:
    """A number of things: 1 pair, 2,000 pairs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


@dataclass
class _Texts:
    """Different texts, each once."""

    texts: list[Text] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    def add(self, texts: Sequence[Text]) -> np.ndarray:
        """Their places."""
        places = []
        for text in texts:
            key = text if isinstance(text, str) else "\0" + json.dumps(text, sort_keys=True)
            if key not in self.known:
                self.known[key] = len(self.texts)
                self.texts.append(text)
            places.append(self.known[key])
        return np.array(places, dtype=np.int64)


@dataclass(frozen=True)
class _Places:
    """Where the texts of each part stand."""

    pairs: np.ndarray
    edits: dict[str, tuple[Edits, np.ndarray]]
    choices: list[np.ndarray]
    candidates: list[np.ndarray]


def evaluate(
    models: Mapping[str, Model],
    data: EvaluationData,
    config: EvaluationConfig | None = None,
    *,
    candidates: Candidates | None = None,
    gold: Model | None = None,
    progress: Callable[[str], str | None] = lambda name: None,
) -> Evaluation:
    """Evaluates models on the same data.

    Args:
        models: by name; a callable is called when its model's turn comes, and what it gives is dropped after it.
        data: see `read_evaluation_data`.
        config: what is measured.
        candidates: answers for best-of-n curves; their gold rewards come with them, or from `gold`.
        gold: the gold model, where candidates come without gold rewards.
        progress: is told a model's name before it scores, and says what a progress bar is called.

    Returns:
        The results; `report.write_report` makes JSON and a page of them.

    Raises:
        ValueError: no model; rewards that are not finite; a conversation for a tokenizer without a chat template;
            `too_long="drop"` leaves no pair; or candidates and gold rewards that do not fit together.
    """
    config = config or EvaluationConfig()
    if not models:
        raise ValueError("`models` must hold at least one reward model, got none.")
    if (candidates is not None and candidates.gold is None) != (gold is not None):
        raise ValueError("`gold` must be given where, and only where, `candidates` come without gold rewards.")
    texts = _Texts()
    chosen = choose_pairs(data.pairs, config.probe_pairs, config.seed)
    edits = make_edits(data.pairs, chosen, config.probes)
    places = _Places(
        np.array([texts.add(pair.texts) for pair in data.pairs], dtype=np.int64).reshape(-1, 2),
        {name: (one, texts.add(one.texts)) for name, one in edits.items()},
        [texts.add(choice.texts) for choice in data.choices],
        [texts.add(answers) for answers in candidates.texts] if candidates is not None else [],
    )
    found: dict[str, Scores] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        found[name], facts[name] = _score(model, texts.texts, progress(name))
    gold_notes: list[str] = []
    gold_name, gold_rewards = None, None
    if candidates is not None:
        gold_name, gold_rewards, gold_notes = _gold(candidates, gold, progress)
    long = np.zeros(len(data.pairs), dtype=bool)
    if config.too_long == "drop":
        for scores in found.values():
            long |= scores.cut[places.pairs].any(1)
    kept = np.flatnonzero(~long)
    if len(data.pairs) and not len(kept):
        raise ValueError(
            "`too_long` must leave some pairs, and every pair has a text over a model's limit; raise `max_length`, or "
            'use "cut".'
        )
    differences, results = {}, {}
    for name, scores in found.items():
        results[name] = _result(scores, facts[name], data, places, kept, config, gold_rewards)
        rewards = scores.rewards[places.pairs[kept]]
        differences[name] = rewards[:, 0] - rewards[:, 1]
    keys = [data.pairs[i].key for i in kept]
    comparisons = compare_models(differences, keys) if len(kept) and len(models) > 1 else []
    lines = data.lines() + (candidates.lines() if candidates is not None else [])
    notes = _notes(data, results, places, int(long.sum()), config) + gold_notes
    prompts = len(set(keys))
    return Evaluation(results, comparisons, lines, notes, len(kept), prompts, int(long.sum()), gold_name, config)


def _score(model: Model, texts: Sequence[Text], progress: str | None) -> tuple[Scores, dict[str, Any]]:
    scorer = model if isinstance(model, RewardScorer) else model()
    begin = time.perf_counter()
    scores = scorer.score(texts, progress=progress)
    seconds = time.perf_counter() - begin
    bad = np.flatnonzero(~np.isfinite(scores.rewards))
    if len(bad):
        raise ScoringError(
            f"`models` must give finite rewards, and {scorer.name} gives NaN or infinity for {len(bad):,} of "
            f"{len(texts):,} texts; score with another dtype (float32), or leave the model out."
        )
    facts = {
        "class_name": type(scorer.model).__name__,
        "parameters": sum(p.numel() for p in scorer.model.parameters()),
        "dtype": str(scorer.model.dtype).removeprefix("torch."),
        "max_length": scorer.max_length,
        "scored": len(texts),
        "cut": int(scores.cut.sum()),
        "flattened": sum(scorer.flattens(text) for text in texts),
        "seconds": seconds,
    }
    return scores, facts


def _gold(
    candidates: Candidates, gold: Model | None, progress: Callable[[str], str | None]
) -> tuple[str, list[np.ndarray], list[str]]:
    if candidates.gold is not None:
        return f"the column `gold` of {candidates.report.name}", [np.array(one) for one in candidates.gold], []
    assert gold is not None  # checked by the caller
    texts = _Texts()
    places = [texts.add(answers) for answers in candidates.texts]
    scorer = gold if isinstance(gold, RewardScorer) else gold()
    scores, facts = _score(scorer, texts.texts, progress(scorer.name))
    return scorer.name, [scores.rewards[place] for place in places], _model_notes(f"{scorer.name} (gold)", facts)


def _result(
    scores: Scores,
    facts: dict[str, Any],
    data: EvaluationData,
    places: _Places,
    kept: np.ndarray,
    config: EvaluationConfig,
    gold: list[np.ndarray] | None,
) -> ModelResult:
    pairs = [data.pairs[i] for i in kept]
    rewards = scores.rewards[places.pairs]
    differences = rewards[kept, 0] - rewards[kept, 1]
    keys = [pair.key for pair in data.pairs]
    subsets = accuracy_by_subset(pairs, differences)
    benchmarks = []
    first = np.array([pair.benchmark == "rewardbench" for pair in pairs], dtype=bool)
    if first.any():
        benchmarks.append(rewardbench([pair for pair in pairs if pair.benchmark == "rewardbench"], differences[first]))
    if data.choices:
        benchmarks.append(rewardbench2(data.choices, [scores.rewards[place] for place in places.choices]))
    effects: dict[str, EditEffect | None] = {}
    for name, (edits, place) in places.edits.items():
        owners = np.array(edits.owners, dtype=np.int64).reshape(-1, 2)
        # of a text that is cut the edit may be what is cut off
        usable = ~scores.cut[place] & ~scores.cut[places.pairs[owners[:, 0], owners[:, 1]]]
        effects[name] = edit_effect(edits, scores.rewards[place], rewards, keys, usable)
    curve = None
    if gold is not None:
        curve = best_of_n([scores.rewards[place] for place in places.candidates], gold)
    held = rewards[kept]
    return ModelResult(
        **facts,
        cut_pairs=int(scores.cut[places.pairs].any(1).sum()) if len(data.pairs) else 0,
        mean=float(held.mean()) if held.size else math.nan,
        std=float(held.std()) if held.size else math.nan,
        accuracy=accuracy(pairs, differences) if pairs else None,
        subsets=subsets,
        subset_mean=float(np.mean([one.share.value for one in subsets.values()])) if subsets else math.nan,
        calibration=calibration(differences, [pair.key for pair in pairs], config.seed) if pairs else None,
        length=length_effect(pairs, rewards[kept]) if pairs and LENGTH in config.probes else None,
        edits=effects,
        benchmarks=benchmarks,
        best_of_n=curve,
    )


def _model_notes(name: str, facts: Mapping[str, Any]) -> list[str]:
    """What was done to a model's texts."""
    notes = []
    if facts["cut"]:
        notes.append(
            f"{name}: {facts['cut']:,} of {facts['scored']:,} texts are longer than {facts['max_length']:,} tokens and "
            "are scored by what is within."
        )
    if facts["flattened"]:
        notes.append(
            f"{name}: its tokenizer has no chat template; {counted(facts['flattened'], 'conversation')} scored as text "
            "with an empty line between messages."
        )
    return notes


def _notes(
    data: EvaluationData, results: dict[str, ModelResult], places: _Places, dropped: int, config: EvaluationConfig
) -> list[str]:
    notes = []
    if dropped:
        notes.append(f"{counted(dropped, 'pair')} with a text over a model's limit left out for all models.")
    for name, result in results.items():
        notes += _model_notes(name, vars(result))
        if result.cut_pairs:
            notes.append(f"{name}: {counted(result.cut_pairs, 'pair')} with a text that is cut.")
        if result.accuracy is not None and result.accuracy.ties:
            notes.append(f"{name}: equal rewards in {counted(result.accuracy.ties, 'pair')}, which count half.")
        if data.pairs and result.std == 0:
            notes.append(f"{name}: all rewards are equal, so that nothing can be told in units of their spread.")
    used = min(len(data.pairs), config.probe_pairs)
    if places.edits and used < len(data.pairs):
        notes.append(f"Edits are made on {used:,} of the {len(data.pairs):,} pairs, drawn by seed {config.seed}.")
    if any(pair.prompt is None and isinstance(pair.chosen, str) for pair in data.pairs):
        notes.append(
            "Some pairs are texts in which the prompt is not told from the answer: edits of an answer's beginning or "
            "form are left out there. A column named prompt, or conversations, bring them in."
        )
    if any(choice.subset == TIES for choice in data.choices):
        notes.append(
            f"RewardBench 2's subset {TIES} enters its own score alone: no pairs of a better and a worse answer."
        )
    if len(results) > 1:  # one is in memory at a time, so that they can't be timed side by side
        notes.append(
            "Texts a second do not compare the models: each scored once and by itself, with whatever else the machine "
            "did meanwhile. Models of one architecture cost the same."
        )
    return notes
