"""What a model is evaluated on: preference pairs with subsets, RewardBench 1 and 2 from disk, candidates for best-of-n.

Rows come from `ummrm.data`, which names each by file and line. Here a row becomes texts to score; a row that makes none
is counted and reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.config import DataError, PairSource
from ..data.pairs import pair_of
from ..data.report import SourceReport, made_of
from ..data.rows import Place, RowProblem
from ..data.texts import messages_of, whole_text
from ..hf.texts import Text, joined

FORMATS = ("pairs", "rewardbench", "rewardbench2")
ALL = "all"  # the subset of data that name none
TIES = "Ties"  # RewardBench 2's subset of prompts with several right answers


@dataclass(frozen=True)
class LabelledPair:
    """Two answers to a prompt, of which data say the better one.

    Attributes:
        prompt: None where it stands in front of the answers.
        chosen: the better answer, text or messages as the prompt is.
        rejected: the other one.
        subset: what it belongs to.
        key: the same for pairs of one prompt.
        benchmark: one of `FORMATS`.
    """

    prompt: Text | None
    chosen: Text
    rejected: Text
    subset: str
    key: str
    benchmark: str = "pairs"

    @property
    def texts(self) -> tuple[Text, Text]:
        """Both in full, the chosen one first."""
        return self.whole(self.chosen), self.whole(self.rejected)

    def whole(self, answer: Text) -> Text:
        """The prompt and an answer."""
        return joined(self.prompt, answer) if self.prompt else answer


@dataclass(frozen=True)
class Choice:
    """A prompt of RewardBench 2 with right and wrong answers.

    Attributes:
        prompt: a conversation.
        right: the right answers; several in the subset Ties alone.
        wrong: the wrong ones.
        subset: what it belongs to.
        identity: `id` of the row, which in Ties says what belongs together.
    """

    prompt: list[dict[str, Any]]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    subset: str
    identity: str

    @property
    def texts(self) -> list[Text]:
        """Every answer in full, the right ones first."""
        return [self.prompt + [{"role": "assistant", "content": answer}] for answer in (*self.right, *self.wrong)]


@dataclass(frozen=True)
class EvaluationData:
    """What was read.

    Attributes:
        pairs: of all sources, in order; those of a RewardBench 2 source are its right answer against each wrong one.
        choices: the prompts of RewardBench 2.
        reports: what was read of each source and what was left out.
    """

    pairs: list[LabelledPair]
    choices: list[Choice]
    reports: list[SourceReport]

    @property
    def subsets(self) -> list[str]:
        """In the order in which they first occur."""
        return list(dict.fromkeys(pair.subset for pair in self.pairs))

    def lines(self) -> list[str]:
        """What was read, in words."""
        return [line for report in self.reports for line in report.lines()]


def read_evaluation_data(
    sources: Sequence[PairSource], *, subset: str | None = None, form: str | None = None, strict: bool = False
) -> EvaluationData:
    """Reads pairs and benchmarks.

    Args:
        sources: files, folders, data sets; their weights are not used.
        subset: the column that names a row's subset; None: `subset` if there is one, else the whole source is one.
        form: one of `FORMATS`; None: told from the columns. RewardBench 1 has `chosen_model` and `rejected_model`,
            RewardBench 2 lists of texts in `chosen` and `rejected`.
        strict: whether a row that makes no pair is an error.

    Raises:
        DataError: a source that can't be read or has no sound row; under `strict` a row that makes none.
        ValueError: an unknown `form`, or no source.
    """
    if form is not None and form not in FORMATS:
        raise ValueError(f"`form` must be one of {', '.join(FORMATS)}, got {form!r}.")
    if not sources:
        raise ValueError("`sources` must hold at least one file or data set, got none.")
    data = EvaluationData([], [], [])
    for source in sources:
        _read(source, data, subset, form, several=len(sources) > 1)
    left_out = sum(report.problems.total() for report in data.reports)
    if strict and left_out:
        lines = "\n".join(data.lines())
        raise DataError(f"{left_out:,} rows make no pair, and `strict` is set; mend them or drop it:\n{lines}")
    return data


def _read(source: PairSource, data: EvaluationData, subset: str | None, form: str | None, *, several: bool) -> None:
    report = SourceReport(source.path)
    data.reports.append(report)
    default = source.path if several else ALL

    def make(row: Mapping[str, Any], place: Place) -> tuple[list[LabelledPair], list[Choice]]:
        kind = form or _form_of(row)
        name = _subset(row, subset, default)
        if kind == "rewardbench2":
            choice = _choice(row, name)
            return _pairs_of(choice), [choice]
        return [_pair(row, source, place, name, kind)], []

    for pairs, choices in made_of(source, report, make, "pairs or a benchmark"):
        data.pairs.extend(pairs)
        data.choices.extend(choices)


def _form_of(row: Mapping[str, Any]) -> str:
    if {"chosen_model", "rejected_model", "subset"} <= set(row):
        return "rewardbench"
    lists = [row.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(value, list) and value and all(isinstance(one, str) for one in value) for value in lists):
        return "rewardbench2"
    return "pairs"


def _subset(row: Mapping[str, Any], column: str | None, default: str) -> str:
    value = row.get(column or "subset")
    if value is None:
        if column is not None:
            has = ", ".join(map(str, list(row)[:12])) or "none"
            raise RowProblem("malformed", f"no column {column!r}, which names the subset; it has {has}")
        return default
    if not isinstance(value, (str, int)):
        raise RowProblem("malformed", f"the subset must be a name, got {value!r:.40}")
    return str(value)


def _pair(row: Mapping[str, Any], source: PairSource, place: Place, subset: str, form: str) -> LabelledPair:
    if form == "rewardbench" and isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), str):
        source = replace(source, as_messages=True, turns=None)
    pair = pair_of(row, source, place)
    # without a beginning that both answers share there is nothing to tell a prompt by: each pair stands for itself
    return LabelledPair(pair.prompt, pair.chosen, pair.rejected, subset, pair.key or str(place), form)


def _choice(row: Mapping[str, Any], subset: str) -> Choice:
    sides = {}
    for name in ("chosen", "rejected"):
        value = row.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
            raise RowProblem("malformed", f"{name} must be a list of texts, as RewardBench 2 has it, got {value!r:.40}")
        sides[name] = tuple(value)
    if len(sides["chosen"]) > 1 and subset != TIES:
        raise RowProblem("malformed", f"{len(sides['chosen'])} right answers, which only the subset {TIES} may have")
    prompt = row.get("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_of(prompt, "prompt")
    return Choice(messages, sides["chosen"], sides["rejected"], subset, str(row.get("id", "")))


def _pairs_of(choice: Choice) -> list[LabelledPair]:
    """A right answer against each wrong one; none where several are right, since which is the better says nothing."""
    if choice.subset == TIES:
        return []
    right, *wrong = ([{"role": "assistant", "content": answer}] for answer in (*choice.right, *choice.wrong))
    key = json.dumps(choice.prompt, sort_keys=True)
    return [LabelledPair(choice.prompt, right, one, choice.subset, key, "rewardbench2") for one in wrong]


# ---- candidates --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """Several answers to each prompt, for best-of-n.

    Attributes:
        texts: prompt and answer in full, a list for each prompt.
        gold: their gold rewards, or None where a gold model is to give them.
        report: what was read and left out.
    """

    texts: list[list[Text]]
    gold: list[list[float]] | None
    report: SourceReport

    def lines(self) -> list[str]:
        """What was read, in words."""
        first = f"{self.report.name}: candidates for {len(self.texts):,} prompts of {self.report.rows:,} rows"
        return [first, *self.report.lines()[1:]]


def read_candidates(source: PairSource, *, gold_model: bool) -> Candidates:
    """Reads prompts with several answers.

    Args:
        source: rows with `prompt` (text or messages), `candidates` (a list of texts) and, without a gold model, `gold`
            (a list of as many numbers). `turns` and `as_messages` make conversations of texts; `columns` may name the
            prompt.
        gold_model: whether a model gives the gold rewards, so that `gold` is not read.

    Raises:
        DataError: the source can't be read, or no row has two candidates.
    """
    report = SourceReport(source.path)
    found = made_of(source, report, lambda row, _: _candidates(row, source, gold_model), "candidates")
    return Candidates([texts for texts, _ in found], None if gold_model else [gold for _, gold in found], report)


def _candidates(row: Mapping[str, Any], source: PairSource, gold_model: bool) -> tuple[list[Text], list[float]]:
    answers, prompt = row.get("candidates"), row.get(source.column("prompt"))
    if not isinstance(answers, list) or not all(isinstance(one, str) and one.strip() for one in answers):
        raise RowProblem("malformed", f"candidates must be a list of texts, got {answers!r:.40}")
    if len(answers) < 2:
        raise RowProblem("malformed", f"needs at least two candidates, got {len(answers)}")
    gold = row.get("gold")
    if not gold_model:
        numbers = isinstance(gold, list) and all(
            isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in gold
        )
        if not isinstance(gold, list) or not numbers or len(gold) != len(answers):
            raise RowProblem(
                "malformed", f"gold must be {len(answers)} numbers, one a candidate, got {gold!r:.40}; or give a model"
            )
    texts = [whole_text(prompt, answer, turns=source.turns, as_messages=source.as_messages) for answer in answers]
    return texts, [] if gold_model else [float(one) for one in gold or ()]
