"""From runs.csv to what can be said: means with intervals, and the comparisons that the study fixed beforehand."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import ComparisonConfig, StudyConfig
from .statistics import Paired, holm, mean_interval, paired

LESS_IS_BETTER = ("drop_from_peak", "proxy_gold_gap", "calibration_error")
OUTCOMES = {
    "gold_at_kl": "gold at fixed KL",
    "gold_end": "gold at the end",
    "accuracy": "accuracy",
    "accuracy_shifted": "accuracy, shortcut reversed",
    "accuracy_policy": "accuracy on the policy's answers",
    "accuracy_tail": "accuracy on the policy's tail",
    "drop_from_peak": "drop from the peak",
    "proxy_gold_gap": "proxy-gold gap",
    "calibration_error": "calibration error",
}
"""Outcomes that are shown, and their names."""


@dataclass(frozen=True)
class Comparison:
    """One comparison in one regime.

    Attributes:
        regime: the regime.
        config: what is compared.
        primary: whether it is the primary one.
        paired: the outcome; None if fewer than two seeds have both values.
        missing: seeds in which both arms were run and one of the values is missing (PPO never got to the fixed KL).
        adjusted: p of the sign-flip test after Holm's correction within its family (primary, or secondary).
    """

    regime: str
    config: ComparisonConfig
    primary: bool
    paired: Paired | None
    missing: int
    adjusted: float

    @property
    def better_in(self) -> float:
        """Seeds in which the arm is the better one; a tie counts half."""
        if self.paired is None:
            return math.nan
        wins = self.paired.wins
        return self.paired.seeds - wins if self.config.outcome in LESS_IS_BETTER else wins

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `no difference shown`, at 5% after the correction."""
        if self.paired is None or not self.adjusted < 0.05:
            return "no difference shown"
        larger = self.paired.mean > 0
        return "better" if larger != (self.config.outcome in LESS_IS_BETTER) else "worse"


class Runs:
    """runs.csv by regime, seed, arm and optimiser."""

    def __init__(self, rows: Sequence[dict]) -> None:
        self._rows = {(r["regime"], r["seed"], r["arm"], r["optimiser"]): r for r in rows}
        self.seeds = sorted({row["seed"] for row in rows})

    def values(self, regime: str, arm: str, optimiser: str, column: str) -> dict[int, float]:
        """Seed to value, missing ones left out."""
        found = {
            seed: self._rows[regime, seed, arm, optimiser][column] for seed in self.seeds_of(regime, arm, optimiser)
        }
        return {seed: value for seed, value in found.items() if not math.isnan(value)}

    def seeds_of(self, regime: str, arm: str, optimiser: str, *others: str) -> list[int]:
        """Seeds on which an arm was run, and `others` too."""
        return [s for s in self.seeds if all((regime, s, one, optimiser) in self._rows for one in (arm, *others))]

    def interval(self, regime: str, arm: str, optimiser: str, column: str) -> tuple[float, float, float] | None:
        """Mean over seeds and its 95% t interval; None without a value."""
        values = list(self.values(regime, arm, optimiser, column).values())
        return mean_interval(values) if values else None


def compare(
    study: StudyConfig, runs: Runs, declared: Callable[[str, ComparisonConfig], bool] = lambda *_: True
) -> list[Comparison]:
    """The study's comparisons, the primary ones first. Those whose arms were not run at all are left out, and yet count
    in Holm's correction, so that a part of a study is no easier to pass than the whole.

    Args:
        study: what is compared.
        runs: what was run.
        declared: whether a comparison is made in a regime.
    """
    made = []
    for comparisons, primary in ((study.primaries, True), (study.secondary, False)):
        family = [(regime, c) for c in comparisons for regime in study.regimes if declared(regime, c)]
        found = [_compare(regime, c, primary, runs) for regime, c in family]
        made += _adjust([c for c in found if c is not None], found.count(None))
    return made


def write_comparisons(path: Path, comparisons: Sequence[Comparison]) -> None:
    """One CSV row a comparison."""
    columns = ("regime", "primary", "arm", "against", "optimiser", "outcome")
    numbers = ("seeds", "missing", "difference", "low", "high", "better_in", "t_p", "p", "adjusted_p", "verdict")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *numbers])
        for c in comparisons:
            key = [c.regime, c.primary, c.config.arm, c.config.against, c.config.optimiser, c.config.outcome]
            if c.paired is None:
                writer.writerow([*key, 0, c.missing, *[""] * 8])
                continue
            p = c.paired
            values = [p.seeds, c.missing, p.mean, p.low, p.high, c.better_in, p.t_p, p.p, c.adjusted, c.verdict]
            writer.writerow([*key, *values])


def _compare(regime: str, config: ComparisonConfig, primary: bool, runs: Runs) -> Comparison | None:
    first, second = (runs.values(regime, arm, config.optimiser, config.outcome) for arm in (config.arm, config.against))
    both = sorted(set(first) & set(second))
    missing = len(runs.seeds_of(regime, config.arm, config.optimiser, config.against)) - len(both)
    if not first and not second:
        return None
    found = paired([first[s] for s in both], [second[s] for s in both]) if len(both) >= 2 else None
    return Comparison(regime, config, primary, found, missing, math.nan)


def _adjust(family: list[Comparison], not_run: int) -> list[Comparison]:
    tested = [c for c in family if c.paired is not None]
    adjusted = iter(holm([*(c.paired.p for c in tested), *[1.0] * not_run]))
    return [
        Comparison(c.regime, c.config, c.primary, c.paired, c.missing, math.nan if c.paired is None else next(adjusted))
        for c in family
    ]
