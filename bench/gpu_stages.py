"""The stages of the GPU check: what each runs, and how it reads the outcome. Records are gpu_runner.py's.

Each runs in processes of its own with the package from build/gpu/site; nothing here imports torch.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import targets
from .gpu_record import ROOT
from .gpu_runner import Stage, StageFailed
from .record import OURS, read_record

PYTHON = [sys.executable, "-P"]  # the checkout holds no extension: it stays behind what was installed
PIP = [*PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]

_SHOW_BUILD = """
import json, torch, ummrm
from ummrm.ops import library
info = library.build_info()
try:
    ummrm.ops.route(torch.zeros(1, 2), top_k=3)
    refuses = False
except ValueError:
    refuses = True
print(json.dumps({"cuda_archs": list(info["cuda_archs"]), "compiler": info["compiler"], "file": ummrm.__file__,
                  "torch_cuda": torch.version.cuda, "sees_gpu": torch.cuda.is_available(),
                  "tile_table": repr(library.tile_table()),
                  "refuses": refuses}))
"""


def shared_cxx_library():
    """LDFLAGS that link the C++ library torch uses, where the compiler has only a static one by its side.

    An extension with a libstdc++ of its own dies at its first error message. Images with a compiler moved by hand had
    one, and every extension of torch's that was built there died so.
    """
    compiler = os.environ.get("CXX", "c++")

    def found(name):  # the compiler gives a bare name back where it finds none
        asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
        return asked.returncode == 0 and os.sep in asked.stdout.strip()

    try:
        if found("libstdc++.so") or not found("libstdc++.a"):
            return {}
        cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return {}
    match = re.search(r"libstdc\+\+\.so\.6 .*x86-64.* => (\S+)", cache)
    flags = f"-Wl,--push-state,--no-as-needed,{match[1]},--pop-state" if match else ""
    return {"LDFLAGS": " ".join(filter(None, (os.environ.get("LDFLAGS"), flags)))} if flags else {}


def build(context):
    """Installs the wheels and the package with its CUDA kernels, and reads the kernels' resources off the library."""
    shutil.rmtree(context.site, ignore_errors=True)
    context.site.mkdir(parents=True)
    wheels = sorted(context.wheels.glob("*.whl")) if context.wheels else []
    cutlass = [wheel for wheel in wheels if wheel.name.startswith("nvidia_cutlass-")]
    others = [wheel for wheel in wheels if wheel not in cutlass]
    if others:
        context.must([*PIP, "--target", context.site, *others], "build-wheels")
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    environment = {"UMMRM_CUDA": "1", "MAX_JOBS": jobs} | shared_cxx_library()
    if "UMMRM_HEAVY_COMPILERS" not in os.environ:  # not by what such machines say of their memory: it may grow with use
        environment["UMMRM_HEAVY_COMPILERS"] = str(max(2, os.cpu_count() // 3))
    if cutlass and "UMMRM_CUTLASS" not in os.environ:
        environment["UMMRM_CUTLASS"] = str(cutlass[0])
    install = [*PIP, "-v", "--no-build-isolation", "--target", context.site, ROOT]
    done = context.must(install, "build-package", **environment)
    context.result["numbers"]["package_seconds"] = round(done.seconds, 1)
    shown = context.must([*PYTHON, "-c", _SHOW_BUILD], "build-info")
    info = json.loads(shown.log.read_text().splitlines()[-1])
    if Path(info.pop("file")).parent.parent != context.site.resolve():
        raise StageFailed("another ummrm than the one just built is imported")
    context.result["numbers"]["build"] = info
    if not info.pop("refuses"):
        raise StageFailed("the extension does not refuse a bad argument")
    if not info["cuda_archs"] or not info["sees_gpu"]:
        raise StageFailed(f"the build has CUDA kernels for {info['cuda_archs']}, torch sees a GPU: {info['sees_gpu']}")
    if tool := shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump"):
        (library,) = context.site.glob("ummrm/_C*.so")
        log = context.must([tool, "--dump-resource-usage", library], "build-resources").log
        kernels = resources(log.read_text())
        context.result["counts"]["kernels"] = len(kernels)
        context.result["numbers"]["kernels"] = summary_of(kernels)


def resources(text):
    """(architecture, function, {"REG": ..., "STACK": ...}) of every kernel in cuobjdump's --dump-resource-usage."""
    found, arch, function = [], None, None
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function ([^:]+):", line):
            function = match[1].strip()
        elif function and "REG:" in line:
            found.append((arch, function, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}))
            function = None
    return found


def summary_of(kernels):
    """By architecture: how many kernels, the most registers, and which keep anything on a stack, as a spill would."""
    out = {}
    for arch, function, use in kernels:
        row = out.setdefault(arch, {"kernels": 0, "most_registers": 0, "on_stack": {}})
        row["kernels"] += 1
        row["most_registers"] = max(row["most_registers"], use["REG"])
        if use.get("STACK", 0) or use.get("LOCAL", 0):
            row["on_stack"][function] = use.get("STACK", 0) + use.get("LOCAL", 0)
    return out


WORKERS = 12  # processes of the tests at once, each with a CUDA context of its own: most of the time is the reference's


def side_by_side():
    """pytest's options for several processes at once, where the machine has pytest-xdist."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(WORKERS, os.cpu_count())), "--dist", "loadgroup"]


def test(context):
    """Runs tests/gpu. None run is a failure: a suite that skips itself has shown nothing."""
    run_tests(context, "test", side_by_side())


def run_tests(context, name, options, prefix=(), limit=None, **environment):
    """pytest on tests/gpu, its counts and failures into the result; returns the Run."""
    report = context.work / f"{name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [*prefix, *PYTHON, "-m", "pytest", "tests/gpu", "--device=cuda", "-v", "-p", "no:cacheprovider"]
    command += ["-o", "faulthandler_timeout=120", f"--junitxml={report}", *options]
    done = context.run(command, name, limit, **environment)
    counts, failures = read_junit(report) if report.exists() else (count_lines(done.log.read_text()), [])
    for key, value in counts.items():
        context.result["counts"][f"{name} {key}" if name != "test" else key] = value
    context.result["failures"] += failures
    problem = None
    if done.code is None:
        problem = "ran past its time limit"
    elif not counts.get("passed"):
        problem = f"no test passed (exit status {done.code})"
    elif done.code != 0 and not failures:
        problem = f"ended with {done.code}"
    if problem:
        context.result["failures"].append({"name": name, "message": problem + "\n" + "\n".join(done.tail)})
    return done


def read_junit(path):
    """Counts by outcome, and the failures by name with the first line of each, from pytest's JUnit report."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(path).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] += 1
        if bad:
            message = (bad[0].get("message") or bad[0].text or "").strip().splitlines()[:3]
            failures.append({"name": f"{case.get('classname')}::{case.get('name')}", "message": " ".join(message)})
    return counts, failures


def count_lines(log):
    """Counts by outcome from pytest's verbose lines, for a run that was killed before its report."""
    words = {"passed": "PASSED", "failed": "FAILED", "skipped": "SKIPPED"}
    return {key: len(re.findall(rf"^\S+::.* {word}\b", log, re.M)) for key, word in words.items()}


# initcheck is left out: it takes what torch's own kernels leave unwritten for an error of the reader; the tests poison
# all new memory instead.
SANITIZERS = ("memcheck", "racecheck", "synccheck")


def sanitize(context):
    """The tests marked `sanitize` under every tool at once, over our kernels alone. Anything reported is a failure."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        raise StageFailed("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")

    def under(tool):
        prefix = [program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", "--print-limit", "20"]
        prefix += ["--kernel-name", "kns=ummrm", "--kernel-name", "kns=cutlass"]
        prefix += ["--report-api-errors", "no"] if tool == "memcheck" else []
        name = f"sanitize-{tool}"
        # Without torch's cache every tensor is an allocation of its own, and a read past its end is seen.
        done = run_tests(context, name, ["-m", "sanitize"], prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.log.read_text(errors="replace"))
        context.result["numbers"][tool] = {"seconds": round(done.seconds, 1), "reported": list(map(int, found))}
        if not found or any(map(int, found)):
            message = f"reported {found[0]}" if found else "printed no summary: it did not check anything"
            context.result["failures"].append({"name": name, "message": message})

    with ThreadPoolExecutor() as pool:
        list(pool.map(under, SANITIZERS))


MARGIN = 20  # seconds that the contender begun last may take
FUSIONS, FUSED_SHARE = ("none", "all"), 0.2  # of the stage's time for each; the rest is for what users get


def bench(context):
    """The benchmarks as users get the kernels; then the layer without any fusion and with all, under "fusions" in the
    record, with their ratio case by case: above 1, fused is faster."""
    whole = context.remaining
    run_bench(context, "bench", [], whole * (1 - FUSED_SHARE * len(FUSIONS)))
    both = context.result["numbers"]["fusions"] = {}
    for fusions in FUSIONS:
        options = ["--fusions", fusions, "-k", "moe_ffn"]
        both[fusions] = {"about": None, "entries": []}
        run_bench(context, f"bench-fusions-{fusions}", options, whole * FUSED_SHARE, both[fusions])
    both["ratios"] = ratios(*(both[fusions] for fusions in FUSIONS))


def ratios(plain, fused):
    """Seconds without fusions over seconds with all, of each of ummrm's cases that both records measured."""
    before, found = {targets.Entries.case(e): targets.seconds(e) for e in measured(plain)}, []
    for entry in measured(fused):
        if seconds := before.get(targets.Entries.case(entry)):
            case = {name: entry[name] for name in ("suite", "direction", "dtype", "sizes")}
            found.append(case | {"ratio": seconds / targets.seconds(entry)})
    return found


def measured(record):
    return [e for e in record["entries"] if e["label"] == OURS and e["outcome"] == "measured"]


def run_bench(context, name, options, limit=None, record=None, **environment):
    """The benchmarks on CUDA, until shortly before the time is up; what was measured is kept whatever comes after, in
    `record`, by default the stage's numbers."""
    path = context.work / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    limit = context.remaining if limit is None else min(limit, context.remaining)
    limits = ["--deadline", f"{max(1.0, limit - MARGIN):.0f}", "--record", path]
    command = [*PYTHON, "-m", "bench.report", "--device", "cuda", *limits, *options]
    done = context.run(command, name, limit, **environment)
    record = context.result["numbers"] if record is None else record
    record.update(read_record(path) if path.exists() else {"about": None, "entries": []})
    entries = record["entries"]
    for entry in entries:
        key = entry["outcome"].split(":")[0]
        context.result["counts"][key] = context.result["counts"].get(key, 0) + 1
        if key == "failed":
            case = " ".join([entry["suite"], entry["direction"], entry["dtype"], entry["label"]])
            context.result["failures"].append({"name": case, "message": f"{entry['outcome']} at {entry['sizes']}"})
    if entries:
        record["targets"] = targets.summary(record)
    if done.code is None:
        raise StageFailed("the benchmarks ran past their time limit")
    if done.code != 0 or not measured(record):
        context.result["failures"].append({"name": name, "message": "\n".join(done.tail)})


# Shares of the stage's time, which are guesses: kernels are compiled as they are met, for each dtype, number of experts
# and divisibility of sizes. So every operator has a small case in every dtype, and of the other tests one set of
# parameters has to do.
TRITON_TESTS = {"operators": (["-m", "sanitize"], 0.45), "others": (["-m", "not sanitize", "--at-most=1"], 0.25)}


def triton(context):
    """The tests and then the benchmarks once more, on Triton's kernels."""
    whole, environment = context.remaining, {"TRITON_CACHE_DIR": str(context.work / "triton")}
    for name, (options, share) in TRITON_TESTS.items():
        options = ["--backend=triton", *side_by_side(), *options]
        run_tests(context, f"triton-{name}", options, limit=whole * share, **environment)
    run_bench(context, "triton-bench", ["--backend", "triton"], **environment)


STAGE_TABLE = {
    "build": Stage(build),
    "test": Stage(test),
    "sanitize": Stage(sanitize),
    "bench": Stage(bench),
    "triton": Stage(triton),
}
