"""The benchmark harness, without a GPU: rotation, rounds, events, memory, deadline, records, and a real run."""

import contextlib
import time
import types

import checkout  # noqa: F401  (for `bench`)
import pytest
import torch

from bench import harness, record, replay, report, rivals, targets, timing, workload
from bench.contender import Contender

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


def skip(reason):
    raise Skipped(reason)


def contest(recorder, deadline=None):
    return harness.Contest(CPU, recorder, timing.Deadline(deadline), skip)


def double(x):
    return x * 2


def make():
    return {"x": torch.randn(3, 4, requires_grad=True)}


CASE = harness.Case("double", SMALL, torch.float32, "forward+backward", bytes=100)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    """And rates of a machine without its large tensors."""
    monkeypatch.setattr(harness, "BUDGET", 0.0)
    monkeypatch.setattr(harness, "_ceiling", lambda name, device: (8, lambda: None))
    rates = harness.machine_rates
    rates.cache_clear()
    yield
    rates.cache_clear()


def test_contenders_are_compared_then_timed_together_and_recorded(tmp_path):
    recorder, order = record.Recorder(tmp_path / "run.jsonl"), []

    def noted(label, function):
        return lambda x: order.append(label) or function(x)

    contenders = {
        "ummrm": noted("a", double),
        "sum": noted("b", lambda x: x + x),
        "another": Contender(noted("c", lambda x: x * 3), make, bytes=7),
        "absent": "it is not installed",
    }
    contest(recorder)(CASE, contenders, make, double)
    entries = {entry["label"]: entry for entry in recorder.entries}
    assert [*entries] == [*contenders] and entries["absent"]["outcome"] == "not run: it is not installed"
    for label, compared in (("ummrm", True), ("sum", True), ("another", False)):
        entry = entries[label]
        assert entry["outcome"] == "measured" and entry["compared"] is compared and entry["timing"] == "wall"
        assert 0 < entry["best"] <= entry["median"] and entry["rounds"] == 6 and entry["beside"] == 2
        assert entry["noise"] >= 0 and entry["bytes"] == (7 if label == "another" else 100)
        assert entry["sizes"] == {"t": 32, "h": 16, "i": 24, "e": 4, "k": 2, "s": 1, "routing": "balanced"}
    # what warms up, then six turns, each of which another one begins, the copy too that the bytes are held against
    assert "".join(order).endswith("aabbcc" + "abc" + "bca" + "cab" + "abc" + "abc" + "bca")
    assert set(entries["ummrm"]["rates"]) == {"copy_bytes"} and targets.of_peak(entries["ummrm"], {}) > 0
    assert record.read_record(tmp_path / "run.jsonl")["entries"] == recorder.entries
    rounds = replay.read_rounds(tmp_path / "run.jsonl")
    assert [len(one["seconds"]) for one in rounds] == [6] * 3


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
        contest(recorder)(CASE, {"wrong": wrong, "right": double}, make, double)
    entry, right = recorder.entries
    assert entry["outcome"].startswith("failed: ") and "median" not in entry and right["outcome"] == "measured"
    recorder = record.Recorder()
    contest(recorder)(CASE, {"theirs": Contender(wrong, foreign=True), "right": double}, make, double)
    assert recorder.entries[0]["outcome"].startswith("not run: ") and recorder.entries[1]["outcome"] == "measured"


def test_indices_are_compared_exactly_and_nan_never_passes():
    same = torch.tensor([1, 2])
    harness.assert_same([same.int()], [same], torch.float32)
    with pytest.raises(AssertionError):
        harness.assert_same([same + 1], [same], torch.float32)
    with pytest.raises(AssertionError):
        harness.assert_same([torch.tensor([1.0, float("nan")])], [torch.ones(2)], torch.bfloat16)


