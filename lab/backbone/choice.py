"""Which variation of each arm a search study chooses, for the claim study to run on other seeds.

    python -m lab choose FOLDER... lab/configs/chosen/backbone.yaml

The variation with the highest mean over seeds of the outcomes that the arm is chosen by, by default both primary ones
together, each in units of its own spread: the standard deviation over seeds of what a variation differs by from the
arm's mean over variations. An arm that several search studies tried is chosen among the variations of all.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from pathlib import Path
from typing import NamedTuple

import yaml

from ..compare import Runs
from ..files import write_atomically
from ..tables import Table
from .config import BackboneStudy, Variation

OUTCOMES = ("accuracy_policy", "gold_at_kl")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A variation of an arm in a regime.

    Attributes:
        regime: the regime.
        arm: the arm.
        variation: its variation.
        means: of the outcomes over seeds.
        score: what is compared.
        chosen: whether it is the best of its arm and regime.
    """

    regime: str
    arm: str
    variation: Variation
    means: tuple[float, ...]
    score: float
    chosen: bool = False


class Search(NamedTuple):
    """A search study and what was run of it.

    Attributes:
        study: the study.
        runs: its rows.
    """

    study: BackboneStudy
    runs: Runs


def candidates(*searches: Search) -> list[Candidate]:
    """Every variation that was run in full, with its score.

    Args:
        searches: on the same seeds.

    Raises:
        ValueError: they are not, or an arm of one is another arm in another.
    """
    if len({tuple(search.runs.seeds) for search in searches}) > 1:
        listed = "; ".join(f"{s.study.name}: {s.runs.seeds}" for s in searches)
        raise ValueError(f"search studies must have the same seeds to be chosen from together, got {listed}.")
    values: dict[tuple[str, str], dict[Variation, list[dict[int, float]]]] = {}
    made_as: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {}
    for study, runs in searches:
        for regime in study.regimes:
            for arm in study.arms_of(regime):
                here = (study.fingerprint(regime, arm), study.arms[arm].chosen_by)
                if made_as.setdefault((regime, arm), here) != here:
                    raise ValueError(f"the arm {arm} must be the same in all search studies; {study.name} has another.")
                for variation in study.variations(regime, arm):
                    name = study.run_name(arm, variation)
                    each = [runs.values(regime, name, "best_of_n", outcome) for outcome in OUTCOMES]
                    if all(each):
                        values.setdefault((regime, arm), {})[variation] = each
    return [c for key, found in values.items() for c in _scored(*key, made_as[key][1], found)]


def _scored(
    regime: str, arm: str, chosen_by: tuple[str, ...], values: dict[Variation, list[dict[int, float]]]
) -> list[Candidate]:
    spreads, means = [], {}
    for i in range(len(OUTCOMES)):
        of_seed = {
            seed: statistics.fmean(each[i][seed] for each in values.values()) for seed in next(iter(values.values()))[i]
        }
        differences = [each[i][seed] - of_seed[seed] for each in values.values() for seed in of_seed]
        spreads.append((sum(d * d for d in differences) / len(differences)) ** 0.5 or 1.0)
    for variation, each in values.items():
        means[variation] = tuple(statistics.fmean(one.values()) for one in each)
    counted = [i for i, outcome in enumerate(OUTCOMES) if outcome in chosen_by]
    scores = {v: sum(means[v][i] / spreads[i] for i in counted) for v in values}
    best = max(scores, key=scores.__getitem__)
    return [Candidate(regime, arm, v, means[v], scores[v] - scores[best], v == best) for v in values]


def write_choice(path: Path, study: BackboneStudy, runs: Runs) -> Path:
    """One CSV row a variation."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["regime", "arm", "steps", "rate", "student_rate", *OUTCOMES, "score", "chosen"])
    for c in candidates(Search(study, runs)):
        v = c.variation
        writer.writerow([c.regime, c.arm, v.steps, v.rate, v.student_rate, *c.means, c.score, c.chosen])
    write_atomically(path, text.getvalue())
    return path


def choice_table(study: BackboneStudy, runs: Runs) -> Table:
    """The chosen variations; empty where the study was given them."""
    head = (
        "chosen",
        "regime",
        "steps",
        "rate",
        "student's rate",
        "accuracy on the policy's answers",
        "gold at fixed KL",
    )
    if study.chosen:
        return Table("", head, ())
    rows = []
    for c in (c for c in candidates(Search(study, runs)) if c.chosen):
        v, regime = c.variation, study.regimes[c.regime]
        numbers = (f"{c.means[0]:.3f}", f"{c.means[1]:.2f}")
        student = f"{v.student_rate:g}" if v.student_rate else ""
        rows.append(
            (study.arms[c.arm].label or c.arm, regime.title or c.regime, f"{v.steps}", f"{v.rate:g}", student, *numbers)
        )
    return Table("Chosen on these seeds, for others", head, tuple(rows))


def chosen_yaml(*searches: Search) -> str:
    """The choice as the claim study reads it; as `candidates`."""
    made: dict[str, dict[str, dict]] = {}
    for c in candidates(*searches):
        if c.chosen:
            made.setdefault(c.regime, {})[c.arm] = dataclasses.asdict(c.variation)
    names, seeds = " and ".join(s.study.name for s in searches), searches[0].runs.seeds
    head = f"# Chosen by `python -m lab choose` from {names}, seeds {seeds[0]} to {seeds[-1]}.\n"
    return head + yaml.safe_dump(made, sort_keys=False)
