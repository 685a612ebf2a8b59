"""The targets of the CUDA kernels, judged on entries made by hand, and the table of a CUDA record."""

import pytest
import torch
from checkout import ROOT

from bench import record, report, rivals, targets, workload


def entry(suite, label, median, direction="forward+backward", held=100, **sizes):
    layer = {"t": 16384, "h": 4096, "i": 14336, "e": 8, "k": 2, "s": 1, "routing": "balanced", **sizes}
    kind = {"suite": suite, "direction": direction, "dtype": "bfloat16", "sizes": layer, "label": label}
    return kind | {
        "bytes": 0 if suite == "moe_ffn" else 10**9,
        "flops": 10**12 if suite == "moe_ffn" else 0,
        "outcome": "measured",
        "timing": "events",
        "best": median / 2,
        "median": median,
        "held_bytes": held,
        "peak_bytes": held,
    }


def run_of(*entries, backend="compiled"):
    about = {"device": "none", "threads": 1, "load_average": [0.0], "commit": "c", "versions": {}, "allocator": {}}
    return {
        "about": about | {"backend": backend} | {"rates": {"copy_bytes": 4e12, "mm_flops_bfloat16": 8e14}},
        "entries": list(entries),
    }


def verdict(run, what, **sizes):
    wanted = set(sizes.items())
    (found,) = [
        v for v in targets.verdicts(run) if v.target.what == what and len(v.case) > 1 and wanted <= set(v.case[3])
    ]
    return found


def test_a_fraction_of_the_copy_bandwidth():
    for median, met in ((1e9 / 4e12 / 0.86, True), (1e9 / 4e12 / 0.84, False)):
        found = verdict(run_of(entry("permute", "ummrm", median, "forward")), "fraction of copy bandwidth")
        assert found.met is met and found.measured == pytest.approx(0.86 if met else 0.84) and found.bound == 0.85


def test_routing_in_microseconds():
    for median, met in ((39e-6, True), (41e-6, False)):
        run = run_of(entry("route_and_sort", "ummrm", median, "forward", t=65536))
        assert verdict(run, "microseconds to route and sort").met is met


@pytest.mark.parametrize(
    ("what", "rival", "sizes", "bound"),
    [
        ("of the dense FFN at equal FLOPs", record.DENSE, {"t": 16384}, 0.85),
        ("of the dense FFN at equal FLOPs", record.DENSE, {"t": 65536}, 0.85),
        ("of the dense FFN at equal FLOPs", record.DENSE, {"t": 4096}, 0.70),
        ("times as fast as a cuBLAS loop", record.LOOP, {}, 1.0),
        ("times as fast as torch's grouped_mm", record.TORCH_GROUPED, {}, 1.0),
        ("times as fast as transformers' grouped_mm", record.TRANSFORMERS_GROUPED, {"h": 896}, 1.3),
        ("times as fast as transformers' grouped_mm", record.TRANSFORMERS_GROUPED, {"h": 1024}, 1.3),
        ("times as fast as transformers' grouped_mm", record.TRANSFORMERS_GROUPED, {"h": 2048}, 1.1),
        ("times as fast as transformers' grouped_mm", record.TRANSFORMERS_GROUPED, {"h": 4096}, 1.0),
    ],
)
def test_the_layer_against_its_rivals(what, rival, sizes, bound):
    for share, met in ((bound + 0.01, True), (bound - 0.01, False)):
        run = run_of(entry("moe_ffn", "ummrm", 1.0, **sizes), entry("moe_ffn", rival, share, **sizes))
        found = verdict(run, what, **sizes)
        assert found.met is met and found.bound == bound and found.measured == pytest.approx(share)


def test_activation_memory_must_be_below_each_rival():
    for held, met in ((99, True), (100, False), (101, False)):
        run = run_of(entry("moe_ffn", "ummrm", 1.0, held=held), entry("moe_ffn", record.LOOP, 1.0))
        assert verdict(run, f"activation memory over that of {record.LOOP}").met is met


