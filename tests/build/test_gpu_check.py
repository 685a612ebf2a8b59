"""The GPU check without a GPU: what its hash covers, how records merge and age, and how stages fail, hang and die."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
from checkout import ROOT

from bench import gpu_check, gpu_record, gpu_runner, gpu_status
from bench.gpu_runner import Stage, StageFailed

PYTHON = sys.executable


@pytest.fixture
def sources(tmp_path):
    """A small tree with every kind of source, and things beside it that no result depends on."""
    root = tmp_path / "tree"
    files = {
        "kernels/cuda/a.cu": "a",
        "kernels/include/ummrm/a.h": "h",
        "csrc/a.cpp": "c",
        "third_party/README.md": "t",
        "CMakeLists.txt": "m",
        "setup.py": "s",
        "ummrm/ops/library.py": "l",
        "ummrm/ops/autograd.py": "g",
        "ummrm/ops/backends.py": "b",
        "ummrm/merge.py": "other",
        "README.md": "other",
        "tests/gpu/test_a.py": "other",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_every_named_source_exists():
    assert [name for name in gpu_record.SOURCES if not (ROOT / name).exists()] == []
    assert len(gpu_record.source_files()) > 40 and len(gpu_record.source_hash()) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "kernels/cuda/a.cu").write_text("b"),
        lambda root: (root / "csrc/b.cpp").write_text(""),
        lambda root: (root / "kernels/include/ummrm/new.h").write_text("new"),
        lambda root: (root / "csrc/a.cpp").rename(root / "csrc/b.cpp"),
        lambda root: (root / "csrc/a.cpp").rename(root / "kernels/a.cpp"),
        lambda root: (root / "third_party/README.md").unlink(),
        lambda root: (root / "CMakeLists.txt").write_text("mm"),
        lambda root: (root / "setup.py").write_text(""),
        lambda root: (root / "ummrm/ops/library.py").write_text("x"),
        lambda root: (root / "ummrm/ops/autograd.py").write_text("x"),
        lambda root: (root / "ummrm/ops/backends.py").write_text("x"),
        lambda root: shutil.rmtree(root / "kernels/cuda"),
    ],
)
def test_the_hash_changes_with_content_names_and_files(sources, change):
    before = gpu_record.source_hash(sources)
    assert gpu_record.source_hash(sources) == before
    change(sources)
    assert gpu_record.source_hash(sources) != before


def test_the_hash_does_not_change_with_what_no_result_depends_on(sources):
    before = gpu_record.source_hash(sources)
    for name in ("README.md", "ummrm/merge.py", "tests/gpu/test_a.py", "ummrm/new.py", "bench.py"):
        (sources / name).write_text("changed")
    (sources / "csrc/__pycache__").mkdir()
    (sources / "csrc/__pycache__/a.pyc").write_text("made")
    os.utime(sources / "csrc/a.cpp", (1, 1))
    (sources / "csrc/empty").mkdir()
    assert gpu_record.source_hash(sources) == before


def test_contents_do_not_run_into_names(sources):
    """Moving bytes from one file's end to the next one's start is a change."""
    (sources / "csrc/a.cpp").write_text("xy")
    (sources / "csrc/b.cpp").write_text("z")
    before = gpu_record.source_hash(sources)
    (sources / "csrc/a.cpp").write_text("x")
    (sources / "csrc/b.cpp").write_text("yz")
    assert gpu_record.source_hash(sources) != before


FACTS = {"device": "NVIDIA H200", "driver": "1", "sources": "a" * 64, "versions": {"torch": "2"}}
OTHER = FACTS | {"sources": "b" * 64}


def result(outcome="passed", started="2026-11-21T10:00:00+00:00", **more):
    return {"outcome": outcome, "started": started, "commit": "c", "dirty": False, **more}


def test_stages_merge_into_one_file_a_day(tmp_path):
    first = gpu_record.save_stage(tmp_path, FACTS, "test", result(counts={"passed": 3}))
    assert first == tmp_path / "nvidia-h200" / "2026-11-21.json"
    assert gpu_record.save_stage(tmp_path, FACTS, "build", result()) == first
    again = gpu_record.save_stage(tmp_path, FACTS, "test", result("failed", "2026-11-21T12:00:00+00:00"))
    kept = gpu_record.read(first)
    assert again == first and list(kept["stages"]) == ["build", "test"]  # in the check's order
    assert kept["stages"]["test"]["outcome"] == "failed" and "counts" not in kept["stages"]["test"]
    assert kept["stages"]["build"] == result() and kept["device"] == "NVIDIA H200" and kept["sources"] == "a" * 64
    assert (
        gpu_record.save_stage(tmp_path, FACTS, "test", result(started="2026-11-22T00:00:00")).name == "2026-11-22.json"
    )
    assert sorted(p.name for p in first.parent.iterdir()) == ["2026-11-21.json", "2026-11-22.json"]


def test_other_sources_of_the_day_get_a_file_of_their_own(tmp_path):
    first = gpu_record.save_stage(tmp_path, FACTS, "test", result())
    second = gpu_record.save_stage(tmp_path, OTHER, "test", result("failed"))
    assert second.name == f"2026-11-21-{'b' * 12}.json"
    assert gpu_record.save_stage(tmp_path, OTHER, "bench", result()) == second
    assert gpu_record.save_stage(tmp_path, FACTS, "bench", result()) == first
    assert list(gpu_record.read(second)["stages"]) == ["test", "bench"]
    assert gpu_record.read(first)["stages"]["test"]["outcome"] == "passed"


def test_records_from_elsewhere_are_adopted(tmp_path):
    """Each run of one stage on a bare machine leaves a file; together they are one record. The newer result stays."""
    files = []
    for name, started in (("build", "09"), ("test", "10"), ("bench", "11")):
        folder = tmp_path / name
        files.append(gpu_record.save_stage(folder, FACTS, name, result(started=f"2026-11-21T{started}:00:00")))
    home = tmp_path / "home"
    gpu_record.save_stage(home, FACTS, "test", result("failed", "2026-11-21T12:00:00"))
    paths = {gpu_record.adopt(path, home) for path in files}
    (path,) = paths
    stages = gpu_record.read(path)["stages"]
    assert {name: stage["outcome"] for name, stage in stages.items()} == {
        "build": "passed",
        "test": "failed",
        "bench": "passed",
    }


def test_a_write_that_fails_leaves_the_old_record(tmp_path):
    path = gpu_record.save_stage(tmp_path, FACTS, "test", result())
    before = path.read_text()
    with pytest.raises(TypeError):
        gpu_record.save_stage(tmp_path, FACTS, "build", result(numbers=object()))
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"format": 0, "stages": {}, "sources": "a"}', '{"format": 1}']
)
def test_a_file_that_is_no_record_is_one_clear_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="must be a record of the GPU check in format 1; run the check again"):
        gpu_record.read(path)


def test_names_of_folders():
    assert gpu_record.slug("NVIDIA H200") == "nvidia-h200"
    assert gpu_record.slug("NVIDIA A100-SXM4-80GB / x") == "nvidia-a100-sxm4-80gb-x"
    assert gpu_record.slug("../..") == "unknown"


def lines_of(results, root):
    good, lines = gpu_status.status(results, root)
    return good, {line.split()[0]: line for line in lines if line.split()[0] in gpu_record.STAGES}


def test_status_fresh_stale_failed_and_never(tmp_path, sources, capsys):
    results = tmp_path / "results"
    good, lines = lines_of(results, sources)
    assert not good and set(lines) == set(gpu_record.STAGES) and all("never checked" in v for v in lines.values())
    facts = FACTS | {"sources": gpu_record.source_hash(sources)}
    for name in gpu_record.STAGES:
        assert not gpu_status.status(results, sources)[0]
        gpu_record.save_stage(results, facts, name, result(started="2026-11-21T10:00:00"))
    good, lines = lines_of(results, sources)
    assert good and all("passed, 2026-11-21, today's sources" in line for line in lines.values())
    # another day, only the tests again, and they fail
    gpu_record.save_stage(results, facts, "test", result("failed: x", "2026-11-22T10:00:00"))
    good, lines = lines_of(results, sources)
    assert not good and "failed: x, 2026-11-22" in lines["test"] and "passed" in lines["bench"]
    gpu_record.save_stage(results, facts, "test", result(started="2026-11-23T10:00:00", dirty=True))
    good, lines = lines_of(results, sources)
    assert good and "changes that were not committed" in lines["test"]
    (sources / "csrc/a.cpp").write_text("edited")
    good, lines = lines_of(results, sources)
    assert not good and all("stale: passed on" in line for line in lines.values())
    assert gpu_status.main(["--results", str(tmp_path / "nothing")]) == 1
    assert len(capsys.readouterr().out.splitlines()) == len(gpu_record.STAGES)


def test_status_wants_every_stage_on_one_gpu(tmp_path, sources):
    facts = FACTS | {"sources": gpu_record.source_hash(sources)}
    for i, name in enumerate(gpu_record.STAGES):
        gpu_record.save_stage(tmp_path, facts | {"device": f"GPU {i % 2}"}, name, result())
    assert not gpu_status.status(tmp_path, sources)[0]
    for name in gpu_record.STAGES:
        gpu_record.save_stage(tmp_path, facts | {"device": "GPU 1"}, name, result())
    assert gpu_status.status(tmp_path, sources)[0]


def test_status_needs_no_torch():
    program = f"import sys; sys.modules['torch'] = None; sys.path.append({str(ROOT)!r})\n"
    program += "from bench import gpu_check, gpu_status; sys.exit(gpu_status.main())"
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True)
    assert done.returncode in (0, 1) and done.stderr == "" and "bench" in done.stdout


# Stages, with fake ones.


def passing(context):
    context.result["counts"]["passed"] = 2
    context.must([PYTHON, "-c", "print('hello')"], "fine")


def counting_then_failing(context):
    context.result["counts"]["passed"] = 1
    context.result["numbers"]["ms"] = 3.5
    context.must([PYTHON, "-c", "print('the reason'); raise SystemExit(3)"], "broken")


def raising(context):
    raise RuntimeError("a bug of the check")


def refusing(context):
    raise StageFailed("there is no such tool")


def hanging(context):
    context.result["numbers"]["before"] = 1
    context.must([PYTHON, "-c", "import time; print('working', flush=True); time.sleep(60)"], "endless")


def test_a_failing_stage_leaves_its_result_and_the_next_ones_run(tmp_path, capsys):
    stages = {
        "build": Stage(counting_then_failing),
        "test": Stage(raising),
        "sanitize": Stage(hanging, limit=0.7),
        "bench": Stage(passing),
        "triton": Stage(passing),
    }
    results, copies = tmp_path / "results", tmp_path / "copies"
    began = time.monotonic()
    assert not gpu_runner.check(stages, gpu_record.STAGES, FACTS, results, tmp_path / "work", copies=copies)
    assert time.monotonic() - began < 30
    (path,) = results.glob("*/*.json")
    kept = gpu_record.read(path)["stages"]
    assert list(kept) == list(gpu_record.STAGES)
    assert kept["build"]["outcome"] == "failed: broken ended with 3" and kept["build"]["numbers"] == {"ms": 3.5}
    assert "the reason" in kept["build"]["failures"][0]["message"] and kept["build"]["counts"] == {"passed": 1}
    assert kept["test"]["outcome"] == "failed: RuntimeError: a bug of the check"
    assert kept["sanitize"]["outcome"] == "timed out: endless ran past the time limit"
    assert kept["sanitize"]["numbers"] == {"before": 1} and "working" in kept["sanitize"]["failures"][0]["message"]
    assert kept["bench"]["outcome"] == "passed" and kept["bench"]["counts"] == {"passed": 2}
    for stage in kept.values():
        assert stage["seconds"] >= 0 and {"started", "commit", "dirty"} <= set(stage)
    assert json.loads((copies / path.name).read_text()) == gpu_record.read(path)
    printed = capsys.readouterr().out
    assert "bench     passed" in printed and "(2 passed)" in printed


def test_a_stage_alone_replaces_its_own_result(tmp_path):
    stages = {name: Stage(passing) for name in gpu_record.STAGES} | {"test": Stage(refusing)}
    assert not gpu_runner.check(stages, gpu_record.STAGES, FACTS, tmp_path / "r", tmp_path / "work")
    assert gpu_runner.check(stages | {"test": Stage(passing)}, ["test"], FACTS, tmp_path / "r", tmp_path / "work")
    (path,) = (tmp_path / "r").glob("*/*.json")
    assert {stage["outcome"] for stage in gpu_record.read(path)["stages"].values()} == {"passed"}


def test_what_a_timed_out_command_started_is_killed_too(tmp_path):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

    def stage(context):
        context.must([PYTHON, "-c", program], "parent", **{})

    entry, _ = gpu_runner.run_stage("test", Stage(stage, limit=3), FACTS, tmp_path / "r", tmp_path / "work")
    assert entry["outcome"].startswith("timed out")
    assert gone(int(pid.read_text()))


def gone(pid):
    for _ in range(50):
        try:
            state = open(f"/proc/{pid}/stat").read().rsplit(")")[-1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead, and whoever adopted it has not asked yet
            return True
        time.sleep(0.1)
    return False


def test_a_stage_that_takes_the_program_down_leaves_a_trace(tmp_path):
    program = f"""
        import os, signal, sys
        sys.path.append({str(ROOT)!r})
        from bench import gpu_runner
        facts = {FACTS!r}
        def fine(context): context.result["counts"]["passed"] = 1
        def fatal(context): os.kill(os.getpid(), signal.SIGKILL)
        stages = {{"build": gpu_runner.Stage(fine), "test": gpu_runner.Stage(fatal)}}
        gpu_runner.check(stages, ["build", "test"], facts, {str(tmp_path / "r")!r}, {str(tmp_path / "w")!r})
    """
    done = subprocess.run([PYTHON, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (path,) = (tmp_path / "r").glob("*/*.json")
    stages = gpu_record.read(path)["stages"]
    assert stages["build"]["outcome"] == "passed" and stages["test"]["outcome"] == "began and did not end"


def test_a_machine_without_git_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    entry, path = gpu_runner.run_stage("build", Stage(lambda context: None), FACTS, tmp_path / "r", tmp_path / "work")
    assert entry["outcome"] == "passed" and entry["commit"] is None
    assert gpu_record.read(path)["stages"]["build"]["dirty"] is None


def test_without_a_gpu_nothing_is_run_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "device_facts", lambda: None)
    monkeypatch.setattr(gpu_check, "check", lambda *_: pytest.fail("a stage ran"))
    assert gpu_check.main([]) == 2 and "needs an NVIDIA GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_check.main(["--wheels", str(tmp_path / "missing")])
    assert "must be a folder" in capsys.readouterr().err


def test_the_device_is_nvidia_smis(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_check.device_facts() == {"device": "NVIDIA H200", "driver": "580.1"}
    fake.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert gpu_check.device_facts() is None
    found = gpu_check.versions()
    assert found["python"].startswith("3.") and "torch" in found
