"""The stages of the GPU check: how they read pytest, compute-sanitizer, cuobjdump and benchmarks, each with a stand-in;
and the GPU tests themselves, rehearsed on the CPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import time

import pytest
from checkout import ROOT

from bench import gpu_record, gpu_runner, gpu_stages
from bench.gpu_runner import Stage

PYTHON = sys.executable
FACTS = {"device": "NVIDIA H200", "driver": "1", "sources": "a" * 64, "versions": {}}


def test_outcomes_of_a_test_run(tmp_path):
    report = tmp_path / "r.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a.b" name="c"/>'
        '<testcase classname="a.b" name="d"><failure message="assert 1 == 2&#10;more">long</failure></testcase>'
        '<testcase classname="a.b" name="e"><error message="boom"/></testcase>'
        '<testcase classname="a.b" name="f"><skipped message="why"/></testcase></testsuite></testsuites>'
    )
    counts, failures = gpu_stages.read_junit(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures[0] == {"name": "a.b::d", "message": "assert 1 == 2 more"} and failures[1]["message"] == "boom"
    log = "tests/a.py::t[x y] PASSED [ 1%]\ntests/a.py::u FAILED [ 2%]\nnothing PASSED\ntests/a.py::v "
    assert gpu_stages.count_lines(log) == {"passed": 1, "failed": 1, "skipped": 0}


def fake_pytest(tmp_path, monkeypatch, program):
    """A stage's context whose `python -m pytest` is `program`."""
    script = tmp_path / "fake.py"
    script.write_text("import sys\nreport = next(a[11:] for a in sys.argv if a.startswith('--junitxml'))\n" + program)
    monkeypatch.setattr(gpu_stages, "PYTHON", [PYTHON, str(script)])
    return gpu_runner.Context(tmp_path / "work", None, time.monotonic() + 20)


PASSED = "open(report, 'w').write('<t><testcase classname=\"a\" name=\"b\"/></t>')\n"
SKIPPED = "open(report, 'w').write('<t><testcase classname=\"a\" name=\"b\"><skipped/></testcase></t>')\n"


@pytest.mark.parametrize(
    ("program", "failure"),
    [
        (PASSED, None),
        (PASSED + "sys.exit(1)", "ended with 1"),
        (SKIPPED, "no test passed"),
        ("sys.exit(5)", "no test passed (exit status 5)"),
        ("import os; os.abort()", "no test passed"),
    ],
)
def test_a_suite_that_ran_nothing_has_not_passed(tmp_path, monkeypatch, program, failure):
    context = fake_pytest(tmp_path, monkeypatch, program)
    gpu_stages.test(context)
    messages = [f["message"] for f in context.result["failures"]]
    assert messages == [] if failure is None else failure in messages[0]


@pytest.mark.parametrize(
    ("log", "code", "clean"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("========= ERROR SUMMARY: 3 errors", 99, False),
        ("========= ERROR SUMMARY: 3 errors", 0, False),
        ("no summary", 0, False),
    ],
)
def test_whatever_a_sanitizer_reports_is_a_failure(tmp_path, monkeypatch, log, code, clean):
    """A stand-in for compute-sanitizer that runs what follows its own options and prints a summary."""
    context = fake_pytest(tmp_path, monkeypatch, PASSED)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{PYTHON}\nimport subprocess, sys\n"
        f"i = sys.argv.index({PYTHON!r})\nsubprocess.run(sys.argv[i:])\nprint({log!r})\nsys.exit({code})\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: str(tool))
    gpu_stages.sanitize(context)
    assert (context.result["failures"] == []) is clean
    assert context.result["counts"]["sanitize-racecheck passed"] == 1
    assert set(context.result["numbers"]) == {"memcheck", "racecheck", "synccheck"}


def test_benchmarks_that_are_killed_leave_what_was_measured(tmp_path, monkeypatch):
    entry = {"suite": "permute", "direction": "forward", "dtype": "bfloat16", "label": "ummrm", "bytes": 8, "flops": 0}
    entry |= {"sizes": {"t": 1, "h": 1, "i": 1, "e": 1, "k": 1, "s": 1, "routing": "balanced"}, "timing": "events"}
    entry |= {"outcome": "measured", "best": 1.0, "median": 1.0}
    failed = entry | {"outcome": "failed: AssertionError: differs", "label": "other"}
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, sys, time\n"
        "path = sys.argv[sys.argv.index('--record') + 1]\n"
        "with open(path, 'a') as file:\n"
        f"    for line in {[{'about': {'rates': {'copy_bytes': 8.0}}}, {'entry': entry}, {'entry': failed}]!r}:\n"
        "        file.write(json.dumps(line) + '\\n')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_stages, "PYTHON", [PYTHON, str(script)])
    stage = Stage(gpu_stages.bench, limit=3)
    kept, _ = gpu_runner.run_stage("bench", stage, FACTS, tmp_path / "r", tmp_path / "work")
    assert "ran past their time limit" in kept["outcome"] and kept["counts"] == {"measured": 1, "failed": 1}
    assert kept["numbers"]["entries"] == [entry, failed] and kept["numbers"]["targets"]["met"] == 1
    assert "differs" in kept["failures"][0]["message"]