@pytest.mark.parametrize(
    ("what", "rival", "sizes", "bound"),
    [
        ("of the dense FFN at equal FLOPs", record.DENSE, {"t": 16384}, 0.75),
        ("of the dense FFN at equal FLOPs", record.DENSE, {"t": 65536}, 0.75),
        ("times as fast as transformers' grouped_mm", record.TRANSFORMERS_GROUPED, {"t": 4096, "h": 896}, 1.0),
    ],
)
def test_triton_has_targets_of_its_own(what, rival, sizes, bound):
    for share, met in ((bound + 0.01, True), (bound - 0.01, False)):
        entries = entry("moe_ffn", "ummrm", 1.0, **sizes), entry("moe_ffn", rival, share, **sizes)
        found = verdict(run_of(*entries, backend="triton"), what, **sizes)
        assert found.met is met and found.bound == bound
    short = entry("moe_ffn", "ummrm", 1.0, t=4096), entry("moe_ffn", record.DENSE, 0.1, t=4096)
    met = [v.target.what for v in targets.verdicts(run_of(*short, backend="triton")) if v.met is not None]
    assert met == []  # nothing is asked of a short batch beside the dense FFN


def test_what_was_not_measured_is_not_met():
    late = entry("moe_ffn", record.DENSE, 1.0) | {"outcome": "out of memory"}
    run = run_of(entry("moe_ffn", "ummrm", 1.0), late, entry("moe_ffn", record.DENSE, 0.1, t=4096))
    found = verdict(run, "of the dense FFN at equal FLOPs", t=16384)
    assert found.met is None and found.why == f"{record.DENSE}: out of memory"
    assert verdict(run, "times as fast as a cuBLAS loop").why == f"{record.LOOP}: not in this run"
    summary = targets.summary(run)
    assert summary["met"] == 0 and summary["not_met"] == [] and summary["not_measured"] >= len(targets.TARGETS)
    text = targets.targets_table(run)
    assert "out of memory" in text and "no such case in this run" in text


def test_every_target_has_a_case_on_cuda():
    """By name and size, so that a renamed suite or contender is found here and not on the day of a run."""
    on_cuda = workload.SIZES["cuda"]
    moe = on_cuda["moe_ffn"]
    assert {(w.h, w.i, w.e, w.k) for w in moe} == {
        (2048, 8192, 8, 2),
        (4096, 14336, 8, 2),
        (1024, 2816, 7, 5),
        (896, 4864, 7, 5),
    }
    assert {(w.t, w.routing) for w in moe} == {(t, r) for t in (4096, 16384, 65536) for r in ("balanced", "skewed")}
    assert len(moe) == len(set(moe)) == 24
    for name in ("permute", "unpermute", "activation", "merge"):
        (w,) = on_cuda[name]
        assert (w.t, w.h, w.i, w.e, w.k) == (16384, 4096, 14336, 8, 2)
    assert [w.t for w in on_cuda["route_and_sort"]] == [65536] * 3 and {w.e for w in on_cuda["route"]} == {7, 8, 16}
    labels = set(rivals.layers(workload.Layer(8, 8, 8, 2, 1), torch.float32, torch.device("cpu"), None))
    assert {t.rival for t in targets.TARGETS + targets.TRITON_TARGETS if t.suites == ("moe_ffn",)} <= labels
    source = "".join(path.read_text() for path in sorted((ROOT / "bench").glob("bench_*.py")))
    for target in targets.TARGETS + targets.TRITON_TARGETS:
        for suite in target.suites:
            assert f'Case("{suite.split()[0]}' in source or 'Case(f"expert_gemm {piece}"' in source, suite


def test_report_of_a_cuda_record():
    late = entry("moe_ffn", record.LOOP, 1.0) | {"outcome": "not run: time"}
    full = entry("moe_ffn", record.TORCH_GROUPED, 1.0) | {"outcome": "out of memory"}
    dense = entry("moe_ffn", record.DENSE, 0.004, held=2**20)
    text = report.text(run_of(entry("moe_ffn", "ummrm", 0.005, held=2**21), dense, late, full))
    assert "1 contenders not run: time" in text and "out of memory" in text
    (line,) = [line for line in text.splitlines() if line.startswith("  dense FFN, equal FLOPs  ")]
    assert line.split()[4:] == ["2.000", "4.000", "0.80", "0.31", "1.0", "1.0"]  # of the noise this record says nothing
    assert "NOT MET" in text and "stated for an NVIDIA H200" in text
