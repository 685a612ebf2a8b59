"""What is made of each row of a source, and what made nothing, by file and line, as data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .config import DataError, PairSource
from .rows import Place, RowProblem, rows_of

_Made = TypeVar("_Made")

KINDS = {
    "malformed": "malformed",
    "empty": "with an empty answer",
    "identical": "whose answers are identical",
    "tied": "whose answers have equal scores",
    "long": "longer than the limit",
}
"""Kinds of problems, and how a report names them."""
_SHOWN = 5  # places of each kind
_HOPELESS = 1000  # rows at a source's beginning of which none makes anything: it is not what it is taken for


@dataclass
class SourceReport:
    """What came of one source.

    Attributes:
        name: its path.
        rows: how many it has.
        problems: by kind, how many make no pair.
        places: by kind, the first of them with the reason.
    """

    name: str
    rows: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[tuple[Place, str]]] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """Rows that make a pair."""
        return self.rows - self.problems.total()

    def add(self, place: Place, problem: RowProblem) -> None:
        """Counts a row that makes no pair."""
        self.problems[problem.kind] += 1
        shown = self.places.setdefault(problem.kind, [])
        if len(shown) < _SHOWN:
            shown.append((place, problem.reason))

    def nothing(self, wanted: str) -> DataError:
        """The error of a source of which no row makes what is wanted; says why the first one does not."""
        why = next((f"; first {place}: {why}" for places in self.places.values() for place, why in places), "")
        return DataError(f"{self.name} must hold {wanted}, and none of {self.rows:,} rows does{why}.")

    def lines(self) -> list[str]:
        """In words: a line for the source, one for each kind of problem."""
        said = [f"{self.name}: {self.pairs:,} pairs of {self.rows:,} rows"]
        for kind, words in KINDS.items():
            if count := self.problems[kind]:
                shown = "; ".join(f"{place} ({reason})" for place, reason in self.places[kind])
                said.append(f"  {count:,} {words}, left out: {shown}" + ("; ..." if count > _SHOWN else ""))
        return said


@dataclass
class DataReport:
    """What was read.

    Attributes:
        train: of the sources of training pairs.
        held_out: of those of held-out pairs.
        train_pairs: training pairs, each as often as its source's weight says.
        held_out_pairs: held-out pairs.
        repeated: pairs that occur again with the same texts; they stay.
        contradicting: pairs that occur the other way round too; they stay.
        on_both_sides: held-out pairs with a prompt of a training pair; they stay, where the held-out set was given.
        split: whether held-out pairs were split off the training pairs.
    """

    train: list[SourceReport] = field(default_factory=list)
    held_out: list[SourceReport] = field(default_factory=list)
    train_pairs: int = 0
    held_out_pairs: int = 0
    repeated: int = 0
    contradicting: int = 0
    on_both_sides: int = 0
    split: bool = False

    @property
    def left_out(self) -> int:
        """Rows of all sources that make no pair."""
        return sum(source.problems.total() for source in (*self.train, *self.held_out))

    def lines(self) -> list[str]:
        """In words, for a log or a page."""
        said = [line for source in (*self.train, *self.held_out) for line in source.lines()]
        how = "split off by prompt" if self.split else "as given"
        said.append(f"{self.train_pairs:,} training pairs, {self.held_out_pairs:,} held-out pairs ({how})")
        remarks = {
            "training pairs occur more than once": self.repeated,
            "training pairs occur with chosen and rejected exchanged": self.contradicting,
            "held-out pairs have a prompt of the training pairs, and say less for it": self.on_both_sides,
        }
        return said + [f"note: {count:,} {words}" for words, count in remarks.items() if count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""

        def source(one: SourceReport) -> dict[str, Any]:
            places = {kind: [f"{place}: {why}" for place, why in found] for kind, found in one.places.items()}
            return {"path": one.name, "rows": one.rows, "pairs": one.pairs, **dict(one.problems), "first": places}

        counts = ("train_pairs", "held_out_pairs", "repeated", "contradicting", "on_both_sides", "split")
        return {
            "train": [source(one) for one in self.train],
            "held_out": [source(one) for one in self.held_out],
            **{name: getattr(self, name) for name in counts},
        }


def made_of(
    source: PairSource, report: SourceReport, make: Callable[[Mapping[str, Any], Place], _Made], wanted: str
) -> list[_Made]:
    """What a function makes of each row of a source; a row that it refuses is counted and left out.

    Args:
        source: its rows.
        report: counts them.
        make: called with a row and its place; raises RowProblem where it makes nothing of it.
        wanted: what the source must hold, for the error.

    Raises:
        DataError: the source can't be read, or no row makes anything; after a thousand such rows that is said at once.
    """
    found: list[_Made] = []
    for place, row in rows_of(source):
        report.rows += 1
        try:
            if isinstance(row, RowProblem):
                raise row
            found.append(make(row, place))
        except RowProblem as problem:
            report.add(place, problem)
            if not found and report.rows == _HOPELESS:
                break
    if not found:
        raise report.nothing(wanted)
    return found