@pytest.mark.parametrize("broken", [None, "none", "all"])
def test_the_layer_is_measured_without_fusions_and_with_all(tmp_path, monkeypatch, broken):
    """A stand-in for the benchmarks, faster with fusions; one that breaks is a failure, and the other is kept."""
    asked, entry = tmp_path / "asked", {"suite": "moe_ffn", "direction": "forward", "dtype": "bfloat16", "bytes": 8}
    entry |= {"sizes": {"t": 1, "h": 1, "i": 1, "e": 1, "k": 1, "s": 1, "routing": "balanced"}, "timing": "events"}
    entry |= {"label": "ummrm", "flops": 0, "outcome": "measured", "best": 1.0}
    program = f"""
        import json, sys
        rest = sys.argv[3:]
        fusions = rest[rest.index("--fusions") + 1] if "--fusions" in rest else None
        with open({str(asked)!r}, "a") as file:
            file.write(json.dumps([fusions, rest]) + "\\n")
        with open(rest[rest.index("--record") + 1], "w") as file:
            entry = {entry!r} | {{"median": {{"none": 3.0, "all": 2.0}}.get(fusions, 2.5)}}
            entries = [] if fusions and fusions == {broken!r} else [{{"entry": entry}}]
            for line in [{{"about": {{"rates": {{"copy_bytes": 8.0}}}}}}, *entries]:
                file.write(json.dumps(line) + "\\n")
        sys.exit(fusions is not None and fusions == {broken!r})
        """
    monkeypatch.setattr(gpu_stages, "PYTHON", [script(tmp_path / "python", program)])
    kept, _ = gpu_runner.run_stage("bench", gpu_stages.STAGE_TABLE["bench"], FACTS, tmp_path / "r", tmp_path / "work")
    calls = dict(json.loads(line) for line in asked.read_text().splitlines())
    assert list(calls) == [None, "none", "all"]
    assert all(rest[rest.index("-k") + 1] == "moe_ffn" for fusions, rest in calls.items() if fusions)
    seconds = {name: float(rest[rest.index("--deadline") + 1]) for name, rest in calls.items()}
    assert seconds[None] > seconds["none"] > 0.1 * gpu_runner.LIMIT and seconds["all"] == seconds["none"]
    numbers = kept["numbers"]
    assert numbers["entries"][0]["median"] == 2.5 and "targets" in numbers
    both = numbers["fusions"]
    assert [len(both[name]["entries"]) for name in ("none", "all")] == [name != broken for name in ("none", "all")]
    assert [row["ratio"] for row in both["ratios"]] == ([] if broken else [1.5])
    assert [failure["name"] for failure in kept["failures"]] == ([f"bench-fusions-{broken}"] if broken else [])
    assert kept["outcome"] == ("failed" if broken else "passed")


@pytest.mark.parametrize("broken", [None, "pytest", "bench.report"])
def test_tests_and_benchmarks_run_once_more_on_triton(tmp_path, monkeypatch, broken):
    """A stand-in for Python that notes what it is asked for; what breaks in either is a failure of the stage."""
    asked, entry = tmp_path / "asked", {"suite": "permute", "direction": "forward", "dtype": "bfloat16", "bytes": 8}
    entry |= {"sizes": {"t": 1, "h": 1, "i": 1, "e": 1, "k": 1, "s": 1, "routing": "balanced"}, "timing": "events"}
    entry |= {"label": "ummrm", "flops": 0, "outcome": "measured", "best": 1.0, "median": 1.0}
    about = {"rates": {"copy_bytes": 8.0}, "backend": "triton"}
    program = f"""
        import json, os, sys
        module, rest = sys.argv[2], sys.argv[3:]
        with open({str(asked)!r}, "a") as file:
            file.write(json.dumps([module, rest, os.environ["TRITON_CACHE_DIR"]]) + "\\n")
        if module == "pytest":
            report = next(a.split("=", 1)[1] for a in rest if a.startswith("--junitxml"))
            open(report, "w").write('<t><testcase classname="a" name="b"/></t>')
        else:
            with open(rest[rest.index("--record") + 1], "w") as file:
                for line in {[{"about": about}, {"entry": entry}]!r}:
                    file.write(json.dumps(line) + "\\n")
        sys.exit(module == {broken!r})
        """
    monkeypatch.setattr(gpu_stages, "PYTHON", [script(tmp_path / "python", program)])
    stage = gpu_stages.STAGE_TABLE["triton"]
    kept, _ = gpu_runner.run_stage("triton", stage, FACTS, tmp_path / "r", tmp_path / "work")
    calls = [json.loads(line) for line in asked.read_text().splitlines()]
    assert [module for module, *_ in calls] == ["pytest", "pytest", "bench.report"]
    for module, rest, cache in calls:
        assert rest[rest.index("--backend") + 1] == "triton" if module != "pytest" else "--backend=triton" in rest
        assert cache == str(tmp_path / "work" / "triton")
    assert kept["counts"]["triton-operators passed"] == kept["counts"]["triton-others passed"] == 1
    assert kept["numbers"]["targets"]["met"] == 1 and kept["counts"]["measured"] == 1
    names = {None: [], "pytest": ["triton-operators", "triton-others"], "bench.report": ["triton-bench"]}[broken]
    assert [failure["name"] for failure in kept["failures"]] == names
    assert kept["outcome"] == ("failed" if names else "passed")


