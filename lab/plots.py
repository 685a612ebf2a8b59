"""Plots of a study, from its tables: over-optimisation, comparisons, accuracies, experts.

Reads rows, changes none. Bands and bars are 95% t intervals over seeds unless the title says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from .compare import OUTCOMES, Comparison, Runs
from .config import OPTIMISERS, StudyConfig
from .figures import FONT, legend_below
from .fits import smoothed

# Okabe and Ito's palette; marker and dash say the same again for readers who see colours otherwise
_LOOKS = (
    ("#000000", "o", "-"),
    ("#0072B2", "s", (0, (5, 2))),
    ("#56B4E9", "v", (0, (3, 1, 1, 1))),
    ("#009E73", "P", (0, (1, 1))),
    ("#CC79A7", "X", (0, (4, 1, 1, 1, 1, 1))),
    ("#E69F00", "^", (0, (2, 1))),
    ("#D55E00", "D", (0, (6, 1.5, 1.5, 1.5))),
)
_COLUMNS = 2  # regimes side by side
_SHOWN = ("dense", "dense_longer", "dense_flops", "ensemble_worst", "warm", "moe", "merged")


def write_plots(
    study: StudyConfig,
    runs: Runs,
    curves: Sequence[dict],
    experts: Sequence[dict],
    comparisons: Sequence[Comparison],
    output: Path,
) -> list[Path]:
    """Draws every plot for which there is data into `output`; returns the files.

    A column a regime; a plot of more regimes than can be read side by side goes on in files named `-2`, `-3`, ...
    """
    figures = {
        "best_of_n": lambda some: over_optimisation(some, curves, "best_of_n"),
        **{name: lambda some, name=name: over_optimisation(some, curves, name) for name in OPTIMISERS[1:]},
        "differences": lambda some: differences(some, runs, [c for c in comparisons if c.regime in some.regimes]),
        "accuracy": lambda some: accuracies(some, runs),
        "shared_share": lambda some: shared_share(some, runs),
        "gates": lambda some: gates(some, experts),
        "specialisation": lambda some: specialisation(some, experts),
    }
    files = []
    with matplotlib.rc_context(FONT):
        for name, draw in figures.items():
            for part, some in enumerate(_side_by_side(study)):
                if (figure := draw(some)) is not None:
                    files.append(output / (f"{name}-{part + 1}.png" if part else f"{name}.png"))
                    figure.savefig(files[-1], dpi=150)
    return files


def _side_by_side(study: StudyConfig) -> list[StudyConfig]:
    """The study in parts of few regimes."""
    names = list(study.regimes)
    parts = [names[i : i + _COLUMNS] for i in range(0, len(names), _COLUMNS)]
    return [dataclasses.replace(study, regimes={name: study.regimes[name] for name in part}) for part in parts]


def over_optimisation(study: StudyConfig, curves: Sequence[dict], optimiser: str) -> Figure | None:
    """Gold and proxy reward against the root of KL, a column a regime."""
    rows = [row for row in curves if row["optimiser"] == optimiser]
    arms = _shown(study, {row["arm"] for row in rows})
    if not arms:
        return None
    regimes = list(study.regimes)
    window = 1 if optimiser == "best_of_n" else study.measure.ppo_window
    figure = Figure(figsize=(5.4 * len(regimes) + 0.6, 7.2), layout="constrained")
    axes = figure.subplots(2, len(regimes), squeeze=False, sharex="col")
    for column, regime in enumerate(regimes):
        for arm, (color, marker, dash) in arms.items():
            kl, gold, proxy = _by_seed(rows, regime, arm, window)
            if kl.size == 0:
                continue
            x = np.sqrt(np.maximum(kl, 0)).mean(0)
            every = max(1, len(x) // 10)
            style = {"color": color, "marker": marker, "linestyle": dash, "markevery": every}
            for axis, values in ((axes[0, column], gold), (axes[1, column], proxy)):
                mean, half = _band(values)
                axis.plot(x, mean, label=study.label(arm), **style)
                axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.10, linewidth=0)
        fixed = study.measure.fixed_kl if optimiser == "best_of_n" else study.measure.ppo_fixed_kl
        for axis in axes[:, column]:
            axis.axvline(math.sqrt(fixed), color="0.5", linewidth=0.9, linestyle=":")
        axes[0, column].set_title(f"{study.title(regime)}: gold reward")
        axes[1, column].set_title("the model's own reward (proxy)")
        axes[1, column].set_xlabel("√KL from the policy, √nats")
    for axis in axes[:, 0]:
        axis.set_ylabel("standard deviations of\nthe policy's own answers")
    legend_below(figure, axes.flat, columns=3)
    points = "steps" if optimiser == "ppo" else "measurements"
    name = "Best-of-n" if optimiser == "best_of_n" else f"{optimiser.upper()} (means over {window} {points})"
    after = ": " if len(regimes) > 1 else "\n"  # one column is too narrow for the whole line
    figure.suptitle(f"{name}{after}what optimising against each reward model gives (dotted: the fixed KL)", fontsize=11)
    return figure


def differences(study: StudyConfig, runs: Runs, comparisons: Sequence[Comparison]) -> Figure | None:
    """The primary outcome of one arm minus another's, for every pair compared: a dot a seed, mean and interval."""
    outcome = study.primary.outcome
    shown = [
        c
        for c in comparisons
        if c.paired is not None and c.config.outcome == outcome and c.config.optimiser == study.primary.optimiser
    ]
    if not shown:
        return None
    pairs = list(dict.fromkeys((c.config.arm, c.config.against) for c in shown))
    names, common = _pair_names(study, pairs)
    regimes = [regime for regime in study.regimes if any(c.regime == regime for c in shown)]
    figure = Figure(figsize=(4.6 * len(regimes) + 2.6, 1.6 + 0.42 * len(pairs)), layout="constrained")
    axes = figure.subplots(1, len(regimes), squeeze=False, sharey=True)[0]
    for axis, regime in zip(axes, regimes, strict=True):
        for c in (c for c in shown if c.regime == regime):
            y = pairs.index((c.config.arm, c.config.against))
            first, second = (
                runs.values(regime, arm, c.config.optimiser, outcome) for arm in (c.config.arm, c.config.against)
            )
            dots = [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]
            color = "#D55E00" if c.primary else "#0072B2"
            axis.plot(dots, np.full(len(dots), y) + 0.18, "o", color=color, alpha=0.35, markersize=3.5)
            low, high = c.paired.mean - c.paired.low, c.paired.high - c.paired.mean
            axis.errorbar(c.paired.mean, y, xerr=[[low], [high]], fmt="D", color=color, capsize=3, markersize=5)
        axis.axvline(0, color="0.3", linewidth=0.9)
        axis.set_title(study.title(regime))
        axis.set_xlabel(f"difference in {OUTCOMES.get(outcome, outcome)}")
    axes[0].set_yticks(range(len(pairs)), names)
    axes[0].invert_yaxis()
    figure.suptitle(f"{common} (orange: the primary comparison; dots: seeds)", fontsize=11)
    return figure


