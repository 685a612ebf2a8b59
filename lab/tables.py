"""The tables of a study, as text: its arms, its comparisons, its experts. HTML and Markdown show the same cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .compare import OUTCOMES, Comparison, Runs
from .config import OPTIMISERS, StudyConfig
from .specialisation import SHARED
from .statistics import mean_interval


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: above it; may be empty.
        head: names of the columns.
        rows: cells, as many as columns; the first names the row.
        marked: indices of the rows that stand out.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = field(default_factory=frozenset)

    def select(self, columns: Sequence[str] = (), **where: Sequence[str]) -> Table:
        """Some of the columns, and of the rows those whose cells are among the ones asked for.

        Args:
            columns: names of columns in their new order; by default all.
            where: `column=` the cells to keep; a row must fit each. The columns need not be selected.

        Raises:
            ValueError: there is no such column, or no such row.
        """
        for name in (*columns, *where):
            if name not in self.head:
                raise ValueError(f"the table has the columns {', '.join(self.head)}, got {name!r}.")
        for name, cells in where.items():
            have = dict.fromkeys(row[self.head.index(name)] for row in self.rows)
            for cell in cells:
                if cell not in have:
                    raise ValueError(f"the column {name!r} has the cells {'; '.join(have)}, got {cell!r}.")
        kept = [self.head.index(name) for name in columns or self.head]
        rows = [
            i
            for i, row in enumerate(self.rows)
            if all(row[self.head.index(name)] in cells for name, cells in where.items())
        ]
        return Table(
            self.title,
            tuple(self.head[i] for i in kept),
            tuple(tuple(self.rows[i][j] for j in kept) for i in rows),
            frozenset(new for new, old in enumerate(rows) if old in self.marked),
        )

    def markdown(self) -> str:
        """The table in Markdown, title and all; marked rows in bold."""
        lines = [f"### {self.title}\n"] if self.title else []
        lines += [_line(self.head), "|---" + "|---:" * (len(self.head) - 1) + "|"]
        for i, row in enumerate(self.rows):
            lines.append(_line([f"**{cell}**" if cell else "" for cell in row] if i in self.marked else row))
        return "\n".join(lines) + "\n"


def arm_table(study: StudyConfig, regime: str, runs: Runs, timings: Runs) -> Table:
    """Every arm that was run in a regime: mean and half the 95% t interval over seeds of what was measured."""
    dense = next((name for name, arm in study.arms.items() if arm.kind == "dense"), None)
    columns: dict[str, Callable[[str], str]] = {
        f"gold at KL {study.measure.fixed_kl:g}, best-of-n": interval_cell(runs, regime, "best_of_n", "gold_at_kl"),
        "drop from the peak": interval_cell(runs, regime, "best_of_n", "drop_from_peak"),
        "proxy-gold gap": interval_cell(runs, regime, "best_of_n", "proxy_gold_gap"),
        **{
            f"gold at the end of {words_for(name)}": interval_cell(runs, regime, name, "gold_end")
            for name in OPTIMISERS[1:]
            if name == "ppo" or any(name in study.optimisers(arm) for arm in study.arms)
        },
        "accuracy": interval_cell(runs, regime, "best_of_n", "accuracy", 3),
        "shortcut reversed": interval_cell(runs, regime, "best_of_n", "accuracy_shifted", 3),
        "policy's tail": interval_cell(runs, regime, "best_of_n", "accuracy_tail", 3),
        "parameters": lambda arm: mean_cell(runs, regime, arm, "parameters", "{:,.0f}"),
        "training FLOPs ÷ dense": lambda arm: ratio_cell(runs, regime, arm, dense, "training_flops"),
        "forward time ÷ dense": lambda arm: _time_ratio(timings, regime, arm),
    }
    arms = (arm for arm in study.arms if runs.values(regime, arm, "best_of_n", "accuracy"))
    rows = tuple((study.label(arm), *(cell(arm) for cell in columns.values())) for arm in arms)
    return Table(study.title(regime), ("arm", *columns), rows)


def path_table(study: StudyConfig, runs: Runs) -> Table:
    """Every arm against which a policy was trained: where the path led, mean and half the 95% t interval over seeds."""
    outcomes = {
        f"gold at KL {study.measure.ppo_fixed_kl:g}": "gold_at_kl",
        "gold at the end": "gold_end",
        "drop from the peak": "drop_from_peak",
        "proxy-gold gap": "proxy_gold_gap",
        "KL at the end": "kl_end",
        "shortcut at the end": "shortcut_end",
    }
    rows = []
    for regime in study.regimes:
        for optimiser in OPTIMISERS[1:]:
            for arm in (arm for arm in study.arms if runs.values(regime, arm, optimiser, "gold_end")):
                cells = [interval_cell(runs, regime, optimiser, column)(arm) for column in outcomes.values()]
                rows.append((study.label(arm), study.title(regime), words_for(optimiser), *cells))
    return Table("", ("arm", "regime", "optimiser", *outcomes), tuple(rows))


def comparison_table(study: StudyConfig, comparisons: Sequence[Comparison]) -> Table:
    """The comparisons that the study fixed beforehand, the primary ones marked."""
    names = ("arm", "against", "regime", "optimiser", "outcome", "seeds", "difference", "95% interval", "better in")
    rows = []
    for c in comparisons:
        cells = [
            study.label(c.config.arm),
            study.label(c.config.against),
            study.title(c.regime),
            words_for(c.config.optimiser),
            OUTCOMES.get(c.config.outcome, c.config.outcome),
        ]
        if c.paired is None:
            cells += [f"fewer than 2 of {c.missing} have both values", *[""] * 6]
        else:
            p = c.paired
            missing = f" ({c.missing} missing)" if c.missing else ""
            cells += [f"{p.seeds}{missing}", f"{p.mean:+.3f}", f"{p.low:+.3f} to {p.high:+.3f}", f"{c.better_in:g}"]
            cells += [f"{p.p:.2g}", f"{c.adjusted:.2g}", c.verdict]
        rows.append((*cells, "primary" if c.primary else "secondary"))
    marked = frozenset(i for i, c in enumerate(comparisons) if c.primary)
    return Table("", (*names, "p", "adjusted", "verdict", "family"), tuple(rows), marked)


def expert_table(study: StudyConfig, experts: Sequence[dict]) -> Table:
    """How far experts specialise, over the mixture's training and in each layer, and how far alpha left uniform.

    Information is that of a token's first expert about the instruction regime, in bits, mean and half the 95% t
    interval over seeds; `by chance` the same with regimes dealt out to sequences at random. The shared gate weight is
    the shared expert's, mean over tokens; `largest` is the largest routed expert's share of a layer.
    """
    name, rows = study.mixture, []
    for regime in study.regimes:
        here = [row for row in experts if row["regime"] == regime]
        mixture = [row for row in here if row["arm"] == name]
        last = max((row["step"] for row in mixture), default=None)
        informed = [row for row in mixture if row["measure"] == "mutual_information"]
        for step in sorted({row["step"] for row in informed}):
            for layer in sorted({row["layer"] for row in informed}):
                at = [row for row in mixture if row["layer"] == layer and row["step"] == step]
                alphas = [row for row in here if row["layer"] == layer and row["arm"] == study.primary.arm]
                rows.append(
                    (
                        f"{study.title(regime)}, {layer}, step {step:g}",
                        _spread(r["value"] for r in at if r["measure"] == "mutual_information"),
                        _spread(r["value"] for r in at if r["measure"] == "mutual_information_null"),
                        _spread(r["value"] for r in at if r["measure"] == "shared_weight"),
                        _spread(_largest([r for r in at if r["measure"] == "slot_share"])),
                        _spread(_largest_alpha(study, alphas)) if step == last else "",
                    )
                )
    alpha = f"largest softmax(alpha), {study.primary.arm}"
    names = ("information, bits", "by chance", "shared gate weight", "largest slot share", alpha)
    return Table("", ("experts of the mixture", *names), tuple(rows))


def left_out_table(study: StudyConfig, experts: Sequence[dict]) -> Table:
    """What leaving an expert of the mixture out of all layers costs at the end of its training, on the pairs of each
    instruction regime: rise of the preference loss in millinats a pair, mean and half the 95% t interval over seeds.
    """
    shown = {
        "the shared expert": lambda shared, routed: shared,
        "the most costly routed expert": lambda shared, routed: max(routed),
        "a routed expert, mean": lambda shared, routed: sum(routed) / len(routed),
    }
    mixture = study.mixture
    found = [row for row in experts if row["arm"] == mixture and row["measure"] == "ablation_cost"]
    last = max((row["step"] for row in found), default=None)
    rows = []
    for regime in study.regimes:
        here = [row for row in found if row["regime"] == regime and row["step"] == last]
        for instruction in dict.fromkeys(row["regime_of_pairs"] for row in here):
            costs: dict[int, tuple[list[float], list[float]]] = {}  # of each seed: shared, routed
            for row in (row for row in here if row["regime_of_pairs"] == instruction):
                costs.setdefault(row["seed"], ([], []))[row["expert"] != SHARED].append(1000 * row["value"])
            each = [(shared, routed) for (shared,), routed in costs.values()]
            cells = [_spread((pick(*seed) for seed in each), 1) for pick in shown.values()]
            rows.append((f"{study.title(regime)}, {instruction}", *cells))
    return Table("", ("pairs", *shown), tuple(rows))


def mixture_table(study: StudyConfig, experts: Sequence[dict]) -> Table:
    """The mixtures that merged arms come from, at the end of their training.

    Mean and half the 95% t interval over seeds of the mean over layers. Travel and spread of experts are in percent of
    the norm of the dense model's FFN (`specialisation.expert_distances`).
    """
    measures = {
        "information, bits": ("mutual_information", 1.0, 3),
        "by chance": ("mutual_information_null", 1.0, 3),
        "shared gate weight": ("shared_weight", 1.0, 2),
        "experts' travel, %": ("expert_travel", 100.0, 1),
        "experts' spread, %": ("expert_spread", 100.0, 1),
    }
    rows = []
    for arm in study.arms:
        for regime in study.regimes:
            here = [row for row in experts if row["arm"] == arm and row["regime"] == regime]
            if any(row["measure"] == "expert_spread" for row in here):
                cells = [_spread(_layer_means(here, name, unit), digits) for name, unit, digits in measures.values()]
                rows.append((study.label(arm), study.title(regime), *cells))
    return Table("", ("arm", "regime", *measures), tuple(rows))


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


def words_for(optimiser: str) -> str:
    """An optimiser in words."""
    return "best-of-n" if optimiser == "best_of_n" else optimiser.upper()


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def interval_cell(runs: Runs, regime: str, optimiser: str, column: str, digits: int = 2) -> Callable[[str], str]:
    return lambda arm: _spread(runs.values(regime, arm, optimiser, column).values(), digits)


def _spread(values: Iterable[float], digits: int = 3) -> str:
    values = list(values)
    if not values:
        return ""
    mean, low, _ = mean_interval(values)
    half = "" if math.isnan(low) else f" ± {mean - low:.{digits}f}"
    return f"{mean:.{digits}f}{half}"


def mean_cell(runs: Runs, regime: str, arm: str, column: str, form: str) -> str:
    found = runs.interval(regime, arm, "best_of_n", column)
    return "" if found is None else form.format(found[0])


def ratio_cell(runs: Runs, regime: str, arm: str, base: str | None, column: str) -> str:
    one = runs.interval(regime, arm, "best_of_n", column)
    other = None if base is None else runs.interval(regime, base, "best_of_n", column)
    return "" if one is None or other is None else f"{one[0] / other[0]:.2f}"


def _time_ratio(timings: Runs, regime: str, arm: str) -> str:
    own, dense = (timings.values(regime, arm, "best_of_n", name) for name in ("forward_ms", "dense_forward_ms"))
    ratios = sorted(own[seed] / dense[seed] for seed in own if dense.get(seed))
    return f"{ratios[len(ratios) // 2]:.2f}" if ratios else ""


def _layer_means(rows: Sequence[dict], measure: str, unit: float) -> list[float]:
    """Of each seed, a measure's mean over layers."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        if row["measure"] == measure:
            by_seed.setdefault(row["seed"], []).append(unit * row["value"])
    return [sum(values) / len(values) for values in by_seed.values()]


def _largest(rows: Iterable[dict]) -> list[float]:
    """Of each seed, the largest value."""
    by_seed: dict[int, float] = {}
    for row in rows:
        by_seed[row["seed"]] = max(by_seed.get(row["seed"], -math.inf), row["value"])
    return list(by_seed.values())


def _largest_alpha(study: StudyConfig, rows: Sequence[dict]) -> list[float]:
    """Of each seed, the largest of the routed experts' merge weights, which sum to 1 here."""
    routed = [r for r in rows if r["measure"] == "merge_weight_0" and r["expert"] >= study.upcycle.num_shared_experts]
    total: dict[int, float] = {}
    for row in routed:
        total[row["seed"]] = total.get(row["seed"], 0.0) + row["value"]
    return _largest({**row, "value": row["value"] / total[row["seed"]]} for row in routed)
