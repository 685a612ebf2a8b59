"""PNG plots of a recipe's results: training curves, routing statistics or members, merge weights, best-of-n.

Reads results, changes none; figures are made without pyplot, so that a caller's own plotting state is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ummrm.nn.dense import PROJECTIONS

from ..figures import FONT, legend_below
from .config import RecipeConfig
from .stages import RecipeResult

# Okabe and Ito's palette, told apart by readers with any colour vision; marker and dash say the same again
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "dense_longer": {"color": "#0072B2", "marker": "s", "linestyle": (0, (5, 2))},
    "moe": {"color": "#E69F00", "marker": "^", "linestyle": (0, (1, 1))},
    "merged": {"color": "#D55E00", "marker": "D", "linestyle": (0, (4, 1.5, 1, 1.5))},
    "distilled": {"color": "#009E73", "marker": "v", "linestyle": (0, (7, 1))},
}
_ALPHA = "alpha"  # a stage, of the merged model


def write_plots(result: RecipeResult, output: str | Path) -> list[Path]:
    """Draws every plot into `output`; returns the files."""
    output = Path(output)
    files = []
    with matplotlib.rc_context(FONT):
        for name, draw in plots_of(result.config).items():
            figure = draw(result)
            files.append(output / f"{name}.png")
            figure.savefig(files[-1])
    return files


def training_curves(result: RecipeResult) -> Figure:
    """Losses and held-out accuracies of each stage against optimiser steps since the start."""
    distilled = result.histories.get("distilled")
    panels = 3 if distilled is None else 4
    figure = Figure(figsize=(4 * panels, 4.1), layout="constrained")
    axes = figure.subplots(1, panels)
    steps = {stage: len(history.loss) for stage, history in result.histories.items()}
    upcycling = steps["dense"] if result.config.start == "dense" else 0
    merging = upcycling + steps["moe"]
    starts = {"dense": 0, "dense_longer": upcycling, "moe": upcycling, _ALPHA: merging}
    starts["distilled"] = merging + steps.get(_ALPHA, 0)
    for stage, history in result.histories.items():
        style = STYLES["merged" if stage == _ALPHA else stage]
        label = "merged, learning alpha" if stage == _ALPHA else result.labels[stage]
        loss_axis = axes[3] if stage == "distilled" else axes[0]
        at, smooth = _moving_mean(history.loss, max(1, len(history.loss) // 15))
        loss_axis.plot(starts[stage] + at, smooth, color=style["color"], linestyle=style["linestyle"])
        at = starts[stage] + np.array(history.evaluated)
        axes[1].plot(at, history.accuracy["test"], label=label, **style)
        axes[2].plot(at, history.accuracy["shifted"], **style)
    axes[0].set(title="Training", ylabel="preference loss (moving mean)")
    axes[1].set(title="Held out, in distribution", ylabel="preference accuracy")
    axes[2].set(title="Held out, shortcut reversed", ylabel="preference accuracy")
    if distilled is not None:
        axes[3].set(title="Distillation", ylabel="squared distance to the members' mean")
        axes[3].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("optimiser steps")
    for axis in axes[:3]:
        for start in {upcycling, merging} - {0}:
            axis.axvline(start, color="0.6", linewidth=0.9, linestyle=":", zorder=0)
    legend_below(figure, [axes[1]], columns=len(result.histories))
    lines = "dotted lines: upcycling, merging" if upcycling else "dotted line: merging"
    figure.suptitle(f"{result.config.name}: training ({lines})", fontsize=11)
    return figure


def members(result: RecipeResult) -> Figure:
    """Accuracy of each member beside the other reward models, in distribution and with the shortcut reversed."""
    assert result.members is not None
    figure = Figure(figsize=(10, 0.34 * (len(result.members.test) + len(result.arms)) + 1.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = [result.labels[name] for name in result.arms]
    labels[2:2] = [f"member {e}" for e in range(len(result.members.test))]
    plain = {"color": "0.5", "marker": "o"}
    styles = [STYLES[name] for name in result.arms]
    styles[2:2] = [plain] * len(result.members.test)
    for axis, alone, which, title in (
        (axes[0], result.members.test, "test", "In distribution"),
        (axes[1], result.members.shifted, "shifted", "Shortcut reversed"),
    ):
        found = [getattr(arm, which) for arm in result.arms.values()]
        found[2:2] = alone
        for row, (one, style) in enumerate(zip(found, styles, strict=True)):
            axis.errorbar(
                one.value,
                row,
                xerr=one.standard_error,
                color=style["color"],
                marker=style["marker"],
                markersize=7,
                linestyle="",
                capsize=3,
            )
        axis.axvline(found[0].value, color="0.6", linewidth=0.9, linestyle=":", zorder=0)
        axis.set(title=title, xlabel="preference accuracy")
        axis.xaxis.set_major_locator(MaxNLocator(6))
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"{result.config.name}: members and what is made of them (bars: ±1 standard error; dotted: dense)", fontsize=11
    )
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
        axes[0].plot(kl, gold, label=result.labels[name], **style)
        axes[0].fill_between(kl, gold - error, gold + error, color=style["color"], alpha=0.10, linewidth=0)
        axes[1].plot(kl, curve.proxy, **style)
        axes[2].plot(curve.proxy, gold, **style)
    kl_label = "KL from the policy, ln n − (n−1)/n  (nats)"
    proxy_label = "proxy: model's own score\n(standard deviations from its mean)"
    axes[0].set(title="Gold reward of the selected answer", xlabel=kl_label, ylabel="gold reward")
    axes[1].set(title="Score by the selecting model", xlabel=kl_label, ylabel=proxy_label)
    axes[2].set(title="Gold against proxy, n rising rightwards", xlabel=proxy_label, ylabel="gold reward")
    axes[1].yaxis.set_major_locator(MaxNLocator(6))
    legend_below(figure, [axes[0]], columns=len(result.arms))
    largest = next(iter(result.arms.values())).best_of_n.n[-1]
    prompts = result.task.policy.gold.shape[0]
    figure.suptitle(
        f"{result.config.name}: best-of-n, n = 1 to {largest}, {prompts} prompts (band: ±1 standard error)",
        fontsize=11,
    )
    return figure


def plots_of(config: RecipeConfig) -> dict[str, Callable[[RecipeResult], Figure]]:
    """The plots of a recipe by the names of their files."""
    of_experts: dict[str, Callable[[RecipeResult], Figure]] = {"gate_usage": gate_usage}
    if config.upcycle.by_sequence:
        of_experts = {"members": members}
    if config.alpha is not None:
        of_experts["alpha"] = alpha
    return {"training_curves": training_curves, **of_experts, "best_of_n": best_of_n}


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
