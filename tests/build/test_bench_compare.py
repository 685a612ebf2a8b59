"""Two records beside each other: verdicts on made records, names that are looked up, and what a run leaves in files."""

import ast
import json
import shutil
import subprocess
import sys
import types

import pytest
from checkout import ROOT

from bench import compare, record, replay, report

SIZES = {"t": 512, "h": 64, "i": 128, "e": 8, "k": 2, "s": 1, "routing": "balanced"}


def entry(label, best, noise=0.01, suite="moe_ffn", **more):
    case = {"suite": suite, "direction": "forward", "dtype": "float32", "sizes": SIZES, "label": label}
    times = {"best": best, "median": 1.1 * best, "worst": 1.5 * best, "rounds": 6, "timing": "wall", "noise": noise}
    return case | {"bytes": 0, "flops": 10**9, "outcome": "measured", "compared": True} | times | more


def run_of(*entries, commit="a" * 40, **about):
    about = {"device": "cpu", "threads": 1, "backend": "compiled", "commit": commit, "versions": {"torch": "2"}} | about
    about |= {"rates": {"copy_bytes": 1e10, "mm_flops_float32": 1e11}, "load_average": [0.0], "allocator": {}}
    return {"about": about, "entries": list(entries)}


def word(a, b):
    (found,) = compare.verdicts(run_of(*a), run_of(*b))
    return found


@pytest.mark.parametrize(
    ("ours", "rivals", "noise", "expected"),
    [
        (0.80, (1.0, 1.0), 0.01, "faster"),
        (1.25, (1.0, 1.0), 0.01, "slower"),
        (1.01, (1.0, 1.0), 0.01, "equal within noise"),
        (0.80, (1.0, 1.0), 0.20, "cannot say: too noisy"),
        (2.00, (1.0, 1.0), 0.05, "slower"),  # noisy, and yet plain
        (2.70, (2.7, 2.7), 0.01, "equal within noise"),  # the machine, not the code
        (1.00, (2.7, 2.7), 0.01, "faster"),  # the machine was slow, and it was not
        (0.90, (0.7, 1.6), 0.01, "cannot say: too noisy"),  # what did not change went both ways
    ],
)
def test_verdicts(ours, rivals, noise, expected):
    before = [entry("ummrm", 1.0, noise), entry("x", 2.0, noise), entry("y", 3.0, noise)]
    after = [entry("ummrm", ours, noise), entry("x", 2.0 * rivals[0], noise), entry("y", 3.0 * rivals[1], noise)]
    assert word(before, after).word == expected


def test_what_was_not_measured_in_both_is_not_judged():
    alone, rival = entry("ummrm", 1.0), entry("x", 1.0)
    failed = alone | {"outcome": "out of memory"}
    assert word([alone, rival], [failed, rival]).word == "cannot say: not measured in B"
    assert word([failed], [failed]).word == "cannot say: not measured in A and B"
    assert word([alone], [alone, rival]).word == "cannot say: nothing ran beside it in both"
    (only,) = compare.verdicts(run_of(alone, rival), run_of())
    assert only.word == "cannot say: not measured in B" and only.ratio is None


def test_noise_of_records_that_measured_none_is_their_spread():
    old = {name: value for name, value in entry("ummrm", 1.0).items() if name != "noise"}
    assert compare.noise_of(old) == 0.5
    rival = entry("x", 1.0)
    assert word([old, rival], [old | {"best": 0.7}, rival]).word == "cannot say: too noisy"


def test_the_verdict_has_the_noise_that_was_measured():
    before = [entry("ummrm", 1.0, 0.02), entry("x", 1.0, 0.03)]
    after = [entry("ummrm", 0.9, 0.04), entry("x", 1.0, 0.01)]
    found = word(before, after)
    assert found.ratio == pytest.approx(0.9) and found.noise == pytest.approx(0.06 + 0.04)
    assert found.word == "faster"


def test_cases_are_compared_one_by_one_and_counted():
    a = run_of(entry("ummrm", 1.0), entry("x", 1.0), entry("ummrm", 1.0, suite="merge"), entry("x", 1.0, suite="merge"))
    b = run_of(
        *[entry("ummrm", 0.5), entry("x", 1.0), entry("ummrm", 1.0, suite="merge"), entry("x", 1.0, suite="merge")],
        commit="b" * 40,
        threads=2,
    )
    lines = compare.text(a, b).splitlines()
    assert "threads: 1 and 2" in lines and f"commit: {'a' * 40} and {'b' * 40}" in lines
    (moe,) = [line for line in lines if line.startswith("moe_ffn")]
    assert moe.split()[-3:] == ["0.500", "4.0", "faster"] and "T=512 H=64 I=128 E=8 K=2 S=1 balanced" in moe
    assert lines[-1] == "1 faster, 0 slower, 1 equal within noise, 0 cannot say"


