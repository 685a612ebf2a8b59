"""A study's report.html: one honest table, the comparisons fixed beforehand, and the plots. tables.md: the same tables.

Made from the CSV files and study.json alone.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

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
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #111; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #444; white-space: normal; }
tr.primary td { font-weight: 600; background: #fff4e8; }
img { max-width: 100%; } figure { margin: 1.5rem 0; } figcaption { color: #444; font-size: 0.9rem; }
div.wide { overflow-x: auto; } code { background: #f3f3f3; padding: 0 0.2rem; }
"""


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
    seeds = f"{len(runs.seeds)} seeds ({runs.seeds[0]} to {runs.seeds[-1]})" if runs.seeds else "no seeds"
    named = any(isinstance(regime.task, CheckpointTaskConfig) for regime in study.regimes.values())
    drawn = "prompts, answers, labels and initialisation" if named else "gold reward, data, initialisation and prompts"
    start = "the named checkpoint" if named else "random weights"
    primary = "".join(f"<li>{html.escape(line)}</li>" for line in primary_lines(study, comparisons))
    paths = path_table(study, runs)
    parts = [
        f"<h1>Reward-hacking laboratory: {html.escape(study.name)}</h1>",
        f"<p>{seeds}, {len(study.regimes)} regimes, {len(study.arms)} arms; device {html.escape(study.device)}, torch "
        f"{html.escape(machine['torch'])}, transformers {html.escape(machine['transformers'])}. The seed is the unit: "
        f"{drawn} are drawn anew. Rewards are in standard deviations of the "
        "policy's own answers from their mean, so that 0 is the policy itself.</p>",
        f"<h2>Primary comparison, fixed beforehand</h2><ul>{primary}</ul>",
        "<p>No difference shown means just that: at few seeds only large differences can show.</p>",
        "<h2>All arms</h2>",
        *[_table(arm_table(study, regime, runs, timings)) for regime in study.regimes],
        f"<p>Mean ± half the 95% t interval over seeds. Training FLOPs are counted, from {start} on; forward "
        "times are measured, against the dense model in the same run.</p>",
        *(["<h2>Policies trained against them</h2>", _table(paths)] if paths.rows else []),
        *[_figure(path) for path in plots],
        "<h2>All comparisons</h2>",
        _table(comparison_table(study, comparisons)),
        "<p>Difference: arm minus other, in the outcome's own units; p: sign-flip permutation test; adjusted: Holm, "
        "over the regimes for the primary comparison, over all others together for the rest. Better in: seeds in which "
        "the arm does better, less drop and less gap being better.</p>",
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(study.name)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    body = ""
    for i, row in enumerate(table.rows):
        kind = ' class="primary"' if i in table.marked else ""
        body += f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    title = f"<h3>{html.escape(table.title)}</h3>" if table.title else ""
    return f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(_CAPTIONS.get(path.stem.partition("-")[0], ""))
    return (
        f'<figure><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
