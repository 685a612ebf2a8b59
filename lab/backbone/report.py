"""The report of a study from a pretrained backbone: its tables in the laboratory's form, its comparisons, its plots.

Made from the CSV files and study.json alone, by the same tables, plots and page as every study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compare import Comparison, Runs, compare, write_comparisons
from ..config import ComparisonConfig, MeasureConfig
from ..files import write_atomically
from ..page import page, seeds_in_words
from ..plots import write_plots
from ..store import read_table
from ..tables import Table, comparison_table, interval_cell, mean_cell, path_table, primary_lines, ratio_cell
from .choice import choice_table, write_choice
from .config import BackboneArm, BackboneRegime, BackboneStudy


@dataclass(frozen=True)
class Shown:
    """A study as tables and plots read it: an arm for each variation that was run.

    Attributes:
        name: the study's.
        regimes: by name.
        arms: by the name that runs.csv has.
        labels: of those.
        measure: what was measured.
        primaries: the primary comparisons.
        secondary: further ones.
        shown: arms whose curves are drawn: of the primary comparisons, then those under PPO.
        device: where models ran.
        mixture: none: experts aren't reported.
    """

    name: str
    regimes: dict[str, BackboneRegime]
    arms: dict[str, BackboneArm]
    labels: dict[str, str]
    measure: MeasureConfig
    primaries: tuple[ComparisonConfig, ...]
    secondary: tuple[ComparisonConfig, ...]
    shown: tuple[str, ...]
    device: str = "cpu"
    mixture: str | None = None

    @classmethod
    def of(cls, study: BackboneStudy) -> Shown:
        """The study with its variations."""
        names = {
            study.run_name(arm, variation): (arm, variation)
            for arm in study.arms
            for regime in study.regimes
            if arm in study.arms_of(regime)
            for variation in study.variations(regime, arm)
        }
        words = {name: study.arms[arm].label or arm for name, (arm, _) in names.items()}
        if not study.chosen:
            words = {name: f"{words[name]}; {variation.label}" for name, (_, variation) in names.items()}
        compared = [name for c in study.primaries for name in (c.against, c.arm)]
        optimised = [name for name, (arm, _) in names.items() if "ppo" in study.optimisers(arm)]
        return cls(
            name=study.name,
            regimes=study.regimes,
            arms={name: study.arms[arm] for name, (arm, _) in names.items()},
            labels=words,
            measure=study.measure,
            primaries=study.primaries,
            secondary=study.secondary,
            shown=tuple(dict.fromkeys(compared + optimised if compared else names)),
        )

    @property
    def primary(self) -> ComparisonConfig:
        """The first primary comparison, which plots show."""
        return self.primaries[0] if self.primaries else ComparisonConfig(outcome="gold_at_kl")

    def label(self, arm: str) -> str:
        """An arm's name in tables and plots."""
        return self.labels[arm]

    def title(self, regime: str) -> str:
        """A regime in words."""
        return self.regimes[regime].title or regime


def write_backbone_report(folder: Path, facts: dict) -> list[Path]:
    """Writes comparisons.csv, choice.csv, the plots, tables.md and report.html beside a study's tables.

    Args:
        folder: with the CSV files.
        facts: of its study.json.
    """
    study = BackboneStudy.from_dict(facts["study"])
    shown, runs, comparisons = _read(folder, study)
    write_comparisons(folder / "comparisons.csv", comparisons)
    files = [folder / "comparisons.csv"]
    if not study.chosen:
        files.append(write_choice(folder / "choice.csv", study, runs))
    plots = write_plots(shown, runs, read_table(folder, "curves"), [], comparisons, folder)
    tables = backbone_tables(folder, study)
    write_atomically(folder / "tables.md", "\n".join(table.markdown() for table in tables.values() if table.rows))
    html = page(
        shown,
        facts["machine"],
        plots,
        seeds=seeds_in_words(runs.seeds),
        drawn="language, gold reward, data, backbone and head",
        start="the pretrained backbone",
        primary=primary_lines(shown, comparisons),
        arms=[*(tables[regime] for regime in study.regimes), *([] if study.chosen else [tables["choice"]])],
        paths=tables["paths"],
        comparisons=tables["comparisons"],
    )
    write_atomically(folder / "report.html", html)
    return [*files, *plots, folder / "tables.md", folder / "report.html"]


def backbone_tables(folder: Path, study: BackboneStudy) -> dict[str, Table]:
    """The tables of the study in `folder`: its arms by the name of each regime, `paths` of PPO, `comparisons`,
    `choice`, `summary`.
    """
    shown, runs, comparisons = _read(folder, study)
    return {
        **{regime: _arm_table(shown, regime, runs) for regime in study.regimes},
        "paths": path_table(shown, runs),
        "comparisons": comparison_table(shown, comparisons),
        "choice": choice_table(study, runs),
        "summary": _summary_table(shown, runs),
    }


