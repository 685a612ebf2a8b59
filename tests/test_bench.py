"""The benchmark harness, without a GPU: rotation, rounds, events, memory, deadline, records, targets, one real run."""

import json
import subprocess
import sys

import pytest
import torch
from bench_path import ROOT

from bench import harness, record, report, rivals, targets, timing, workload

SMALL = workload.Layer(32, 16, 24, 4, 2)
CPU = torch.device("cpu")


def test_sets_pass_the_cache_three_times():
    cache = 60 << 20
    for size in (1, 1 << 20, 20 << 20, 59 << 20, 61 << 20, 179 << 20):
        count = timing.sets_needed(size, cache)
        assert count * size >= 3 * cache > (count - 1) * size
    assert timing.sets_needed(180 << 20, cache) == timing.sets_needed(1 << 40, cache) == 1
    assert timing.sets_needed(5, 0) == timing.sets_needed(0, 0) == 1


def test_bytes_of_arguments_count_shared_memory_once():
    a = torch.randn(4, 8)
    assert timing.tensor_bytes({"a": a, "views": [a[1], a.T], "b": torch.randn(2), "k": 3, "none": None}) == 128 + 8
    assert timing.tensor_bytes([]) == 0


def test_rounds_follow_the_budget():
    assert timing.rounds_for(1e-6) == 100 and timing.rounds_for(10.0) == 7 and timing.rounds_for(0.02, budget=0.4) == 20
    assert timing.rounds_for(0.0) == 100


class FakeEvents:
    """Events on a clock that the timed calls move."""

    def __init__(self):
        self.now, self.synchronized = 0.0, False

    def __call__(self):
        events = self

        class Event:
            def record(self):
                self.at = events.now

            def elapsed_time(self, other):
                assert events.synchronized, "read before the device was waited for"
                return (other.at - self.at) * 1e3

        return Event()

    def synchronize(self):
        self.synchronized = True


def test_rounds_rotate_and_are_timed_one_by_one():
    events, seen = FakeEvents(), []

    def call(index, seconds):
        def run():
            seen.append(index)
            events.now += seconds

        return run

    times = timing.time_rounds([call(0, 1.0), call(1, 2.0), call(2, 4.0)], 7, events, events.synchronize)
    assert seen == [0, 1, 2, 0, 1, 2, 0] and times == pytest.approx([1, 2, 4, 1, 2, 4, 1])
    assert timing.summary(times) == {"best": 1, "median": 2, "worst": 4, "rounds": 7}


class FakeMeter:
    """An allocator whose contents the test moves by hand."""

    def __init__(self, allocated):
        self.level = self.top = allocated
        self.settled = False

    def add(self, size):
        self.level += size
        self.top = max(self.top, self.level)

    def settle(self):
        self.settled = True

    def allocated(self):
        return self.level

    def reset_peak(self):
        self.top = self.level

    def peak(self):
        return self.top


def test_held_memory_is_what_lies_between_forward_and_backward():
    meter = FakeMeter(1000)

    def forward():
        meter.add(700)  # 300 are freed again
        meter.add(-300)
        out = [torch.randn(10)]
        meter.add(40)
        return out

    def backward(out):
        meter.add(500)
        return []

    memory = timing.measure_memory(forward, backward, meter)
    assert memory == {"held_bytes": 400, "peak_bytes": 940} and meter.settled


def test_deadline():
    now = [5.0]
    deadline = timing.Deadline(3, lambda: now[0])
    assert not deadline.passed()
    now[0] = 8.0
    assert deadline.passed() and not timing.Deadline(None).passed()


class Skipped(Exception):
    pass


class FakeBenchmark:
    """pytest-benchmark's pedantic, with rounds that took what the test says."""

    def __init__(self):
        self.stats = self
        self.data = [0.25, 0.5, 0.125]

    def pedantic(self, call, rounds, warmup_rounds):
        call()


def skip(reason):
    raise Skipped(reason)


def contest(recorder, deadline=None):
    return harness.Contest(CPU, recorder, timing.Deadline(deadline), FakeBenchmark, skip)


def double(x):
    return x * 2


def make():
    return {"x": torch.randn(3, 4, requires_grad=True)}


