"""A study's report.html: one honest table, the comparisons fixed beforehand, and the plots. tables.md: the same tables.

Made from the CSV files and study.json alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .backbone.config import BackboneStudy
from .backbone.report import backbone_lines, backbone_tables, write_backbone_report
from .checkpoint_config import CheckpointTaskConfig
from .compare import Comparison, Runs, compare, write_comparisons
from .config import StudyConfig
from .files import write_atomically
from .page import page, seeds_in_words
from .plots import write_plots
from .store import read_table
from .tables import (
    Table,
    arm_table,
    comparison_table,
    expert_table,
    left_out_table,
    mixture_table,
    path_table,
    primary_lines,
)


def write_report(folder: str | Path) -> list[Path]:
    """Writes comparisons.csv, the plots and report.html beside a study's tables.

    Args:
        folder: with study.json and the CSV files that `run_study` wrote.

    Returns:
        The files, report.html last.

    Raises:
        FileNotFoundError: a table is missing.
    """
    folder = Path(folder)
    if not (folder / "study.json").is_file():
        raise FileNotFoundError(f"no {folder / 'study.json'}; `python -m lab run` writes it.")
    facts = json.loads((folder / "study.json").read_text())
    if facts["study"].get("kind") == "backbone":
        return write_backbone_report(folder, facts)
    study = StudyConfig.from_dict(facts["study"])
    runs = Runs(read_table(folder, "runs"))
    curves, experts, timings = (read_table(folder, name) for name in ("curves", "experts", "timings"))
    comparisons = compare(study, runs)
    write_comparisons(folder / "comparisons.csv", comparisons)
    plots = write_plots(study, runs, curves, experts, comparisons, folder)
    text, html = folder / "tables.md", folder / "report.html"
    write_atomically(text, "\n".join(table.markdown() for table in study_tables(folder).values() if table.rows))
    write_atomically(html, _page(study, facts["machine"], runs, Runs(timings), comparisons, plots))
    return [folder / "comparisons.csv", *plots, text, html]


def study_tables(folder: str | Path) -> dict[str, Table]:
    """The tables of the study in `folder`: its arms by the name of each regime, `paths`, `comparisons`, `experts`,
    `left_out`, `mixtures`. Some may have no rows.
    """
    folder = Path(folder)
    study = _study(folder)
    if isinstance(study, BackboneStudy):
        return backbone_tables(folder, study)
    runs, timings = (Runs(read_table(folder, name)) for name in ("runs", "timings"))
    experts = read_table(folder, "experts")
    return {
        **{regime: arm_table(study, regime, runs, timings) for regime in study.regimes},
        "paths": path_table(study, runs),
        "comparisons": comparison_table(study, compare(study, runs)),
        "experts": expert_table(study, experts),
        "left_out": left_out_table(study, experts),
        "mixtures": mixture_table(study, experts),
    }


def report_lines(folder: str | Path) -> list[str]:
    """The primary comparison of the study in `folder` in words, one line a regime."""
    folder = Path(folder)
    study = _study(folder)
    if isinstance(study, BackboneStudy):
        return backbone_lines(folder, study)
    return primary_lines(study, compare(study, Runs(read_table(folder, "runs"))))


def _study(folder: Path) -> StudyConfig | BackboneStudy:
    data = json.loads((folder / "study.json").read_text())["study"]
    return (BackboneStudy if data.get("kind") == "backbone" else StudyConfig).from_dict(data)


def _page(
    study: StudyConfig,
    machine: dict,
    runs: Runs,
    timings: Runs,
    comparisons: Sequence[Comparison],
    plots: Sequence[Path],
) -> str:
    named = any(isinstance(regime.task, CheckpointTaskConfig) for regime in study.regimes.values())
    paths = path_table(study, runs)
    return page(
        study,
        machine,
        plots,
        seeds=seeds_in_words(runs.seeds),
        drawn="prompts, answers, labels and initialisation"
        if named
        else "gold reward, data, initialisation and prompts",
        start="the named checkpoint" if named else "random weights",
        primary=primary_lines(study, comparisons),
        arms=[arm_table(study, regime, runs, timings) for regime in study.regimes],
        paths=paths if paths.rows else None,
        comparisons=comparison_table(study, comparisons),
    )
