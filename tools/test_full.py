"""The slow tier, run by `make test-full` after the fast one: sanitizers on the kernels, tests marked `full`, and the
whole suite under other Pythons, torch and transformers versions.

Each row of ENVIRONMENTS is a virtual environment in .venvs/, kept between runs. A step that cannot run here (no such
interpreter, no disk space) is reported as not run and counts as a failure: nothing passes by being left out.
`python tools/test_full.py NAME...` runs the named steps alone.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))  # which `python -P` leaves out
import sass_check  # noqa: E402

GIB = 2**30


class NotRun(Exception):
    """Why a step cannot run on this machine."""


@dataclass(frozen=True)
class Environment:
    """One virtual environment.

    Attributes:
        python: interpreter to make it with; None means the one that runs this program.
        requirements: installed first; torch is one of them, since the build compiles against what is installed.
        disk: free space in bytes that installing it takes.
        ummrm: whether the package is installed and its fast tier run; otherwise tests marked `full` use the environment
            by its path.
        cuda: whether the package is installed with its CUDA kernels, which then need nvcc but no GPU.
    """

    python: str | None
    requirements: tuple[str, ...]
    disk: int
    ummrm: bool = True
    cuda: bool = False


ENVIRONMENTS = {
    # torch 2.11 cannot import newer setuptools; its Triton is 3.6, whose interpreter needs an older numpy
    "python3.12-torch2.11": Environment(
        "python3.12", ("torch==2.11.0", "setuptools<82", "triton==3.6.0", "numpy<2.4"), 12 * GIB
    ),
    # PyPI's Linux wheel of torch is built with CUDA: the extension must build and pass against it without a GPU
    "torch2.14": Environment(None, ("torch==2.14.1", "setuptools"), 12 * GIB, cuda=True),
    # what RewardBench pins; merged models must load there
    "transformers4.57": Environment(None, ("torch==2.13.0", "transformers==4.57.*"), 12 * GIB, ummrm=False),
}


def run(*command, **variables):
    print("$", *(f"{name}={value}" for name, value in variables.items()), *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, env={**os.environ, **variables})


def tool(name):
    """A program of the environment that runs this one, or else from PATH."""
    ours = Path(sys.executable).parent / name
    found = str(ours) if ours.exists() else shutil.which(name)
    if found is None:
        raise NotRun(f"{name} is not installed")
    return found


def sanitize(kind):
    build = ROOT / "build" / f"cmake-{kind}"
    cmake = tool("cmake")
    run(
        cmake,
        "-S",
        ROOT,
        "-B",
        build,
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DUMMRM_SANITIZE={kind}",
    )
    run(cmake, "--build", build)
    run(tool("ctest"), "--test-dir", build, "--output-on-failure")


def cuda_architectures():
    """Compiles the CUDA kernels for every architecture; the fast tier does it for one, and what changed for another. A
    spill fails the compile. Then looks for tensor-core instructions in the machine code of every kernel that should
    have them, and writes down what was compiled (tools/compiled.py)."""
    if shutil.which("nvcc") is None:
        raise NotRun("there is no nvcc on PATH")
    build, cmake = ROOT / "build" / "cmake-cuda", tool("cmake")
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", python)
    run(cmake, "--build", build)
    try:
        sass_check.find_cuobjdump()
    except sass_check.NoTool as reason:
        raise NotRun(f"the machine code cannot be read: {reason}") from reason
    run(sys.executable, ROOT / "tools/sass_check.py", build)
    run(sys.executable, ROOT / "tools/compiled.py", "--write", build)


OPERATORS = ("routing", "permute", "expert_gemm", "activation", "merge_experts", "moe_ffn", "merged_ffn")


def emulated():
    """The operators' tests with csrc's CUDA path and the CUDA kernels, on the host emulator."""
    build = ROOT / "build" / "emulated"
    run(sys.executable, ROOT / "tests/support/emulated_extension.py", build)
    library = ["--library", build / "ummrm_emulated.so"]
    run(
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        *library,
        *(ROOT / f"tests/ops/test_{stem}.py" for stem in OPERATORS),
    )
    run(sys.executable, "-P", "-m", "pytest", "-q", *library, "--device=cpu", "-m", "sanitize", ROOT / "tests/gpu")


def triton36():
    """The compile check of the Triton kernels, whole, under the oldest Triton that is supported."""
    python = make_environment("python3.12-torch2.11")
    run(python, "-P", "-m", "pytest", "-q", "-m", "full", ROOT / "tests/ops/test_triton_compile.py")


def interpreter(name):
    """`name` from PATH, or an installed one that pyenv keeps off it."""
    kept = sorted(Path.home().glob(f".pyenv/versions/*/bin/{name}"))
    for candidate in filter(None, [shutil.which(name), *kept]):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise NotRun(f"there is no {name} on PATH")


def make_environment(name):
    """Creates .venvs/NAME unless it is complete, and returns its interpreter."""
    row, folder = ENVIRONMENTS[name], ROOT / ".venvs" / name
    python, complete = folder / "bin/python", folder / ".complete"
    if complete.exists() and complete.read_text() == repr(row):
        return python
    base = sys.executable if row.python is None else interpreter(row.python)
    if (free := shutil.disk_usage(ROOT).free) < row.disk:
        raise NotRun(f"installing it takes {row.disk / GIB:.0f} GiB of disk, {free / GIB:.0f} are free")
    run(base, "-m", "venv", "--clear", folder)
    run(python, "-m", "pip", "--quiet", "install", *row.requirements)
    complete.write_text(repr(row))
    return python


def test_environment(name):
    cuda = ENVIRONMENTS[name].cuda
    if cuda and shutil.which("nvcc") is None:
        raise NotRun("there is no nvcc on PATH")
    python, build = make_environment(name), {"UMMRM_CUDA": "1" if cuda else "0"}
    # Not editable: the checkout's own extension and its record belong to the environment that develops it.
    run(python, "-m", "pip", "--quiet", "install", f"{ROOT}[test]", **build)
    run(python, "-m", "pip", "--quiet", "install", "--no-deps", "--force-reinstall", ROOT, **build)
    show = "from ummrm.ops import library; print('CUDA kernels for', library.build_info()['cuda_archs'])"
    run(python, "-P", "-c", show)
    run(python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider")


def full_tests():
    for name, row in ENVIRONMENTS.items():
        if not row.ummrm:
            make_environment(name)
    run(sys.executable, "-P", "-m", "pytest", "-m", "full")


STEPS = {
    "address": lambda: sanitize("address"),
    "thread": lambda: sanitize("thread"),
    "cuda": cuda_architectures,
    "emulated": emulated,
    "full": full_tests,
    **{name: lambda name=name: test_environment(name) for name, row in ENVIRONMENTS.items() if row.ummrm},
    "triton3.6": triton36,
}


def main(names):
    unknown = set(names) - set(STEPS)
    if unknown:
        sys.exit(f"unknown steps {sorted(unknown)}; there are {', '.join(STEPS)}")
    results = {}
    for name in names or STEPS:
        print(f"\n=== {name}", flush=True)
        try:
            STEPS[name]()
            results[name] = "passed"
        except NotRun as reason:
            results[name] = f"NOT RUN: {reason}"
        except subprocess.CalledProcessError as error:
            results[name] = f"FAILED: {error.cmd[0]} ended with {error.returncode}"
    print()
    for name, result in results.items():
        print(f"{name:22} {result}")
    return 0 if all(result == "passed" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