def backbone_lines(folder: Path, study: BackboneStudy) -> list[str]:
    """The primary comparisons in words."""
    shown, _, comparisons = _read(folder, study)
    return primary_lines(shown, comparisons)


def _read(folder: Path, study: BackboneStudy) -> tuple[Any, Runs, list[Comparison]]:
    shown: Any = Shown.of(study)  # what tables and plots read of a StudyConfig, it has
    runs = Runs(read_table(folder, "runs"))
    return shown, runs, backbone_comparisons(study, runs)


def backbone_comparisons(study: BackboneStudy, runs: Runs) -> list[Comparison]:
    """The study's comparisons in the regimes that have both arms."""
    shown: Any = Shown.of(study)
    return compare(shown, runs, lambda regime, c: {c.arm, c.against} <= set(study.arms_of(regime)))


def _present(study: Shown, regime: str, runs: Runs) -> tuple[list[str], str | None]:
    """The arms that were run in a regime, and the dense one that costs are divided by: the first that is trained."""
    present = [arm for arm in study.arms if runs.values(regime, arm, "best_of_n", "accuracy")]
    dense = (name for name in present if study.arms[name].kind == "dense")
    return present, next((name for name in dense if _costs(runs, regime, name)), None)


def _costs(runs: Runs, regime: str, arm: str) -> bool:
    return any(flops > 0 for flops in runs.values(regime, arm, "best_of_n", "training_flops").values())


def _summary_table(study: Shown, runs: Runs) -> Table:
    """Of every arm in all regimes the primary outcomes, mean and half the 95% t interval over seeds, and the costs."""
    outcomes = {"accuracy": ("accuracy_policy", 3), f"gold at KL {study.measure.fixed_kl:g}": ("gold_at_kl", 2)}
    costs = {"training FLOPs ÷ dense": "training_flops", "serving FLOPs ÷ dense": "serving_flops"}
    head = ("arm", *(f"{study.title(regime)}: {name}" for regime in study.regimes for name in outcomes), *costs)
    rows = []
    for arm in study.arms:
        cells, where = [], None
        for regime in study.regimes:
            if arm in _present(study, regime, runs)[0]:
                where = where or regime
                cells += [interval_cell(runs, regime, "best_of_n", *asked)(arm) for asked in outcomes.values()]
            else:
                cells += [""] * len(outcomes)
        if where is not None:
            dense = _present(study, where, runs)[1]
            cells += [ratio_cell(runs, where, arm, dense, column) for column in costs.values()]
            rows.append((study.label(arm), *cells))
    return Table("", head, tuple(rows))


def _arm_table(study: Shown, regime: str, runs: Runs) -> Table:
    """Every arm that was run in a regime: mean and half the 95% t interval over seeds of what was measured there.

    What a regime has nothing of, like a tail of human ratings or members where no arm is an ensemble, is no column.
    """
    present, dense = _present(study, regime, runs)

    def cell(column: str, digits: int = 2) -> Callable[[str], str]:
        return interval_cell(runs, regime, "best_of_n", column, digits)

    columns = {
        "accuracy on the policy's answers": cell("accuracy_policy", 3),
        f"gold at KL {study.measure.fixed_kl:g}, best-of-n": cell("gold_at_kl"),
        "gold at the end": cell("gold_end"),
        "peak": cell("gold_peak"),
        "drop from the peak": cell("drop_from_peak"),
        "accuracy": cell("accuracy", 3),
        "shortcut reversed": cell("accuracy_shifted", 3),
        "policy's tail": cell("accuracy_tail", 3),
        "calibration error": cell("calibration_error", 3),
        "correlation of members": cell("member_correlation", 2),
        "seeds": lambda arm: f"{len(runs.values(regime, arm, 'best_of_n', 'accuracy'))}",
        "training FLOPs ÷ dense": lambda arm: ratio_cell(runs, regime, arm, dense, "training_flops"),
        "serving FLOPs ÷ dense": lambda arm: ratio_cell(runs, regime, arm, dense, "serving_flops"),
        "parameters": lambda arm: mean_cell(runs, regime, arm, "parameters", "{:,.0f}"),
    }
    cells = {name: [make(arm) for arm in present] for name, make in columns.items()}
    measured = {name: found for name, found in cells.items() if any(found)}
    rows = tuple(zip(map(study.label, present), *measured.values(), strict=True))
    return Table(study.title(regime), ("arm", *measured), rows)
