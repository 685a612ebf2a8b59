"""PNG plots of a recipe's results: training curves, routing statistics, merge weights, best-of-n.

Reads results, changes none; figures are made without pyplot, so that a caller's own plotting state is left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ummrm.nn.dense import PROJECTIONS

from ..figures import FONT, legend_below

if TYPE_CHECKING:
    from .run import RecipeResult

# Okabe and Ito's palette, told apart by readers with any colour vision; marker and dash say the same again
STYLES = {
    "dense": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "dense_longer": {"color": "#0072B2", "marker": "s", "linestyle": (0, (5, 2))},
    "moe": {"color": "#E69F00", "marker": "^", "linestyle": (0, (1, 1))},
    "merged": {"color": "#D55E00", "marker": "D", "linestyle": (0, (4, 1.5, 1, 1.5))},
}
LABELS = {
    "dense": "dense",
    "dense_longer": "dense, continued training",
    "moe": "MoE",
    "merged": "merged",
}
_STAGES = {"dense": "dense", "dense_longer": "dense_longer", "moe": "moe", "alpha": "merged"}
_STAGE_LABELS = {
    "dense": "dense",
    "dense_longer": "dense, continued training",
    "moe": "MoE",
    "alpha": "merged, learning alpha",
}


def write_plots(result: RecipeResult, output: str | Path) -> list[Path]:
    """Draws every plot into `output`; returns the files."""
    output = Path(output)
    files = []
    with matplotlib.rc_context(FONT):
        for name, draw in PLOTS.items():
            figure = draw(result)
            files.append(output / f"{name}.png")
            figure.savefig(files[-1])
    return files


def training_curves(result: RecipeResult) -> Figure:
    """Training loss and held-out accuracies of each stage against optimiser steps since the start."""
    figure = Figure(figsize=(12, 4.1), layout="constrained")
    axes = figure.subplots(1, 3)
    starts = {"dense": 0, "dense_longer": len(result.histories["dense"].loss)}
    starts["moe"] = starts["dense_longer"]
    starts["alpha"] = starts["moe"] + len(result.histories["moe"].loss)
    for stage, history in result.histories.items():
        style, label = STYLES[_STAGES[stage]], _STAGE_LABELS[stage]
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        window = max(1, len(history.loss) // 15)
        steps, smooth = _moving_mean(history.loss, window)
        axes[0].plot(starts[stage] + steps, smooth, label=label, **line)
        at = starts[stage] + np.array(history.evaluated)
        for axis, name in ((axes[1], "test"), (axes[2], "shifted")):
            axis.plot(at, history.accuracy[name], **style)
    axes[0].set(title="Training", ylabel="preference loss (moving mean)")
    axes[1].set(title="Held out, in distribution", ylabel="preference accuracy")
    axes[2].set(title="Held out, shortcut reversed", ylabel="preference accuracy")
    for axis in axes:
        axis.set_xlabel("optimiser steps")
        for start in {starts["moe"], starts["alpha"]}:
            axis.axvline(start, color="0.6", linewidth=0.9, linestyle=":", zorder=0)
    legend_below(figure, axes[0], columns=4)
    figure.suptitle(f"{result.config.name}: training (dotted lines: upcycling, merging)", fontsize=11)
    return figure


def gate_usage(result: RecipeResult) -> Figure:
    """Share of the routed slots of each routed expert, and the shared experts' gate weight, by layer."""
    shares = np.array(list(result.routed_share.values()))
    shared = np.array(list(result.shared_weight.values()))
    layers = _layer_labels(list(result.routed_share))
    uniform = 1 / shares.shape[1]
    width = max(7.0, 3.4 + 0.75 * shares.shape[1])
    figure = Figure(figsize=(width, 1.9 + 0.5 * len(layers)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[shares.shape[1], 3.2])
    spread = max(np.abs(shares - uniform).max(), 0.02)
    _heatmap(figure, left, shares, layers, [str(e) for e in range(shares.shape[1])], uniform - spread, uniform + spread)
    left.set(title=f"Share of routed slots (equal: {uniform:.1%})", xlabel="routed expert")
    positions = np.arange(len(layers))
    right.barh(positions, shared, color="#0072B2", height=0.6)
    for position, value in zip(positions, shared, strict=True):
        inside = value > 0.6
        right.text(
            value + (-0.03 if inside else 0.03),
            position,
            f"{value:.2f}",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
        )
    right.set(title="Shared experts", xlabel="mean gate weight", xlim=(0, 1), yticks=positions, yticklabels=layers)
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    figure.suptitle(f"{result.config.name}: routing statistics on held-out tokens", fontsize=11)
    return figure


def alpha(result: RecipeResult) -> Figure:
    """Learned merge weights of the routed experts, softmax(alpha), by layer (and projection, where they differ)."""
    rows, labels = [], []
    shared_experts = result.config.upcycle.num_shared_experts
    share = 0.0
    for label, name in zip(_layer_labels(list(result.coefficients)), result.coefficients, strict=True):
        table = np.array(result.coefficients[name])
        share = table[0, :shared_experts].sum()
        routed = table[:, shared_experts:] / max(1 - share, 1e-12)
        per_projection = result.config.merge.alpha_per == "projection"
        for i, row in enumerate(routed if per_projection else routed[:1]):
            rows.append(row)
            labels.append(f"{label} {PROJECTIONS[-len(routed) :][i]}" if per_projection else label)
    weights = np.array(rows)
    uniform = 1 / weights.shape[1]
    figure = Figure(figsize=(max(6.4, 2.2 + 0.75 * weights.shape[1]), 1.9 + 0.5 * len(labels)), layout="constrained")
    axis = figure.subplots()
    spread = max(np.abs(weights - uniform).max(), 0.005)
    columns = [str(e) for e in range(weights.shape[1])]
    _heatmap(figure, axis, weights, labels, columns, uniform - spread, uniform + spread, digits=2)
    axis.set(xlabel="routed expert")
    kind = "learned" if result.config.merge.learn_shared_share else "fixed"
    axis.set_title(f"softmax(alpha) after learning (uniform: {uniform:.2%}); shared share λ = {share:.2f}, {kind}")
    figure.suptitle(f"{result.config.name}: merge weights", fontsize=11)
    return figure


def best_of_n(result: RecipeResult) -> Figure:
    """Gold and proxy reward under best-of-n by each reward model, against KL and against each other."""
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, arm in result.arms.items():
        style, curve = STYLES[name], arm.best_of_n
        kl, gold, error = np.array(curve.kl), np.array(curve.gold), np.array(curve.gold_error)
        axes[0].plot(kl, gold, label=LABELS[name], **style)
        axes[0].fill_between(kl, gold - error, gold + error, color=style["color"], alpha=0.10, linewidth=0)
        axes[1].plot(kl, curve.proxy, **style)
        axes[2].plot(curve.proxy, gold, **style)
    kl_label = "KL from the policy, ln n − (n−1)/n  (nats)"
    proxy_label = "proxy: model's own score\n(standard deviations from its mean)"
    axes[0].set(title="Gold reward of the selected answer", xlabel=kl_label, ylabel="gold reward")
    axes[1].set(title="Score by the selecting model", xlabel=kl_label, ylabel=proxy_label)
    axes[2].set(title="Gold against proxy, n rising rightwards", xlabel=proxy_label, ylabel="gold reward")
    axes[1].yaxis.set_major_locator(MaxNLocator(6))
    legend_below(figure, axes[0], columns=4)
    largest = next(iter(result.arms.values())).best_of_n.n[-1]
    prompts = result.task.policy.gold.shape[0]
    figure.suptitle(
        f"{result.config.name}: best-of-n, n = 1 to {largest}, {prompts} prompts (band: ±1 standard error)",
        fontsize=11,
    )
    return figure


PLOTS = {"training_curves": training_curves, "gate_usage": gate_usage, "alpha": alpha, "best_of_n": best_of_n}
"""Plots by the names of their files."""


def _heatmap(
    figure: Figure,
    axis: Axes,
    values: np.ndarray,
    rows: list[str],
    columns: list[str],
    low: float,
    high: float,
    digits: int = 1,
) -> None:
    axis.imshow(values, cmap="PuOr_r", vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(visible=False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    middle, reach = (low + high) / 2, (high - low) / 2
    for i, j in np.ndindex(values.shape):
        strong = abs(values[i, j] - middle) > 0.65 * reach
        axis.text(j, i, f"{values[i, j]:.{digits}%}", ha="center", va="center", color="white" if strong else "black")


def _moving_mean(values: list[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over `window` consecutive values, and the (1-based) step at which each window ends."""
    sums = np.cumsum(np.insert(np.array(values, dtype=float), 0, 0.0))
    return np.arange(window, len(values) + 1), (sums[window:] - sums[:-window]) / window


def _layer_labels(names: list[str]) -> list[str]:
    """`layer 3` for names like model.layers.3.mlp; the name itself where it holds no number."""
    labels = []
    for name in names:
        number = next((part for part in name.split(".") if part.isdigit()), None)
        labels.append(name if number is None else f"layer {number}")
    return labels if len(set(labels)) == len(labels) else names