CASE = harness.Case("double", SMALL, torch.float32, "forward+backward", bytes=100)


def test_a_contender_is_compared_then_timed_and_recorded():
    recorder = record.Recorder()
    contest(recorder)(CASE, "ummrm", double, make, lambda x: x + x)
    (entry,) = recorder.entries
    assert entry["outcome"] == "measured" and entry["compared"] and entry["timing"] == "wall"
    assert entry["best"] == 0.125 and entry["median"] == 0.25 and entry["rounds"] == 3
    assert entry["sizes"] == {"t": 32, "h": 16, "i": 24, "e": 4, "k": 2, "s": 1, "routing": "balanced"}
    json.dumps(entry)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * 2.001,  # another output
        lambda x: (x * 2).detach() + 0 * x,  # the output, and another gradient
        lambda x: [x * 2, x],  # one too many
    ],
)
def test_a_contender_that_computes_something_else_is_not_timed(wrong):
    recorder = record.Recorder()
    with pytest.raises((AssertionError, ValueError)):
        contest(recorder)(CASE, "wrong", wrong, make, double)
    (entry,) = recorder.entries
    assert entry["outcome"].startswith("failed: ") and "median" not in entry


def test_indices_are_compared_exactly_and_nan_never_passes():
    same = torch.tensor([1, 2])
    harness.assert_same("x", [same.int()], [same], torch.float32)
    with pytest.raises(AssertionError):
        harness.assert_same("x", [same + 1], [same], torch.float32)
    with pytest.raises(AssertionError):
        harness.assert_same("x", [torch.tensor([1.0, float("nan")])], [torch.ones(2)], torch.bfloat16)


def test_out_of_memory_and_the_deadline_are_outcomes():
    recorder = record.Recorder()

    def hungry(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Skipped, match="out of memory"):
        patch.setattr(timing.CudaMeter, "settle", lambda self: None)
        contest(recorder)(CASE, "hungry", hungry, make)
    with pytest.raises(Skipped, match="not run: time"):
        contest(recorder, deadline=-1)(CASE, "late", double, lambda: pytest.fail("inputs were made"))
    assert [e["outcome"] for e in recorder.entries] == ["out of memory", "not run: time"]


def test_a_dtype_without_native_products_is_not_timed(monkeypatch):
    monkeypatch.setattr(harness, "machine_rates", lambda d: {"mm_flops_float32": 1e9, "mm_flops_bfloat16": 1e7})
    recorder, case = record.Recorder(), harness.Case("gemm", SMALL, torch.bfloat16, flops=10)
    with pytest.raises(Skipped, match=r"bfloat16 reaches 0\.0 GFLOP/s"):
        contest(recorder)(case, "ummrm", double, make)
    assert recorder.entries[0]["outcome"].startswith("not run: torch.mm in bfloat16")


def test_output_gradients_are_the_same_for_all_and_random():
    first, second = (harness.Call(double, make(), True) for _ in range(2))
    for call in (first, second):
        call()
    assert torch.equal(first._grads[0], second._grads[0]) and first._grads[0].std() > 0.3


def test_a_record_survives_a_cut(tmp_path):
    path = tmp_path / "run.jsonl"
    recorder = record.Recorder(path)
    recorder.write("about", {"device": "a"})
    recorder.write("entry", {"n": 1})
    recorder.write("entry", {"n": 2})
    path.write_text(path.read_text() + '{"entry": {"n"')
    assert record.read_record(path) == {"about": {"device": "a"}, "entries": [{"n": 1}, {"n": 2}]}


# Targets, on entries made by hand.


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


def run_of(*entries):
    about = {"device": "none", "threads": 1, "load_average": [0.0], "commit": "c", "versions": {}, "allocator": {}}
    return {"about": about | {"rates": {"copy_bytes": 4e12, "mm_flops_bfloat16": 8e14}}, "entries": list(entries)}


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
    labels = set(rivals.contenders("cuda"))
    assert {t.rival for t in targets.TARGETS if t.suites == ("moe_ffn",)} <= labels
    source = "".join(path.read_text() for path in sorted((ROOT / "bench").glob("bench_*.py")))
    for target in targets.TARGETS:
        for suite in target.suites:
            assert f'Case("{suite.split()[0]}' in source or 'Case(f"expert_gemm {piece}"' in source, suite


