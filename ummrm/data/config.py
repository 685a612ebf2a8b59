"""Where preference pairs come from and how a row becomes one: frozen dataclasses, checked when they are built.

Reading is `rows.py`'s business, what a sound pair is `pairs.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

COLUMNS = ("prompt", "chosen", "rejected", "margin")
"""What a pair is made of; `prompt` and `margin` may be missing."""


class DataError(ValueError):
    """Data that can't be used; the message says what was expected, what is there, and the remedy."""


@dataclass(frozen=True)
class PairSource:
    """Rows of preference pairs in files or on the hub.

    A pair's texts are strings, or conversations: lists of messages with `role` and `content`. The prompt stands in a
    column of its own, or at the beginning of both answers.

    Attributes:
        path: a file (.jsonl, .json, .csv, .tsv, .parquet; the first four .gz too), a pattern such as `data/*.jsonl`, a
            folder of such files or of `Dataset.save_to_disk`, or the name of a data set on the hub.
        name: its configuration on the hub, where it has several.
        split: which split of a data set.
        revision: of a data set on the hub: a branch, tag or commit.
        weight: how often a pair counts in an epoch: 2 is twice, 0.5 a random half of the pairs once.
        columns: of `prompt`, `chosen`, `rejected`, `margin`, those that the rows name otherwise; `a.b` is the field b
            of a column a.
        answers: instead of chosen and rejected: the columns of two answers, of which `scores` says the better one.
        scores: the columns of their scores, the higher is better; equal ones make no pair.
        turns: texts that are dialogues in one string: what a user's and what an assistant's turn begins with, such as
            `("\\n\\nHuman:", "\\n\\nAssistant:")`. They become conversations.
        as_messages: whether prompt and answer, as text, become the messages of a user and an assistant, so that the
            tokenizer's chat template applies.

    Raises:
        ValueError: fields that can't be meant.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: float = 1.0
    columns: Mapping[str, str] = field(default_factory=dict)
    answers: tuple[str, str] | None = None
    scores: tuple[str, str] | None = None
    turns: tuple[str, str] | None = None
    as_messages: bool = False

    def __post_init__(self) -> None:
        _require(self, "path", isinstance(self.path, str) and self.path.strip() != "", "a path or a name on the hub")
        known = isinstance(self.columns, Mapping) and set(self.columns) <= set(COLUMNS)
        sound = known and all(isinstance(value, str) and value for value in self.columns.values())
        _require(self, "columns", sound, f"a mapping from {', '.join(COLUMNS)} to names of columns")
        _require(self, "weight", _is_number(self.weight) and 0 < self.weight <= 1000, "above 0, at most 1000")
        for name in ("answers", "scores", "turns"):
            value = getattr(self, name)
            if value is not None:
                two = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, str) for v in value)
                _require(self, name, two and value[0] != value[1] and all(value), "two different names")
                object.__setattr__(self, name, tuple(value))
        if (self.answers is None) != (self.scores is None):
            raise ValueError("PairSource: `answers` and `scores` must be given together, got one of them.")
        if self.answers is not None and {"chosen", "rejected"} & set(self.columns):
            raise ValueError("PairSource: `columns` must not name chosen and rejected where `answers` does.")
        _require(self, "as_messages", not (self.as_messages and self.turns), "False where `turns` make messages")

    def column(self, part: str) -> str:
        """The rows' name of `prompt`, `chosen`, `rejected` or `margin`."""
        return self.columns.get(part, part)

    @classmethod
    def of(cls, given: PairSource | Mapping[str, Any] | str) -> PairSource:
        """A source from its path alone or from plain data.

        Raises:
            ValueError: a field that there is not; names it.
        """
        if isinstance(given, PairSource):
            return given
        if isinstance(given, str):
            return cls(given)
        if not isinstance(given, Mapping):
            raise ValueError(f"a source of pairs must be a path or a mapping of its fields, got {given!r:.80}.")
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"a source of pairs must have the fields {', '.join(names)}, got {', '.join(unknown)}.")
        if "path" not in given:
            raise ValueError("a source of pairs must have `path`, a file or a name on the hub.")
        return cls(**given)


@dataclass(frozen=True)
class PairsConfig:
    """Training pairs and held-out pairs.

    Attributes:
        train: sources of training pairs.
        held_out: sources of held-out pairs; none: they are split off the training pairs by prompt.
        held_out_share: how many are split off, as a share of the pairs.
        most_held_out: and at most so many.
        seed: of the split and of sources whose weight is not whole.
        strict: whether a row that makes no sound pair is an error; else it is counted, reported, and left out.

    Raises:
        ValueError: fields that can't be meant.
    """

    train: tuple[PairSource, ...]
    held_out: tuple[PairSource, ...] = ()
    held_out_share: float = 0.05
    most_held_out: int = 1000
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "held_out"):
            value = getattr(self, name)
            value = () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)
            object.__setattr__(self, name, tuple(PairSource.of(one) for one in value))
        _require(self, "train", len(self.train) > 0, "at least one source")
        share = self.held_out_share
        _require(self, "held_out_share", _is_number(share) and 0 < share < 1, "above 0 and below 1")
        for name, least in (("most_held_out", 1), ("seed", 0)):
            value = getattr(self, name)
            _require(self, name, isinstance(value, int) and value >= least, f"an integer, at least {least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(owner: object, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{type(owner).__name__}: `{name}` must be {expected}, got {getattr(owner, name)!r}.")
