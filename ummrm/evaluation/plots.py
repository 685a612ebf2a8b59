"""The report's figures as SVG that stands in a page: text in the page's own colour, so that light and dark both work.

Draws results, computes none beyond what an axis needs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from .edits import PROBES
from .intervals import Estimate
from .runner import Evaluation

# Okabe and Ito's colours that show on white and on black; markers say the same again
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_INK = "#012345"  # stands for the page's colour until the figure is SVG
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
}
_WIDTH = 5.4  # inches; a phone's screen shows it at its own size


@dataclass(frozen=True)
class Drawing:
    """A figure in a page.

    Attributes:
        name: of the figure.
        caption: what to see in it.
        svg: an `svg` element; it holds no script and refers to nothing outside.
    """

    name: str
    caption: str
    svg: str


def draw(result: Evaluation) -> list[Drawing]:
    """Every figure that the results tell something for, in the order of the report."""
    figures: list[tuple[str, str, Callable[[], Figure | None]]] = [
        ("accuracy", "Accuracy by subset with 95% intervals; dotted: a coin.", lambda: _accuracy(result)),
        (
            "reliability",
            "How often the answer with the higher reward is the chosen one, by the confidence that the rewards state. "
            "On the line confidence is true; below it the model is too sure. Larger dots: more pairs.",
            lambda: _reliability(result),
        ),
        (
            "length",
            "Difference of reward within pairs by the ratio of the two answers' lengths, means of equally many pairs. "
            "A rising line: the longer answer gets more. What the data prefer is in the table.",
            lambda: _length(result),
        ),
        (
            "probes",
            "Mean change of the reward under each edit, with 95% intervals over prompts. No edit adds content, so "
            "that 0 is what a sound model shows or falls below.",
            lambda: _edits(result),
        ),
        *(
            (
                f"probe-{probe.name}",
                f"{_sentence(probe.title)}: share of answers whose reward changes by less than x. Right of 0 the "
                f"edit pays; if much does, {probe.meaning}.",
                lambda name=probe.name: _changes(result, name),
            )
            for probe in PROBES
        ),
        (
            "best-of-n",
            "Gold reward of the answer that each model likes best among n, over a random answer; bands: 95% intervals "
            "over prompts. Where a line falls while n grows, the model is being exploited.",
            lambda: _best_of_n(result),
        ),
    ]
    found = []
    with matplotlib.rc_context(_STYLE):
        for name, caption, make in figures:
            figure = make()
            if figure is not None:
                found.append(Drawing(name, caption, svg_of(figure, name)))
    return found


def svg_of(figure: Figure, name: str) -> str:
    """A figure as an `svg` element whose ids are its own in a page with others."""
    file = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
    text = text.replace(_INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1).strip()


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    return {name: (_COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def _new(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def _legend(figure: Figure, axis: Axes, entries: int) -> None:
    if entries < 2:
        return
    handles, labels = axis.get_legend_handles_labels()
    labels = [label if len(label) <= 40 else f"{label[:37]}..." for label in labels]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 22 else 2, frameon=False
    )


def _bars(axis: Axes, rows: Sequence[str], models: Mapping[str, Sequence[Estimate]]) -> None:
    """A row a name, a dot and an interval a model."""
    looks = _looks(list(models))
    step = 0.7 / len(models)
    for place, (model, estimates) in enumerate(models.items()):
        color, marker = looks[model]
        y = np.arange(len(rows)) + (place - (len(models) - 1) / 2) * step
        for at, one in zip(y, estimates, strict=True):
            if math.isfinite(one.low) and math.isfinite(one.high):
                axis.plot([one.low, one.high], [at, at], color=color, linewidth=1.2)
        axis.plot([one.value for one in estimates], y, marker, color=color, label=model)
    axis.set_yticks(range(len(rows)), [_short(row) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)


def _accuracy(result: Evaluation) -> Figure | None:
    models = {name: one for name, one in result.models.items() if one.accuracy is not None}
    if not models:
        return None
    subsets = list(next(iter(models.values())).subsets)
    shown = [] if len(subsets) == 1 else subsets[:40]
    figure, (axis,) = _new(1.1 + (0.16 + 0.13 * len(models)) * (len(shown) + 1))
    rows = ["all pairs", *shown]
    _bars(
        axis,
        rows,
        {
            name: [one.accuracy.share, *(one.subsets[subset].share for subset in shown)]
            for name, one in models.items()
            if one.accuracy is not None
        },
    )
    axis.axvline(0.5, color=_INK, linestyle=":", linewidth=1)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("accuracy")
    _legend(figure, axis, len(models))
    return figure


def _reliability(result: Evaluation) -> Figure | None:
    found = {name: one.calibration.all for name, one in result.models.items() if one.calibration is not None}
    if not found:
        return None
    figure, (axis,) = _new(3.7)
    axis.plot([0.5, 1], [0.5, 1], color=_INK, linestyle=":", linewidth=1)
    for name, (color, marker) in _looks(list(found)).items():
        bins = [one for one in found[name].bins if one.accuracy.count]
        x, y = [one.confidence for one in bins], [one.accuracy.value for one in bins]
        for at, one in zip(x, bins, strict=True):
            axis.plot([at, at], [one.accuracy.low, one.accuracy.high], color=color, linewidth=0.8, alpha=0.6)
        axis.plot(x, y, color=color, linewidth=1, alpha=0.8)
        sizes = [12 + 70 * one.accuracy.count / found[name].count for one in bins]
        axis.scatter(x, y, s=sizes, marker=marker, color=color, label=name, zorder=3)
    axis.set_xlim(0.48, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("confidence, sigmoid of |difference of rewards|")
    axis.set_ylabel("accuracy")
    _legend(figure, axis, len(found))
    return figure


def _length(result: Evaluation) -> Figure | None:
    found = {name: one.length for name, one in result.models.items() if one.length is not None}
    if not found:
        return None
    figure, (axis,) = _new(3.1)
    axis.axhline(0, color=_INK, linestyle=":", linewidth=1)
    for name, (color, marker) in _looks(list(found)).items():
        # the chosen answer's place says nothing here: each pair from its longer answer
        ratios = np.abs(found[name].log_ratios)
        gaps = found[name].gaps * np.sign(found[name].log_ratios)
        parts = np.array_split(np.argsort(ratios, kind="stable"), max(1, min(8, len(ratios) // 10)))
        x, y = [float(ratios[part].mean()) for part in parts], [float(gaps[part].mean()) for part in parts]
        axis.plot(x, y, color=color, marker=marker, label=name)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{2**x:.3g}x"))
    axis.set_xlabel("how many times as long the longer answer is")
    axis.set_ylabel("reward of the longer less\nthe shorter one, SD")
    _legend(figure, axis, len(found))
    return figure


def _edits(result: Evaluation) -> Figure | None:
    names = [p.name for p in PROBES if any(one.edits.get(p.name) for one in result.models.values())]
    if not names:
        return None
    titles = {probe.name: probe.title for probe in PROBES}
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    figure, (axis,) = _new(1.1 + (0.2 + 0.13 * len(result.models)) * len(names))
    _bars(
        axis,
        [titles[name] for name in names],
        {
            model: [effect.change if (effect := one.edits.get(name)) else nothing for name in names]
            for model, one in result.models.items()
        },
    )
    axis.axvline(0, color=_INK, linestyle=":", linewidth=1)
    axis.set_xlabel("change of reward, standard deviations (SD)")
    _legend(figure, axis, len(result.models))
    return figure


def _changes(result: Evaluation, name: str) -> Figure | None:
    found = {model: effect for model, one in result.models.items() if (effect := one.edits.get(name))}
    if not found:
        return None
    figure, (axis,) = _new(2.5)
    axis.axvline(0, color=_INK, linestyle=":", linewidth=1)
    for model, (color, _) in _looks(list(found)).items():
        values = np.quantile(found[model].changes, np.linspace(0, 1, 101))
        axis.plot(values, np.linspace(0, 1, 101), color=color, label=model)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.set_xlabel("change of reward, SD")
    axis.set_ylabel("answers")
    _legend(figure, axis, len(found))
    return figure


def _best_of_n(result: Evaluation) -> Figure | None:
    found = {name: one.best_of_n for name, one in result.models.items() if one.best_of_n is not None}
    if not found:
        return None
    figure, (axis,) = _new(3.4)
    axis.axhline(0, color=_INK, linestyle=":", linewidth=1)
    for name, (color, marker) in _looks(list(found)).items():
        curve = found[name]
        axis.plot(curve.kl, [one.value for one in curve.gold], color=color, marker=marker, label=name)
        low, high = [one.low for one in curve.gold], [one.high for one in curve.gold]
        axis.fill_between(curve.kl, low, high, color=color, alpha=0.15, linewidth=0)
    curve = next(iter(found.values()))
    axis.set_xticks(curve.kl, [f"{n}\n{kl:.2f}" for n, kl in zip(curve.n, curve.kl, strict=True)])
    axis.set_xlabel("n, and below it KL in nats")
    axis.set_ylabel("gold reward over a\nrandom answer, SD")
    _legend(figure, axis, len(found))
    return figure


def _short(text: str) -> str:
    return text if len(text) <= 34 else f"{text[:31]}..."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
