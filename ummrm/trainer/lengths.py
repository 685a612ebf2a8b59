"""Over-long pairs and texts: TRL's RewardTrainer drops them without a word; here they are counted and warned about."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

REMEDY = "Raise `max_length` in RewardConfig (None keeps all), or shorten the texts"
PAIR = ("chosen_ids", "rejected_ids")


@dataclass
class Dropped:
    """How many pairs, or texts, of one data set were too long.

    Attributes:
        long: pairs with an answer of more than `max_length` tokens.
        total: pairs seen; None for a stream, which is counted as it is read.
        kept: they stay in the data (TRL does not filter pairs that come tokenised).
        unit: what is counted.
    """

    long: int
    total: int | None
    kept: bool = False
    unit: str = "pairs"


class LengthFilter:
    """True for a row that fits. Counts those that do not; over a stream it warns at the first."""

    def __init__(self, max_length: int, stream: str | None = None, keys: tuple[str, ...] = PAIR) -> None:
        self.max_length, self.stream, self.keys, self.long = max_length, stream, keys, 0

    def __call__(self, example: dict) -> bool:
        fits = all(len(example[key]) <= self.max_length for key in self.keys)
        if not fits:
            self.long += 1
            if self.stream is not None and self.long == 1:
                warnings.warn(
                    f"the streamed {self.stream} set has pairs longer than max_length={self.max_length} tokens; they "
                    f"are dropped as they come. {REMEDY}. (Said once.)",
                    stacklevel=2,
                )
        return fits


def report(name: str, dropped: Dropped, max_length: int, warn: bool) -> None:
    """Warns about what is too long in a data set of known size, if there are any.

    Args:
        name: of the data set.
        dropped: what was counted.
        max_length: the limit.
        warn: False on processes that leave the warning to the first.

    Raises:
        ValueError: nothing is left.
    """
    if not dropped.long:
        return
    unit = dropped.unit
    if dropped.long == dropped.total and not dropped.kept:
        raise ValueError(
            f"`max_length` must leave some {unit}, and all {dropped.total} {unit} of the {name} set are longer than "
            f"{max_length} tokens. {REMEDY}."
        )
    if not warn:
        return
    assert dropped.total is not None  # streams warn for themselves
    which = f"{dropped.long} of {dropped.total} {unit} ({dropped.long / dropped.total:.1%}) of the {name} set"
    if dropped.kept:
        warnings.warn(
            f"{which} are longer than max_length={max_length} tokens and stay in: the set came tokenised, and TRL "
            "filters such a set not at all. Filter it beforehand if they should go.",
            stacklevel=4,
        )
    else:
        warnings.warn(
            f"{which} are longer than max_length={max_length} tokens and were dropped. {REMEDY}.", stacklevel=4
        )