def test_names_are_files_or_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "find", lambda name, find=compare.find: find(name, tmp_path))
    (tmp_path / "gpu").mkdir()
    numbers = run_of(entry("ummrm", 1.0), commit="cafe" * 10, device="gpu", threads=16)
    (tmp_path / "gpu" / "day.json").write_text(json.dumps({"stages": {"bench": {"numbers": numbers}}}))
    (tmp_path / "gpu" / "built.json").write_text(json.dumps({"stages": {"build": {}}}))
    for commit, threads in (("cafe" * 10, 1), ("beef" * 10, 1), ("beef" * 10, 2)):
        name = f"cpu-{threads}-{commit[:4]}.json"
        (tmp_path / name).write_text(json.dumps(run_of(entry("ummrm", 1.0), commit=commit, threads=threads)))
    a, b = compare.pair("cafe", "beef")  # the one setting that both have
    assert (a["about"]["threads"], b["about"]["threads"]) == (1, 1)
    a, b = compare.pair(tmp_path / "gpu" / "day.json", tmp_path / "cpu-2-beef.json")
    assert (a["about"]["threads"], b["about"]["threads"]) == (16, 2)
    with pytest.raises(ValueError, match="commits with a record in .*, got 'dead'; run `make bench`"):
        compare.pair("dead", "beef")
    with pytest.raises(ValueError, match="one and the same setting, got .*name the files instead"):
        compare.pair("beef", "beef")


def test_files_of_all_kinds_are_read(tmp_path):
    kept = run_of(entry("ummrm", 1.0))
    lines = tmp_path / "run.jsonl"
    recorder = record.Recorder(lines)
    for kind, content in (("about", kept["about"]), ("rounds", {"seconds": [1.0]}), ("entry", kept["entries"][0])):
        recorder.write(kind, content)
    assert record.load(lines) == kept
    old = {"group": "moe_ffn forward+backward torch.float32", "label": "ummrm", "dtype": "float32", "flops": 7}
    old |= {"shape": "T=512 H=64 S=1", "min": 1.0, "median": 2.0, "max": 3.0, "rounds": 5, "bytes": 0, "compared": True}
    (tmp_path / "old.json").write_text(json.dumps({"ummrm": kept["about"], "benchmarks": [old]}))
    (found,) = record.load(tmp_path / "old.json")["entries"]
    assert found["suite"] == "moe_ffn" and found["direction"] == "forward+backward" and found["best"] == 1.0
    assert found["sizes"] == {"t": 512, "h": 64, "s": 1} and found["worst"] == 3.0
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a record of the benchmarks"):
        record.load(tmp_path / "other.json")


def test_the_command(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(run_of(entry("ummrm", 1.0), entry("x", 1.0))))
    command = [sys.executable, "-m", "bench.compare"]
    done = subprocess.run([*command, path, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("0 faster, 0 slower, 1 equal within noise, 0 cannot say\n")
    done = subprocess.run([*command, path, "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "got 'nowhere'" in done.stderr


def test_a_bare_machine_can_run_the_benchmarks():
    """`make gpu-wheels` fetches no extras: only what draws and what merges by mergekit imports them, when it does."""
    for path in sorted((ROOT / "bench").glob("*.py")):
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {getattr(node, "module", None) or "", *(alias.name for alias in node.names)}
        heads = {name.split(".")[0] for name in found}
        assert path.name == "plots.py" or not heads & {"matplotlib", "mergekit", "plots", "lab"}, path.name


def test_what_a_run_leaves(tmp_path, monkeypatch, capsys):
    """The record, the table, three plots, and pytest-benchmark's file, which its own command compares."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # within which pytest-benchmark times nothing
    entries = [entry("ummrm", 1.0, held_bytes=5), entry("x", 1.5, 0.2, held_bytes=10), entry("y", 0.7, held_bytes=0)]
    kept = run_of(*entries, entry("late", 1.0) | {"outcome": "not run: time"})
    rounds = [e | {"seconds": [e["best"], 2 * e["best"], 1.1 * e["best"]]} for e in entries]
    options = types.SimpleNamespace(device="cpu", backend=None, threads=1)
    report.write(kept, rounds, options, tmp_path)
    (stem,) = [path.stem for path in tmp_path.glob("*.json")]
    storage = tmp_path / replay.STORAGE.name
    (first,) = storage.glob("*/0001_*.json")
    shutil.copy(first, first.with_name(f"0002_{stem}.json"))
    assert stem.startswith("cpu-1threads-") and stem.endswith("-" + "a" * 12)
    assert record.load(tmp_path / f"{stem}.json") == kept
    assert "1.50" in (tmp_path / f"{stem}.txt").read_text()
    for plot in ("ratios", "roofline", "memory"):
        assert (tmp_path / f"{stem}-{plot}.png").read_bytes().startswith(b"\x89PNG")
    command = [sys.executable, "-m", "pytest_benchmark", "--storage", f"file://{storage}", "compare"]
    # from elsewhere: in the checkout it would load the tests' configuration, which imports torch
    done = subprocess.run([*command, "--columns", "min,max,rounds"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2 tests" not in done.stdout, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("bench_rounds[")]
    assert len(lines) == 2 * 3 and {f"0001_{stem}"[:4], "0002"} == {line.split("(")[1][:4] for line in lines}
    (line,) = [line for line in lines if " x]" in line and "(0001" in line]
    assert "1,500.0000" in line and "3,000.0000" in line and line.split()[-1] == "3"