def test_out_of_memory_and_the_deadline_are_outcomes():
    recorder = record.Recorder()

    def hungry(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Skipped, match="out of memory"):
        patch.setattr(timing.CudaMeter, "settle", lambda self: None)
        contest(recorder)(CASE, {"hungry": hungry}, make)
    with pytest.raises(Skipped, match="not run: time"):
        contest(recorder, deadline=-1)(CASE, {"late": double}, lambda: pytest.fail("inputs were made"))
    assert [e["outcome"] for e in recorder.entries] == ["out of memory", "not run: time"]


def test_a_reference_without_memory_is_said_and_does_not_stop_the_contender(monkeypatch):
    def hungry(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing.CudaMeter, "settle", lambda self: None)
    recorder = record.Recorder()
    contest(recorder)(CASE, {"ummrm": double}, make, hungry)
    (entry,) = recorder.entries
    assert entry["outcome"] == "measured" and entry["compared"] is False


def test_a_dtype_without_native_products_is_not_timed(monkeypatch):
    monkeypatch.setattr(harness, "machine_rates", lambda d: {"mm_flops_float32": 1e9, "mm_flops_bfloat16": 1e7})
    recorder, case = record.Recorder(), harness.Case("gemm", SMALL, torch.bfloat16, flops=10)
    with pytest.raises(Skipped, match=r"bfloat16 reaches 0\.0 GFLOP/s"):
        contest(recorder)(case, {"ummrm": double}, make)
    assert recorder.entries[0]["outcome"].startswith("not run: torch.mm in bfloat16")


class FakeCuda:
    """As much of torch.cuda as the harness uses, on the host's clock: what it does with a device, without one."""

    def __init__(self, monkeypatch):
        self.replays, self.captured, self.sleeps = 0, 0, 0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = time.perf_counter()

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        class Graph:
            def replay(self):
                fake.replays += 1

        class Stream:
            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def capture(graph):
            fake.captured += 1
            yield

        def sleep(cycles):
            fake.sleeps += 1

        stand_ins = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": contextlib.nullcontext,
            "graph": capture,
            "_sleep": sleep,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "memory_allocated": lambda: 4096,
            "max_memory_allocated": lambda: 8192,
            "reset_peak_memory_stats": lambda: None,
            "get_device_properties": lambda d: types.SimpleNamespace(L2_cache_size=640, name="none", total_memory=1),
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.parametrize("graph", [False, True], ids=["events", "graph"])
def test_what_is_done_on_cuda(monkeypatch, graph):
    """Inputs are rotated, memory is measured, and times are those of events or of a replayed graph's share."""
    cuda, recorder, made, seen = FakeCuda(monkeypatch), record.Recorder(), [], set()

    def make():
        made.append(torch.randn(8, 8))
        return {"x": made[-1]}

    def triple(x):
        seen.add(x.data_ptr())
        return x * 3

    on_cuda = harness.Contest(types.SimpleNamespace(type="cuda"), recorder, timing.Deadline(), skip)
    contenders = {"ummrm": Contender(triple, graph=graph), "other": lambda x: x * 3}
    on_cuda(harness.Case("triple", SMALL, torch.float32, bytes=512), contenders, make, triple)
    entry, other = recorder.entries
    assert entry["input_sets"] == 8 and len(made) == 8 + 2  # 256 bytes each, past 3 * 640; one each to compare
    assert len(seen) == 8 + 2 and not torch.equal(made[2], made[3])
    assert cuda.sleeps == 2 * (1 + 3) and other["timing"] == "events" and entry["beside"] == other["beside"] == 1
    assert entry["timing"] == ("graph" if graph else "events") and entry["rounds"] == 102 and entry["noise"] > 0
    assert entry["peak_bytes"] == 4096 and entry["held_bytes"] == -256 and 0 < entry["best"] <= entry["median"]
    assert (cuda.captured, cuda.replays > 100) == ((1, True) if graph else (0, False))


def test_output_gradients_are_the_same_for_all_and_random():
    first, second = (harness.Call(double, make(), True) for _ in range(2))
    for call in (first, second):
        call()
    assert torch.equal(first._grads[0], second._grads[0]) and first._grads[0].std() > 0.3


