"""A study's report.html: one honest table, the comparisons fixed beforehand, and the plots. tables.md: the same tables.

Made from the CSV files and study.json alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from .checkpoint_config import CheckpointTaskConfig
from .compare import OUTCOMES, Comparison, Runs, compare, write_comparisons
from .config import StudyConfig
from .files import write_atomically
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
    words_for,
)

_CAPTIONS = {
    "best_of_n": "Where gold falls while the proxy rises, the reward model is being exploited. Bands: 95% over seeds.",
    "ppo": "The same under PPO, every policy starting from the same one. Paths end where their KL penalty holds them.",
    "rloo": "The same under TRL's RLOO. KL is measured apart from TRL's own estimate, and exact at the visited states.",
    "grpo": "The same under TRL's GRPO. KL is measured apart from TRL's own estimate, and exact at the visited states.",
    "differences": "Right of the line the first arm has more of it. Bars: 95% t intervals over seeds.",
    "accuracy": "Tail: pairs of the policy's own answers of which one has more of the shortcut than training showed.",
    "shared_share": "Merged models by λ, with learned merge weights.",
    "gates": "Expert indices mean nothing across seeds, so that experts are ranked within each.",
    "specialisation": "Above: what a token's first expert tells of the instruction regime of its pair; chance is the "
    "same with regimes dealt out to sequences at random. Below: experts are left out of all layers at once.",
}


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
    study = StudyConfig.from_dict(facts["study"])
    runs = Runs(read_table(folder, "runs"))
    curves, experts, timings = (read_table(folder, name) for name in ("curves", "experts", "timings"))
    comparisons = compare(study, runs)
    write_comparisons(folder / "comparisons.csv", comparisons)
    plots = write_plots(study, runs, curves, experts, comparisons, folder)
    text, page = folder / "tables.md", folder / "report.html"
    write_atomically(text, "\n".join(table.markdown() for table in study_tables(folder).values() if table.rows))
    write_atomically(page, _page(study, facts["machine"], runs, Runs(timings), comparisons, plots))
    return [folder / "comparisons.csv", *plots, text, page]


def study_tables(folder: str | Path) -> dict[str, Table]:
    """The tables of the study in `folder`: its arms by the name of each regime, `paths`, `comparisons`, `experts`,
    `left_out`, `mixtures`. Some may have no rows.
    """
    folder = Path(folder)
    study = StudyConfig.from_dict(json.loads((folder / "study.json").read_text())["study"])
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
    study = StudyConfig.from_dict(json.loads((Path(folder) / "study.json").read_text())["study"])
    return primary_lines(study, compare(study, Runs(read_table(Path(folder), "runs"))))


def primary_lines(study: StudyConfig, comparisons: Sequence[Comparison]) -> list[str]:
    """The primary comparison in words, one line a regime."""
    lines = []
    for c in (c for c in comparisons if c.primary):
        title = study.title(c.regime)
        names = f"{study.label(c.config.arm)} against {study.label(c.config.against)}"
        if c.paired is None:
            lines.append(f"{title}: {names}: too few seeds.")
            continue
        p = c.paired
        lines.append(
            f"{title}: {names}, {OUTCOMES.get(c.config.outcome, c.config.outcome)} under "
            f"{words_for(c.config.optimiser)}: {p.mean:+.3f} (95% {p.low:+.3f} to {p.high:+.3f}), better in "
            f"{c.better_in:g} of {p.seeds} seeds, p = {c.adjusted:.2g} after Holm: {c.verdict}."
        )
    return lines


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
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    ).get_template("report.html.j2")
    return page.render(
        study=study,
        machine=machine,
        seeds=f"{len(runs.seeds)} seeds ({runs.seeds[0]} to {runs.seeds[-1]})" if runs.seeds else "no seeds",
        drawn="prompts, answers, labels and initialisation"
        if named
        else "gold reward, data, initialisation and prompts",
        start="the named checkpoint" if named else "random weights",
        primary=primary_lines(study, comparisons),
        arms=[arm_table(study, regime, runs, timings) for regime in study.regimes],
        paths=paths if paths.rows else None,
        figures=[_figure(path) for path in plots],
        comparisons=comparison_table(study, comparisons),
    )


def _figure(path: Path) -> dict[str, str]:
    """A plot as the page holds it: its name, its bytes in base64, its caption."""
    data = base64.b64encode(path.read_bytes()).decode()
    return {"name": path.stem, "data": data, "caption": _CAPTIONS.get(path.stem.partition("-")[0], "")}
