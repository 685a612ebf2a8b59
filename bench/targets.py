"""What the CUDA kernels are held to, and Triton's, a table each, and whether the entries of a run meet it.

Stated for an NVIDIA H200; a target is judged from entries of one run alone. What was not measured is not met.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .record import DENSE, LOOP, MM, OURS, TORCH_GROUPED, TRANSFORMERS_GROUPED


class Entries:
    """The measured entries of a run, by case and label."""

    def __init__(self, record):
        self.rates = record["about"]["rates"]
        self.entries = record["entries"]
        self._by_key = {(self.case(e), e["label"]): e for e in self.entries}

    @staticmethod
    def case(entry):
        return entry["suite"], entry["direction"], entry["dtype"], tuple(sorted(entry["sizes"].items()))

    def rival(self, entry, label):
        """The entry of another contender at the same case, or None."""
        return self._by_key.get((self.case(entry), label))


def seconds(entry):
    """The figure that ratios are made of: the median of device events, or the best round of a CPU's wall clock.

    Whatever a round takes longer than the best one on a CPU is the machine's other work.
    """
    return entry["best"] if entry["timing"] == "wall" else entry["median"]


def of_peak(entry, rates):
    """Bytes over the copy bandwidth of the run, or FLOPs over its mm rate; None where neither is counted.

    On a CPU the rate is the one that was measured beside the entry.
    """
    rates = entry.get("rates", rates)
    if entry["bytes"]:
        return entry["bytes"] / seconds(entry) / rates["copy_bytes"]
    if entry["flops"]:
        return entry["flops"] / seconds(entry) / rates[f"mm_flops_{entry['dtype']}"]
    return None


@dataclass(frozen=True)
class Target:
    """One row.

    Attributes:
        what: the claim, for the reader.
        suites: whose "ummrm" entries it is about.
        bound: of an entry's sizes, what is asked; None: nothing at these sizes.
        measure: the figure, from the entry, that of `rival` at the same case (None without one), and the rates.
        rival: the contender that it compares with.
        at_least: whether the figure must reach the bound, or stay below it.
        must: required of a release; otherwise an aim.
        direction: only entries of this direction, if given.
    """

    what: str
    suites: tuple[str, ...]
    bound: Callable[[dict], float | None]
    measure: Callable
    rival: str | None = None
    at_least: bool = True
    must: bool = True
    direction: str | None = None


def _always(value):
    return lambda sizes: value


def _peak(ours, rival, rates):
    return of_peak(ours, rates)


def _microseconds(ours, rival, rates):
    return seconds(ours) * 1e6


def _speedup(ours, rival, rates):
    return seconds(rival) / seconds(ours)


def _memory(ours, rival, rates):
    return ours["held_bytes"] / rival["held_bytes"]


def _dense_share(sizes):
    return 0.85 if sizes["t"] >= 16384 else 0.70


def _triton_dense_share(sizes):
    return 0.75 if sizes["t"] >= 16384 else None


def _over_transformers(sizes):
    return 1.3 if sizes["h"] <= 1024 else 1.1 if sizes["h"] <= 2048 else 1.0


_LAYER = ("moe_ffn",)
_TRAINING = "forward+backward"
_BANDWIDTH = ("permute", "unpermute", "activation", "merge", "dots")
_RIVALS = (LOOP, TORCH_GROUPED, TRANSFORMERS_GROUPED)

TARGETS = (
    Target("fraction of copy bandwidth", _BANDWIDTH, _always(0.85), _peak),
    Target("microseconds to route and sort", ("route_and_sort",), _always(40.0), _microseconds, at_least=False),
    Target("of the dense FFN at equal FLOPs", _LAYER, _dense_share, _speedup, DENSE, direction=_TRAINING),
    Target("times as fast as a cuBLAS loop", _LAYER, _always(1.0), _speedup, LOOP, direction=_TRAINING),
    Target("times as fast as torch's grouped_mm", _LAYER, _always(1.0), _speedup, TORCH_GROUPED, direction=_TRAINING),
    Target(
        "times as fast as transformers' grouped_mm",
        _LAYER,
        _over_transformers,
        _speedup,
        TRANSFORMERS_GROUPED,
        direction=_TRAINING,
    ),
    *(
        Target(f"activation memory over that of {r}", _LAYER, _always(1.0), _memory, r, False, direction=_TRAINING)
        for r in _RIVALS
    ),
    *(
        Target("fraction of cuBLAS at equal size", tuple(f"expert_gemm {p}" for p in pieces), bound, _speedup, MM,
               must=False)
        for pieces, bound in (
            (("up",), lambda sizes: 0.90 if sizes["h"] >= 2048 else 0.80),
            (("down",), _always(0.92)),
            (("dAct",), _always(0.80)),
            (("dX",), _always(0.90)),
            (("wgrad_up", "wgrad_down"), _always(0.87)),
        )
    ),
)  # fmt: skip


TRITON_TARGETS = (
    Target("fraction of copy bandwidth", _BANDWIDTH, _always(0.85), _peak),
    Target("of the dense FFN at equal FLOPs", _LAYER, _triton_dense_share, _speedup, DENSE, direction=_TRAINING),
    Target(
        "times as fast as transformers' grouped_mm",
        _LAYER,
        _always(1.0),
        _speedup,
        TRANSFORMERS_GROUPED,
        direction=_TRAINING,
    ),
)


def targets_of(record) -> tuple[Target, ...]:
    """What the kernels that served the run are held to; records of old do not name them."""
    return TRITON_TARGETS if record["about"].get("backend") == "triton" else TARGETS


class Verdict(NamedTuple):
    """A target at one case; `met` is None where something was not measured, and `why` says what."""

    target: Target
    case: tuple
    measured: float | None
    bound: float
    met: bool | None
    why: str


def verdicts(record) -> Iterator[Verdict]:
    """Every target at every case that the run has an entry for; one without a case where it has none at all."""
    run = Entries(record)
    for target in targets_of(record):
        found = False
        for ours in run.entries:
            wanted = ours["suite"] in target.suites and target.direction in (None, ours["direction"])
            bound = target.bound(ours["sizes"])
            if not wanted or ours["label"] != OURS or bound is None:
                continue
            found, case = True, run.case(ours)
            rival = None if target.rival is None else run.rival(ours, target.rival)
            why = _missing(ours, target.rival, rival)
            if why:
                yield Verdict(target, case, None, bound, None, why)
                continue
            figure = target.measure(ours, rival, run.rates)
            yield Verdict(target, case, figure, bound, figure >= bound if target.at_least else figure < bound, "")
        if not found:
            yield Verdict(target, ("/".join(target.suites),), None, float("nan"), None, "no such case in this run")


def _missing(ours, rival_label, rival):
    if ours["outcome"] != "measured":
        return f"{OURS}: {ours['outcome']}"
    if rival_label is None:
        return ""
    if rival is None:
        return f"{rival_label}: not in this run"
    return "" if rival["outcome"] == "measured" else f"{rival_label}: {rival['outcome']}"


def targets_table(record):
    """A line for each target at each case: measured, asked, met or not."""
    lines = ["targets (stated for an NVIDIA H200; aims are marked *)", ""]
    counts = {True: 0, False: 0, None: 0}
    last = None
    for verdict in verdicts(record):
        target = verdict.target
        counts[verdict.met] += 1
        if target is not last:
            lines += ["", f"{'' if target.must else '* '}{target.what}: {'at least' if target.at_least else 'below'}"]
            last = target
        sizes = dict(verdict.case[3]) if len(verdict.case) > 1 else None
        where = " ".join(verdict.case[:3]) + (f" [{_short(sizes)}]" if sizes else "")
        figure = "not measured" if verdict.measured is None else f"{verdict.measured:.3g}"
        answer = {True: "met", False: "NOT MET", None: verdict.why}[verdict.met]
        lines.append(f"  {where:76}{figure:>14}{verdict.bound:>7.3g}  {answer}")
    lines += ["", f"met {counts[True]}, not met {counts[False]}, not measured {counts[None]}"]
    return "\n".join(lines)


def _short(sizes):
    return f"T={sizes['t']} H={sizes['h']} I={sizes['i']} E={sizes['e']} K={sizes['k']} {sizes['routing']}"


def summary(record):
    """Counts and the misses, for a record that keeps no more."""
    found = list(verdicts(record))
    named = [v for v in found if v.met is False]
    return {
        "met": sum(v.met is True for v in found),
        "not_met": [
            {"what": v.target.what, "case": list(map(str, v.case[:3])) + [_short(dict(v.case[3]))],
             "measured": v.measured, "bound": v.bound, "must": v.target.must}
            for v in named
        ],
        "not_measured": sum(v.met is None for v in found),
    }  # fmt: skip
