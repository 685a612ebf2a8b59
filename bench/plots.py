"""Three plots of a record: times over ummrm's, fractions of the roofline, activation memory over ummrm's."""

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from .record import OURS
from .targets import Entries, of_peak, seconds

# Okabe and Ito's palette; the marker says the same again for readers who see colours otherwise
_COLORS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#D55E00", "#999999")
_MARKERS = ("o", "s", "v", "P", "X", "^", "D", "*")


def draw(record, stem):
    """Writes STEM-ratios.png, STEM-roofline.png, STEM-memory.png, where there is data for them; returns the files."""
    measured = [e for e in record["entries"] if e["outcome"] == "measured"]
    cases = {}
    for entry in measured:
        cases.setdefault(Entries.case(entry), {})[entry["label"]] = entry
    against = {case: found for case, found in cases.items() if OURS in found and len(found) > 1}
    rates = record["about"]["rates"]
    peaks = {case: {label: of_peak(e, rates) for label, e in found.items()} for case, found in cases.items()}
    plots = {
        "ratios": (
            {c: {n: seconds(e) / seconds(f[OURS]) for n, e in f.items() if n != OURS} for c, f in against.items()},
            {c: {n: e.get("noise", 0) + f[OURS].get("noise", 0) for n, e in f.items()} for c, f in against.items()},
            "time over ummrm's (right of the line: ummrm is faster; bars: noise)",
        ),
        "roofline": (
            {c: {n: p for n, p in f.items() if p is not None} for c, f in peaks.items()},
            {},
            "share of the run's copy bandwidth or mm rate",
        ),
        "memory": (
            {c: _memory(f) for c, f in against.items()},
            {},
            "activation memory over ummrm's (right of the line: ummrm keeps less)",
        ),
    }
    files = []
    for name, (values, bars, title) in plots.items():
        values = {case: found for case, found in values.items() if found}
        if values:
            files.append(stem.with_name(f"{stem.name}-{name}.png"))
            _points(values, bars, title).savefig(files[-1], dpi=120)
    return files


def _memory(found):
    ours = found[OURS].get("held_bytes", 0)
    if ours <= 0:
        return {}
    return {n: e["held_bytes"] / ours for n, e in found.items() if n != OURS and e.get("held_bytes", 0) > 0}


def _points(values, bars, title):
    """A row a case, a marker a contender, on a logarithmic axis with a line at 1."""
    labels = list(dict.fromkeys(label for found in values.values() for label in found))
    looks = {label: (_COLORS[i % 8], _MARKERS[(i + i // 8) % 8]) for i, label in enumerate(labels)}
    figure = Figure(figsize=(11, 1.6 + 0.24 * len(values) + 0.12 * len(labels)), layout="constrained")
    axis = figure.subplots()
    for row, (case, found) in enumerate(values.items()):
        for label, value in found.items():
            color, marker = looks[label]
            noise = min(bars.get(case, {}).get(label, 0), 10)
            whisker = [[value - value / (1 + noise)], [value * noise]] if noise else None
            style = {"color": color, "marker": marker, "linestyle": "", "markersize": 5, "linewidth": 0.8}
            axis.errorbar([value], [row], xerr=whisker, **style)
    for label, (color, marker) in looks.items():
        axis.plot([], [], color=color, marker=marker, linestyle="", label=label)
    axis.axvline(1, color="0.4", linewidth=0.9)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_yticks(range(len(values)), [_row(case) for case in values], fontsize=7)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3, linewidth=0.6)
    axis.set_xlabel(title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _row(case):
    suite, direction, dtype, sizes = case
    s = dict(sizes)
    passes = "" if direction == "forward" else " + backward"
    shape = "/".join(str(s[name]) for name in "thiek" if name in s)
    skewed = " skewed" if s.get("routing") == "skewed" else ""
    return f"{suite}{passes} {dtype} {shape}{skewed}"