def test_the_most_important_cases_come_first():
    layers = workload.SIZES["cuda"]["moe_ffn"]
    cases = [
        ("moe_ffn", {"layer": w, "direction": d}) for w in reversed(layers) for d in ("forward", "forward+backward")
    ]
    cases += [("projection", {}), ("permute", {}), ("route_and_sort", {}), ("sort_slots", {})]
    ordered = sorted(cases, key=lambda case: workload.importance(*case))
    assert {name for name, _ in ordered[:2]} == {"permute", "route_and_sort"}
    assert ordered[2] == ("moe_ffn", {"layer": layers[0], "direction": "forward+backward"})
    assert {name for name, _ in ordered[-2:]} == {"projection", "sort_slots"}


def test_routing_of_the_workloads():
    """Skewed: the first expert has several times the last's share, none is empty; no two logits of a token are near."""
    for routing, low, high in (("balanced", 0.8, 1.25), ("skewed", 3, 200)):
        for e, k in ((8, 2), (7, 5)):
            layer = workload.Layer(4096, 8, 8, e, k, 1, routing)
            logits = workload.router_logits(layer, CPU)
            counts = rivals.route(logits, k)[3]
            ratio = counts[0] / counts[-1]
            assert (low if k < 5 else min(low, 1.5)) < ratio < high and counts.min() > 0
            assert logits.sort(-1).values.diff().min() >= 2**-15


def test_the_dense_ffn_has_the_layers_flops():
    inputs = rivals.equal_flops_inputs(SMALL, torch.float32, CPU)
    dense = 2 * SMALL.t * (inputs["up"].numel() + inputs["down"].numel())
    assert dense == 6 * SMALL.rows * SMALL.h * SMALL.i
    assert rivals.equal_flops_ffn(**inputs).shape == (SMALL.t, SMALL.h)


@pytest.mark.parametrize("label", [*rivals.LAYERS])
@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_the_layers_rivals_compute_what_it_does(label, routing):
    """Outputs and every gradient, with the same weights and inputs, as before each timing."""
    from ummrm import ops

    layer = workload.Layer(48, 16, 24, 5, 3, 2, routing)
    arguments = workload.layer_inputs(layer, torch.float32, CPU)
    want = harness.Call(ops.moe_ffn, arguments, True).results()
    got = harness.Call(rivals.LAYERS[label], arguments, True).results()
    harness.assert_same(label, got, want, torch.float32)


def test_report_of_a_cuda_record():
    late = entry("moe_ffn", record.LOOP, 1.0) | {"outcome": "not run: time"}
    full = entry("moe_ffn", record.TORCH_GROUPED, 1.0) | {"outcome": "out of memory"}
    dense = entry("moe_ffn", record.DENSE, 0.004, held=2**20)
    text = report.text(run_of(entry("moe_ffn", "ummrm", 0.005, held=2**21), dense, late, full))
    assert "1 contenders not run: time" in text and "out of memory" in text
    (line,) = [line for line in text.splitlines() if line.startswith("  dense FFN, equal FLOPs  ")]
    assert line.split()[4:] == ["2.000", "4.000", "0.80", "0.31", "1.0", "1.0"]
    assert "NOT MET" in text and "stated for an NVIDIA H200" in text


def test_a_real_run_on_the_cpu(tmp_path):
    """The command itself: a record line by line, the table, and no verdict on targets that are not the CPU's."""
    output = tmp_path / "run.jsonl"
    arguments = ["--threads=1", "-k", "sort_slots", f"--record={output}"]
    program = f"import runpy, sys; sys.path.append({str(ROOT)!r}); sys.argv[1:] = {arguments!r}; "
    program += "runpy.run_module('bench.report', run_name='__main__')"
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = record.read_record(output)
    assert {(e["suite"], e["label"], e["outcome"]) for e in kept["entries"]} == {
        (suite, label, "measured") for suite, label in (("sort_slots", "ummrm"), ("sort_slots", "torch sort"))
    }
    assert kept["about"]["rates"]["copy_bytes"] > 0
    assert "over ummrm" in done.stdout and "targets" not in done.stdout