def script(path, text):
    path.write_text(f"#!{PYTHON}\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("archs", "sees", "elsewhere", "refuses", "outcome"),
    [
        (["sm_90a"], True, False, True, "passed"),
        (["sm_90a"], True, False, False, "failed: the extension does not refuse a bad argument"),
        ([], True, False, True, "failed: the build has CUDA kernels for [], torch sees a GPU: True"),
        (["sm_90a"], False, False, True, "failed: the build has CUDA kernels for ['sm_90a'], torch sees a GPU: False"),
        (["sm_90a"], True, True, True, "failed: another ummrm than the one just built is imported"),
    ],
)
def test_the_build_installs_beside_the_system(tmp_path, monkeypatch, archs, sees, elsewhere, refuses, outcome):
    """Stand-ins for pip, Python and cuobjdump: wheels and package go to the site folder, CUTLASS to the build alone."""
    wheels, asked = tmp_path / "wheels", tmp_path / "asked"
    wheels.mkdir()
    for name in ("nvidia_cutlass-4.2.0.0-py3-none-any.whl", "pytest-9-py3-none-any.whl"):
        (wheels / name).touch()
    pip = script(
        tmp_path / "pip",
        f"""
        import json, os, pathlib, sys
        target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
        (target / "ummrm").mkdir(parents=True, exist_ok=True)
        (target / "ummrm" / "_C.x.so").touch()
        names = "UMMRM_CUDA", "UMMRM_CUTLASS", "UMMRM_HEAVY_COMPILERS"
        chosen = {{name: os.environ.get(name) for name in names}}
        with open({str(asked)!r}, "a") as file:
            file.write(json.dumps([sys.argv[1:], chosen]) + "\\n")
        """,
    )
    work = tmp_path / "work"
    home = tmp_path if elsewhere else work / "site"
    info = {"cuda_archs": archs, "compiler": "g", "file": str(home / "ummrm/__init__.py"), "sees_gpu": sees}
    info["refuses"] = refuses
    shown = script(tmp_path / "python", f"print('a warning'); print({json.dumps(json.dumps(info))})")
    dump = "arch = sm_90a\\n Function k:\\n  REG:20 STACK:0 LOCAL:0"
    tool = script(tmp_path / "cuobjdump", f"print('{dump}')")
    monkeypatch.setattr(gpu_stages, "PIP", [pip])
    monkeypatch.setattr(gpu_stages, "PYTHON", [shown])
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: tool)
    for variable in ("UMMRM_CUTLASS", "UMMRM_HEAVY_COMPILERS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(gpu_stages.os, "cpu_count", lambda: 16)
    kept, _ = gpu_runner.run_stage("build", Stage(gpu_stages.build), FACTS, tmp_path / "r", work, wheels)
    assert kept["outcome"] == outcome
    (first, chosen), (second, for_package) = [json.loads(line) for line in asked.read_text().splitlines()]
    assert first[-1].endswith("pytest-9-py3-none-any.whl") and not any("cutlass" in word for word in first)
    assert chosen["UMMRM_CUDA"] is None and second[-1] == str(ROOT)
    cutlass = str(wheels / "nvidia_cutlass-4.2.0.0-py3-none-any.whl")
    assert for_package == {"UMMRM_CUDA": "1", "UMMRM_CUTLASS": cutlass, "UMMRM_HEAVY_COMPILERS": "5"}
    assert str(work / "site") in first and str(work / "site") in second
    if outcome == "passed":
        assert kept["counts"] == {"kernels": 1} and kept["numbers"]["kernels"]["sm_90a"]["most_registers"] == 20


@pytest.mark.parametrize("shared", [True, False])
def test_the_extension_shares_the_cxx_library(tmp_path, monkeypatch, shared):
    """A stand-in for a compiler with libstdc++.a beside it, and the shared one or not: the system's is named then."""
    has = "libstdc++.so libstdc++.a" if shared else "libstdc++.a"
    compiler = script(
        tmp_path / "c++",
        f"""
        import sys
        name = sys.argv[1].removeprefix("-print-file-name=")
        print("/somewhere/" + name if name in {has.split()!r} else name)
        """,
    )
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("LDFLAGS", "-Wl,-O1")
    flags = gpu_stages.shared_cxx_library().get("LDFLAGS", "")
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    if shared or "libstdc++.so.6" not in known:
        assert flags == ""
        return
    assert flags.startswith("-Wl,-O1 -Wl,--push-state,--no-as-needed,/") and "libstdc++.so.6,--pop-state" in flags
    source = tmp_path / "a.cpp"
    source.write_text("#include <iostream>\nvoid f() { std::cout << 1; }\n")
    made = subprocess.run(["c++", "-shared", "-fPIC", *flags.split(), source, "-o", tmp_path / "a.so"])
    assert made.returncode == 0


def test_resources_of_kernels():
    text = textwrap.dedent(
        """
        Fatbin elf code:
        ================
        arch = sm_90a
        code version = [1,8]

        Resource usage:
         Common:
          GLOBAL:0
         Function _ZN5ummrm4cuda1aEv:
          REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
         Function _ZN5ummrm4cuda1bEv:
          REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0

        Fatbin elf code:
        ================
        arch = sm_80
         Function c:
          REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400
        """
    )
    assert gpu_stages.summary_of(gpu_stages.resources(text)) == {
        "sm_90a": {"kernels": 2, "most_registers": 168, "on_stack": {"_ZN5ummrm4cuda1bEv": 16}},
        "sm_80": {"kernels": 1, "most_registers": 8, "on_stack": {}},
    }


def test_every_stage_fits_eight_minutes():
    assert list(gpu_stages.STAGE_TABLE) == list(gpu_record.STAGES)
    assert all(stage.limit < 480 for stage in gpu_stages.STAGE_TABLE.values())
    assert sum(share for _, share in gpu_stages.TRITON_TESTS.values()) < 0.8  # the benchmarks have the rest


def rehearse(*options, **environment):
    """Runs tests/gpu on the CPU in a process of its own, and returns how many tests passed."""
    command = [PYTHON, "-P" if sys.version_info >= (3, 11) else "-I", "-m", "pytest", str(ROOT / "tests/gpu")]
    command += ["--device=cpu", "-q", "-p", "no:cacheprovider", "-rN", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def without(folder, *names):
    """A folder for PYTHONPATH with which these libraries cannot be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names!r}))\n")
    return str(folder)


# what `make gpu-wheels` fetches is pytest and transformers with what they need; torch brings jinja2 and others
NOT_ON_A_BARE_MACHINE = (
    "hypothesis",
    "scipy",
    "matplotlib",
    "pydantic",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "nox",
)


def test_what_the_sanitizers_will_see_passes_on_the_cpu(tmp_path):
    """And needs no more than a bare machine has, although tests/gpu takes its cases from tests/ops."""
    path = os.pathsep.join([without(tmp_path, *NOT_ON_A_BARE_MACHINE), os.environ.get("PYTHONPATH", "")])
    assert rehearse("-m", "sanitize", PYTHONPATH=path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1") > 50


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has wheels for Linux alone")
@pytest.mark.parametrize("part", gpu_stages.TRITON_TESTS)
def test_what_triton_will_run_passes_in_its_interpreter(part):
    """Thousands of rows, and a whole training, take minutes there; triton_interpreted.py has a smaller one."""
    options = [*gpu_stages.TRITON_TESTS[part][0], f"--ignore={ROOT / 'tests/gpu/test_gpu_training.py'}"]
    options += ["-k", "not several and not moe_ffn_of_many"]
    assert rehearse("--backend=triton", *options, TRITON_INTERPRET="1") > 20


@pytest.mark.full
def test_what_is_said_of_the_compiled_kernels_alone_is_skipped_on_another_backend():
    assert rehearse("--backend=reference", "-k", "launchers or many_elements and merge") == 1


@pytest.mark.full
def test_the_whole_gpu_suite_passes_on_the_cpu():
    assert rehearse() > 700