def test_the_commit_is_unknown_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert harness._commit() == "unknown"


def test_a_record_survives_a_cut(tmp_path):
    path = tmp_path / "run.jsonl"
    recorder = record.Recorder(path)
    recorder.write("about", {"device": "a"})
    recorder.write("entry", {"n": 1})
    recorder.write("entry", {"n": 2})
    path.write_text(path.read_text() + '{"entry": {"n"')
    assert record.read_record(path) == {"about": {"device": "a"}, "entries": [{"n": 1}, {"n": 2}]}


def test_the_most_important_cases_come_first():
    layers = workload.SIZES["cuda"]["moe_ffn"]
    cases = [
        ("moe_ffn", {"layer": w, "direction": d}) for w in reversed(layers) for d in ("forward", "forward+backward")
    ]
    cases += [("projection", {}), ("permute", {}), ("route_and_sort", {}), ("sort_slots", {})]
    ordered = sorted(cases, key=lambda case: workload.importance(*case, "cuda"))
    assert {name for name, _ in ordered[:2]} == {"permute", "route_and_sort"}
    assert ordered[2] == ("moe_ffn", {"layer": layers[0], "direction": "forward+backward"})
    names = [name for name, _ in ordered]
    single, telling = {names.index("projection"), names.index("sort_slots")}, 2 * workload._TELLING
    assert single == {2 + telling, 3 + telling}
    assert {case["layer"] for _, case in ordered[2 : 2 + telling]} == set(layers[: workload._TELLING])


def test_on_a_cpu_the_layers_large_sizes_come_last():
    layers = workload.SIZES["cpu"]["moe_ffn"]
    cases = [
        ("moe_ffn", {"layer": w, "direction": d, "dtype": t})
        for t in (torch.bfloat16, torch.float32)
        for w in reversed(layers)
        for d in ("forward", "forward+backward")
    ]
    cases += [("merge", {"layer": SMALL}), ("sort_slots", {"layer": SMALL})]
    ordered = sorted(cases, key=lambda case: workload.importance(*case, "cpu"))
    assert [case["layer"] for _, case in ordered[:3]] == layers[:3]
    assert {(case["direction"], case["dtype"]) for _, case in ordered[:3]} == {("forward+backward", torch.float32)}
    assert {name for name, _ in ordered[3:5]} == {"merge", "sort_slots"}
    assert {case["layer"] for _, case in ordered[-8:]} == set(layers[3:])


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


def test_a_real_run_on_the_cpu(tmp_path, capsys, monkeypatch):
    """A record line by line, the table, and no verdict on targets that are not the CPU's."""
    import ummrm

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # within which pytest-benchmark times nothing
    output = tmp_path / "run.jsonl"
    threads = torch.get_num_threads()
    kept, code = report.run("cpu", threads, "sort_slots", deadline=200, record=output, backend="reference")
    ummrm.use_backend("compiled")  # pytest ran in this process
    assert code == 0, capsys.readouterr().out
    assert kept == record.read_record(output)
    found = [(e["suite"], e["label"], e["outcome"]) for e in kept["entries"]]
    assert found == [("sort_slots", label, "measured") for label in ("ummrm", "torch sort")]
    assert kept["about"]["backend"] == "reference" and "reference kernels" in report.text(kept)
    assert kept["about"]["rates"]["copy_bytes"] > 0 and kept["about"]["threads"] == threads
    text = report.text(kept)
    assert "over ummrm" in text and "targets" not in text


def test_a_run_past_its_deadline_records_what_is_left(tmp_path, capsys):
    kept, code = report.run("cpu", torch.get_num_threads(), "sort_slots", deadline=0)
    assert code == 0 and [e["outcome"] for e in kept["entries"]] == ["not run: time"] * 2
    assert "2 contenders not run: time" in report.text(kept)
