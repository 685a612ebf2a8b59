"""An evaluation as files: evaluation.json, and report.html, one page that needs nothing beside it.

The page has no script and refers to nothing outside; figures stand in it as SVG. The template is `report.html.j2`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ..files import write_atomically
from .edits import PROBES
from .intervals import Estimate
from .plots import draw
from .runner import Evaluation, ModelResult, counted

JSON, PAGE = "evaluation.json", "report.html"


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        head: its columns; the first one names a row.
        rows: cells as text.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(result: Evaluation, folder: str | os.PathLike) -> list[Path]:
    """Writes evaluation.json and report.html, each atomically.

    Args:
        result: what `evaluate` gives.
        folder: is made where it is missing.

    Returns:
        The files.

    Raises:
        OSError: they can't be written.
    """
    place = Path(folder)
    text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    return [write_atomically(place / JSON, text + "\n"), write_atomically(place / PAGE, page(result))]


def page(result: Evaluation) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    drawings = {drawing.name: drawing for drawing in draw(result)}
    return environment.get_template("report.html.j2").render(
        result=result,
        counted=counted,
        drawings=drawings,
        probe_drawings=[drawings[name] for p in PROBES if (name := f"probe-{p.name}") in drawings],
        summary=summary(result),
        tables=tables(result),
    )


def summary(result: Evaluation) -> list[str]:
    """The results in sentences, a few a model; of comparisons those with the first model, the others are in a table."""
    said = []
    for name, model in result.models.items():
        if model.accuracy is not None:
            said.append(f"{name}: accuracy {_percent(model.accuracy.share)} on {counted(result.pairs, 'pair')}.")
        for benchmark in model.benchmarks:
            whole = math.isfinite(benchmark.score)
            said.append(
                f"{name}: {benchmark.name} score {100 * benchmark.score:.1f}."
                if whole
                else f"{name}: no {benchmark.name} score, since {len(benchmark.missing)} of its subsets are missing."
            )
        if model.best_of_n is not None and model.best_of_n.fall > 0:
            curve = model.best_of_n
            said.append(f"{name}: gold reward is highest at n = {curve.peak} and {curve.fall:.2f} SD lower at the end.")
    for one in (one for one in result.comparisons if one.first == next(iter(result.models))):
        better = one.better
        ends = "no difference in accuracy is shown" if better is None else f"{better} is more accurate"
        said.append(
            f"{one.first} and {one.second} order {_percent(one.agreement)} of the pairs alike; {ends} "
            f"(adjusted p = {_p(one.adjusted_p)})."
        )
    return said


def tables(result: Evaluation) -> dict[str, Table]:
    """The tables of the page that have rows, by name."""
    models = result.models
    found = {
        "models": Table(
            ("model", "class", "parameters", "dtype", "token limit", "texts", "cut", "texts a second"),
            [_model_row(name, one) for name, one in models.items()],
        ),
        "accuracy": _accuracy_table(result),
        "calibration": Table(
            (
                "model",
                "ECE",
                "ECE if true",
                "loss, nats",
                "temperature",
                "held-out ECE",
                "ECE after",
                "loss after",
            ),
            [_calibration_row(name, one) for name, one in models.items() if one.calibration is not None],
        ),
        "length": Table(
            (
                "model",
                "correlation with log length",
                "SD a doubling",
                "chosen is longer",
                "accuracy, chosen shorter",
                "accuracy, chosen longer",
            ),
            [
                (
                    name,
                    _number(one.length.correlation),
                    _number(one.length.per_doubling),
                    _percent(one.length.longer_chosen),
                    _percent(one.length.chosen_shorter),
                    _percent(one.length.chosen_longer),
                )
                for name, one in models.items()
                if one.length is not None
            ],
        ),
        "probes": Table(
            ("edit", "model", "change, SD", "reward rises", "right pairs overturned", "answers", "left out"),
            [
                (
                    probe.title,
                    name,
                    _number(effect.change),
                    _percent(effect.rose),
                    _percent(effect.overturned),
                    f"{effect.edited:,}",
                    f"{effect.left_out:,}",
                )
                for probe in PROBES
                for name, one in models.items()
                if (effect := one.edits.get(probe.name))
            ],
        ),
        "agreement": Table(
            ("models", "same order", "first less second, accuracy", "first alone", "second alone", "p", "adjusted p"),
            [
                (
                    f"{one.first} / {one.second}",
                    _percent(one.agreement),
                    _points(one.paired.difference),
                    f"{one.paired.first_better:,}",
                    f"{one.paired.second_better:,}",
                    _p(one.paired.p),
                    _p(one.adjusted_p),
                )
                for one in result.comparisons
            ],
        ),
        "best_of_n": Table(
            ("n", "KL, nats", "model", "gold, SD", "own reward, SD"),
            [
                (f"{n}", f"{kl:.2f}", name, _number(gold), _number(proxy))
                for name, one in models.items()
                if (curve := one.best_of_n) is not None
                for n, kl, gold, proxy in zip(curve.n, curve.kl, curve.gold, curve.proxy, strict=True)
            ],
        ),
        **_benchmark_tables(models),
    }
    return {name: table for name, table in found.items() if table.rows}


def _accuracy_table(result: Evaluation) -> Table:
    held = {name: one for name, one in result.models.items() if one.accuracy is not None}
    head = ("subset", "pairs", *held)
    rows: list[tuple[str, ...]] = []
    for subset in next((one.subsets for one in held.values()), {}):
        shares = [one.subsets[subset].share for one in held.values()]
        rows.append((subset, f"{shares[0].count:,}", *map(_percent, shares)))
    if len(rows) > 1:
        means = (f"{100 * one.subset_mean:.1f}" for one in held.values())
        rows.append(("mean over subsets", "", *means))
    if held:
        shares = [one.accuracy.share for one in held.values() if one.accuracy is not None]
        rows.append(("all pairs", f"{result.pairs:,}", *map(_percent, shares)))
    return Table(head, rows if len(rows) != 2 else rows[1:])


def _benchmark_tables(models: dict[str, ModelResult]) -> dict[str, Table]:
    found = {}
    for name in dict.fromkeys(b.name for one in models.values() for b in one.benchmarks):
        scores = {model: next(b for b in one.benchmarks if b.name == name) for model, one in models.items()}
        first = next(iter(scores.values()))
        rows = [
            (section, *(f"{100 * one.sections[section]:.1f}" for one in scores.values())) for section in first.sections
        ]
        if not first.sections:
            rows = [(part, *(_percent(one.parts[part]) for one in scores.values())) for part in first.parts]
        rows.append(
            ("score", *(f"{100 * one.score:.1f}" if math.isfinite(one.score) else "-" for one in scores.values()))
        )
        found[name] = Table(("section" if first.sections else "subset", *scores), rows)
    return found


def _model_row(name: str, model: ModelResult) -> tuple[str, ...]:
    limit = "none" if model.max_length is None else f"{model.max_length:,}"
    rate = f"{model.scored / model.seconds:.3g}" if model.seconds > 0 else "-"
    texts = (f"{model.scored:,}", f"{model.cut:,}")
    return (name, model.class_name, f"{model.parameters:,}", model.dtype, limit, *texts, rate)


def _calibration_row(name: str, model: ModelResult) -> tuple[str, ...]:
    one = model.calibration
    assert one is not None  # the caller's condition
    before = "-" if one.before is None else f"{one.before.ece:.3f}"
    after = ("-", "-") if one.after is None else (f"{one.after.ece:.3f}", f"{one.after.loss:.3f}")
    temperature = f"none: {one.why_none}" if one.temperature is None else f"{one.temperature:.3g}"
    first = (f"{one.all.ece:.3f}", f"{one.all.ece_if_calibrated:.3f}", f"{one.all.loss:.3f}")
    return (name, *first, temperature, before, *after)


def _percent(one: Estimate) -> str:
    if not math.isfinite(one.value):
        return "-"
    ends = f" ({100 * one.low:.1f} to {100 * one.high:.1f})" if math.isfinite(one.low) else ""
    return f"{100 * one.value:.1f}%{ends}"


def _points(one: Estimate) -> str:
    ends = f" ({100 * one.low:+.1f} to {100 * one.high:+.1f})" if math.isfinite(one.low) else ""
    return f"{100 * one.value:+.1f} points{ends}"


def _number(one: Estimate) -> str:
    if not math.isfinite(one.value):
        return "-"
    ends = f" ({one.low:+.2f} to {one.high:+.2f})" if math.isfinite(one.low) else ""
    return f"{one.value:+.2f}{ends}"


def _p(value: float) -> str:
    return "-" if not math.isfinite(value) else "below 0.001" if value < 0.001 else f"{value:.3f}"