def _pair_names(study: StudyConfig, pairs: Sequence[tuple[str, str]]) -> tuple[list[str], str]:
    """Names of pairs of arms, short by what they have in common, and that in words."""
    first, second = pairs[0]
    if all(arm == first for arm, _ in pairs):
        return [study.label(other) for _, other in pairs], f"{study.label(first)}, minus each of these"
    if all(other == second for _, other in pairs):
        return [study.label(arm) for arm, _ in pairs], f"Each of these, minus {study.label(second)}"
    return [f"{study.label(arm)}\nminus {study.label(other)}" for arm, other in pairs], "Pairs of arms"


def accuracies(study: StudyConfig, runs: Runs) -> Figure | None:
    """Preference accuracies of every arm."""
    regimes = list(study.regimes)
    arms = [a for a in study.arms if any(runs.values(r, a, "best_of_n", "accuracy") for r in regimes)]
    if not arms:
        return None
    kinds = {
        "accuracy": ("in distribution", "#000000", "o"),
        "accuracy_shifted": ("shortcut reversed", "#0072B2", "s"),
        "accuracy_tail": ("on the policy's tail", "#D55E00", "D"),
    }
    figure = Figure(figsize=(4.6 * len(regimes) + 2.6, 1.8 + 0.42 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(regimes), squeeze=False, sharey=True)[0]
    for axis, regime in zip(axes, regimes, strict=True):
        for offset, (column, (label, color, marker)) in zip((-0.22, 0.0, 0.22), kinds.items(), strict=True):
            found = [runs.interval(regime, arm, "best_of_n", column) for arm in arms]
            at = [i + offset for i, f in enumerate(found) if f is not None]
            if not at:
                continue  # no answer of a checkpoint need be longer than training's
            mean, low, high = np.array([f for f in found if f is not None]).T
            error = np.nan_to_num([mean - low, high - mean])
            axis.errorbar(mean, at, xerr=error, fmt=marker, color=color, label=label, capsize=2, markersize=4.5)
        axis.axvline(0.5, color="0.5", linewidth=0.9, linestyle=":")
        axis.set(title=study.title(regime), xlabel="share of pairs ordered as gold does")
    axes[0].set_yticks(range(len(arms)), [study.label(arm) for arm in arms])
    axes[0].invert_yaxis()
    legend_below(figure, axes, columns=3)
    figure.suptitle("Preference accuracy (dotted: chance)", fontsize=11)
    return figure


def shared_share(study: StudyConfig, runs: Runs) -> Figure | None:
    """The primary outcome of merged models against lambda, the shared experts' share."""
    plain = {"dense", "upcycle", "training", "merge", "learning"}
    arms = {
        name: arm
        for name, arm in study.arms.items()
        if arm.kind == "merged" and not any(getattr(arm, field) for field in plain)
    }
    learned = {name: arm.shared_share for name, arm in arms.items() if arm.alpha == "learned" or arm.shared_share == 1}
    outcome, optimiser = study.primary.outcome, study.primary.optimiser
    regimes = [r for r in study.regimes if all(runs.values(r, name, optimiser, outcome) for name in learned)]
    if len(learned) < 3 or not regimes:
        return None
    figure = Figure(figsize=(4.4 * len(regimes) + 0.6, 3.6), layout="constrained")
    axes = figure.subplots(1, len(regimes), squeeze=False)[0]
    for axis, regime in zip(axes, regimes, strict=True):
        names = sorted(learned, key=learned.get)
        mean, low, high = np.array([runs.interval(regime, name, optimiser, outcome) for name in names]).T
        error = np.nan_to_num([mean - low, high - mean])
        axis.errorbar(
            [learned[n] for n in names], mean, yerr=error, fmt="D-", color="#D55E00", capsize=3, label="merged"
        )
        for name, color in ((study.primary.against, "#0072B2"), (study.mixture, "#E69F00")):
            if name in study.arms and (found := runs.interval(regime, name, optimiser, outcome)):
                axis.axhline(found[0], color=color, linestyle="--", label=f"{study.label(name)} (mean)")
        axis.set(title=study.title(regime), xlabel="λ, the shared expert's share of the merge")
    axes[0].set_ylabel(OUTCOMES.get(outcome, outcome))
    legend_below(figure, axes, columns=3)
    return figure


def gates(study: StudyConfig, experts: Sequence[dict]) -> Figure | None:
    """Slot shares and learned merge weights, each seed's experts sorted from most to least: indices mean nothing."""
    name = study.mixture
    mixture = [row for row in experts if row["arm"] == name]
    last = max((row["step"] for row in mixture if row["measure"] == "slot_share"), default=None)
    if last is None:
        return None
    regimes = list(study.regimes)
    figure = Figure(figsize=(5.2 * len(regimes) + 0.6, 6.6), layout="constrained")
    axes = figure.subplots(2, len(regimes), squeeze=False, sharey="row")
    for column, regime in enumerate(regimes):
        usage = [r for r in mixture if r["regime"] == regime]
        merged = [r for r in experts if r["regime"] == regime and r["arm"] == study.primary.arm]
        shares = _sorted_profiles([r for r in usage if r["measure"] == "slot_share" and r["step"] == last], 0)
        shared = study.upcycle.num_shared_experts
        weights = _sorted_profiles([r for r in merged if r["measure"] == "merge_weight_0"], shared)
        _profiles(axes[0, column], shares, f"{study.title(regime)}: share of routed slots")
        weights = {layer: w / w.sum(1, keepdims=True) for layer, w in weights.items()}
        _profiles(axes[1, column], weights, "softmax(alpha), learned")
        axes[1, column].set_xlabel("routed expert, by rank within each seed and layer")
    for axis in axes[:, 0]:
        axis.set_ylim(bottom=0)
        axis.set_ylabel("share")
    legend_below(figure, axes.flat, columns=4)
    figure.suptitle("Routing statistics and merge weights (dotted: all equal)", fontsize=11)
    return figure


def specialisation(study: StudyConfig, experts: Sequence[dict]) -> Figure | None:
    """Mutual information of gate and instruction regime over training, and what leaving an expert out costs."""
    name = study.mixture
    rows = [r for r in experts if r["arm"] == name]
    if not any(r["measure"] == "mutual_information" for r in rows):
        return None
    regimes = list(study.regimes)
    last = max(r["step"] for r in rows if r["measure"] == "ablation_cost")
    figure = Figure(figsize=(5.4 * len(regimes) + 0.6, 7.4), layout="constrained")
    axes = figure.subplots(2, len(regimes), squeeze=False, sharey="row")
    for column, regime in enumerate(regimes):
        here = [r for r in rows if r["regime"] == regime]
        axis = axes[0, column]
        for i, layer in enumerate(sorted({r["layer"] for r in here if r["measure"] == "mutual_information"})):
            for measure, dash, label in (("", "-", ""), ("_null", (0, (2, 2)), ", by chance")):
                found = [r for r in here if r["layer"] == layer and r["measure"] == f"mutual_information{measure}"]
                steps = sorted({r["step"] for r in found})
                values = np.array([[r["value"] for r in found if r["step"] == step] for step in steps]).T
                mean, half = _band(values)
                color, marker, _ = _LOOKS[(1, 6, 3, 4)[i % 4]]
                axis.errorbar(
                    steps, mean, yerr=half, color=color, marker=marker, linestyle=dash, capsize=3, label=layer + label
                )
        axis.set(title=f"{study.title(regime)}:\ninformation of the first expert about the instruction regime")
        axis.set_xlabel("steps of the mixture's training")
        _ablation_bars(axes[1, column], [r for r in here if r["measure"] == "ablation_cost" and r["step"] == last])
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("bits")
    axes[1, 0].set_ylabel("rise of the preference loss, nats a pair")
    legend_below(figure, axes[0], columns=4)
    axes[1, 0].legend(frameon=False, title="left out")
    return figure


def _ablation_bars(axis: Axes, rows: Sequence[dict]) -> None:
    """A group of bars for each instruction regime: shared, the regime's most costly routed one, the mean routed one."""
    instructions = list(dict.fromkeys(r["regime_of_pairs"] for r in rows))
    seeds = sorted({r["seed"] for r in rows})
    table = np.array(
        [
            [[r["value"] for r in rows if r["seed"] == seed and r["regime_of_pairs"] == name] for name in instructions]
            for seed in seeds
        ]
    )  # seeds, instruction regimes, experts (the shared one first)
    parts = {
        "the shared expert": (table[..., 0], "#000000"),
        "the regime's most costly routed expert": (table[..., 1:].max(-1), "#D55E00"),
        "a routed expert, mean": (table[..., 1:].mean(-1), "#0072B2"),
    }
    for i, (label, (values, color)) in enumerate(parts.items()):
        mean, half = _band(values)
        axis.bar(
            np.arange(len(instructions)) + 0.27 * (i - 1), mean, 0.25, yerr=half, color=color, label=label, capsize=2
        )
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.set_xticks(range(len(instructions)), instructions)
    axis.set(title="cost of leaving an expert out, at the end", xlabel="instruction regime of the pairs")


def _sorted_profiles(rows: Sequence[dict], skip: int) -> dict[str, np.ndarray]:
    """Layer to [seeds, experts], each row sorted downwards; the first `skip` experts are left out."""
    profiles = {}
    for layer in sorted({r["layer"] for r in rows}):
        by_seed: dict[int, list[float]] = {}
        for r in rows:
            if r["layer"] == layer and r["expert"] >= skip:
                by_seed.setdefault(r["seed"], []).append(r["value"])
        profiles[layer] = np.array([sorted(values, reverse=True) for values in by_seed.values()])
    return profiles


def _profiles(axis: Axes, profiles: dict[str, np.ndarray], title: str) -> None:
    for i, (layer, values) in enumerate(profiles.items()):
        color, marker, _ = _LOOKS[(1, 6, 3, 4)[i % 4]]
        mean, half = _band(values)
        x = np.arange(1, values.shape[1] + 1)
        axis.plot(x, mean, color=color, marker=marker, label=layer)
        axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
        axis.axhline(1 / values.shape[1], color="0.5", linewidth=0.9, linestyle=":")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(title)


def _by_seed(rows: Sequence[dict], regime: str, arm: str, window: int) -> tuple[np.ndarray, ...]:
    """KL, gold and proxy, each [seeds, points], averaged over `window` neighbours."""
    seeds: dict[int, list[dict]] = {}
    for row in rows:
        if row["regime"] == regime and row["arm"] == arm:
            seeds.setdefault(row["seed"], []).append(row)
    return tuple(
        np.array([smoothed([row[name] for row in points], window) for points in seeds.values()])
        for name in ("kl", "gold", "proxy")
    )


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and half the width of its 95% t interval, 0 for one seed."""
    n = len(values)
    if n < 2:
        return values.mean(0), np.zeros_like(values.mean(0))
    return values.mean(0), stats.t.ppf(0.975, n - 1) * values.std(0, ddof=1) / math.sqrt(n)


def _shown(study: StudyConfig, present: set[str]) -> dict[str, tuple]:
    """At most seven arms, so that a plot can be read, each with its look."""
    names = [name for name in study.arms if name in present]
    wanted = getattr(study, "shown", _SHOWN)
    chosen = [name for name in wanted if name in names][: len(_LOOKS)] or names[: len(_LOOKS)]
    own = {name: _LOOKS[wanted.index(name)] for name in chosen if name in wanted[: len(_LOOKS)]}
    free = (look for look in _LOOKS if look not in own.values())
    return {name: own.get(name) or next(free) for name in chosen}
