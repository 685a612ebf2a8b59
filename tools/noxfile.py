"""The slow tier, run by `make test-full` after the fast one: sanitizers on the kernels and on the extension, tests
marked `full`, the whole suite under other Pythons, torch and transformers versions, and the package as a user
installs it.

    nox -f tools/noxfile.py --list
    nox -f tools/noxfile.py -s address emulated     (or make test-full SESSION="address emulated")

Environments are kept in .venvs/ between runs. A session that cannot run here (no such interpreter, no nvcc, no disk
space) is aborted with the reason behind NOT RUN, and counts as a failure: nothing passes by being left out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venvs"
DIST = ROOT / "build" / "dist"
GIB = 2**30
TORCH_DISK = 12 * GIB  # what PyPI's torch for Linux takes, with CUDA's libraries
CPU_TORCH = "torch==2.13.0"  # as the Makefile has it
DEEPSPEED = "deepspeed>=0.19,<0.20"
OLDEST = "python3-12-torch2-11"
OPERATORS = ("routing", "permute", "expert_gemm", "activation", "merge_experts", "moe_ffn", "merged_ffn")
OPERATORS += ("grouped", "checks")

nox.needs_version = ">=2025.2.9"
nox.options.envdir = str(ENVIRONMENTS)
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True


def safe(python):
    """An interpreter's command that leaves the working folder off sys.path: what is installed is tested."""
    version = subprocess.run([python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True)
    return [str(python), "-P"] if version.stdout.strip() == b"True" else [str(python)]


HERE = safe(sys.executable)


def find_interpreter(name):
    """Puts `name` first on PATH where the one found there does not run, as a shim of pyenv's may, or there is none."""
    kept = sorted(Path.home().glob(f".pyenv/versions/*/bin/{name}"))
    for candidate in filter(None, [shutil.which(name), *kept]):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            os.environ["PATH"] = os.pathsep.join([str(Path(candidate).parent), os.environ["PATH"]])
            return


find_interpreter("python3.12")


def not_run(session, reason):
    session.error(f"NOT RUN: {reason}")


def tool(session, name):
    """A program of the environment that runs nox, or else from PATH."""
    ours = Path(sys.executable).parent / name
    found = str(ours) if ours.exists() else shutil.which(name)
    return found or not_run(session, f"{name} is not installed")


def need_nvcc(session):
    if shutil.which("nvcc") is None:
        not_run(session, "there is no nvcc on PATH")


def need_disk(session, package="torch"):
    """Before torch is installed for the first time: is there room for it?"""
    installed = list(Path(session.virtualenv.location).glob(f"lib/python*/site-packages/{package}"))
    if not installed and (free := shutil.disk_usage(ROOT).free) < TORCH_DISK:
        not_run(session, f"installing it takes {TORCH_DISK / GIB:.0f} GiB of disk, {free / GIB:.0f} are free")


def configure(session, build, *options):
    python = f"-DPython3_EXECUTABLE={sys.executable}"
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool(session, 'ninja')}"
    session.run(tool(session, "cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", ninja, python, *options)
    session.run(tool(session, "cmake"), "--build", str(build))


def sanitize(session, kind):
    build = ROOT / "build" / f"cmake-{kind}"
    configure(session, build, f"-DUMMRM_SANITIZE={kind}")
    session.run(tool(session, "ctest"), "--test-dir", str(build), "--output-on-failure")


@nox.session(python=False)
def address(session):
    """The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    sanitize(session, "address")


@nox.session(python=False)
def thread(session):
    """The kernels' tests under ThreadSanitizer."""
    sanitize(session, "thread")


@nox.session(python=False)
def arm64(session):
    """The kernels and their tests compiled for arm64 by a cross compiler, run by qemu's emulation of one process."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None:
        not_run(session, "aarch64-linux-gnu-g++ is not installed; Debian's package is g++-aarch64-linux-gnu")
    # static, so that the emulator needs no other system's libraries; -Werror, since no other build reads the warnings
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    options += [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_CUDA_COMPILER=NOTFOUND"]
    options += [f"-DCMAKE_CROSSCOMPILING_EMULATOR={emulator or ''}"]
    # once as it is shipped, and once with the fp32 products that no processor but x86-64 is given so far
    for name, flags in (("", "-Werror"), ("-products", "-Werror -DUMMRM_NO_CLONES")):
        build = ROOT / "build" / f"cmake-arm64{name}"
        configure(session, build, *options, f"-DCMAKE_CXX_FLAGS={flags}")
        if emulator is None:
            continue
        session.run(tool(session, "ctest"), "--test-dir", str(build), "--output-on-failure", "--no-tests=error")
    if emulator is None:
        not_run(session, "it compiles; its tests need qemu-aarch64, Debian's package qemu-user")


@nox.session(name="csrc-sanitized", python=False)
def csrc_sanitized(session):
    """The extension itself under sanitizers, torch loaded around it, through the operators' tests."""
    session.run(sys.executable, str(ROOT / "tools/sanitized_extension.py"))


@nox.session(python=False)
def cuda(session):
    """Compiles the CUDA kernels for every architecture; the fast tier does it for one, and what changed for another.

    A spill fails the compile. Then looks for tensor-core instructions in the machine code of every kernel that should
    have them, and writes down what was compiled (tools/compiled.py).
    """
    need_nvcc(session)
    build = ROOT / "build" / "cmake-cuda"
    configure(session, build, "-DUMMRM_PTX=ON")
    session.run(sys.executable, str(ROOT / "tools/sass_check.py"), str(build))
    session.run(sys.executable, str(ROOT / "tools/compiled.py"), "--write", str(build))


@nox.session(python=False)
def emulated(session):
    """The operators' tests with csrc's CUDA path and the CUDA kernels, on the host emulator."""
    session.chdir(ROOT)
    build = ROOT / "build" / "emulated"
    session.run(sys.executable, str(ROOT / "tests/support/emulated_extension.py"), str(build))
    pytest = [*HERE, "-m", "pytest", "-q", "--library", str(build / "ummrm_emulated.so")]
    session.run(*pytest, *(f"tests/ops/test_{stem}.py" for stem in OPERATORS))
    session.run(*pytest, "--device=cpu", "-m", "sanitize", "tests/gpu")


PTX_STEMS = tuple(stem for stem in OPERATORS if stem != "checks")
# Once more with the fused products taken, of which some have to run
PTX_FUSED = (("expert_glu", "grad_sums", "moe_ffn"), ",fusions=all,launches=GluEnding,launches=GluBackwardEnding")


@nox.session(python=False, requires=["cuda"])
def ptx(session):
    """What nvcc compiled, on the machine for PTX: products in all orders, mutations, planted bugs, operators."""
    session.chdir(ROOT)
    build, folder = ROOT / "build" / "cmake-cuda", ROOT / "build" / "ptx"
    session.run(tool(session, "cmake"), "--build", str(build), "--target", "ptx_asan")
    ctest = [tool(session, "ctest"), "--test-dir", str(build), "--output-on-failure", "-C", "full", "-R", "^ptx_"]
    session.run(*ctest)
    session.run(sys.executable, str(ROOT / "tests/support/ptx_extension.py"), str(folder), str(build))
    pytest = [*HERE, "-m", "pytest", "-q", "--library", str(folder / "ummrm_ptx.so")]
    for arch in ("80", "90"):
        for stems, more in ((PTX_STEMS, ""), PTX_FUSED):
            machine = f"arch={arch},order=late,seed=1{more}"
            how = {"LD_PRELOAD": str(folder / "device_allocator.so"), "UMMRM_PTX": machine}
            session.run(*pytest, *(f"tests/ops/test_{stem}.py" for stem in stems), env=how)


@nox.session(python=False)
def types(session):
    """The type checker, for the oldest Python that is supported and for the newest that it knows."""
    session.chdir(ROOT)
    for version in ("3.10", "3.13"):
        session.run(sys.executable, "-m", "mypy", "--python-version", version)


@nox.session(name="transformers4.57")
def transformers4(session):
    """An environment with the last transformers 4, in which tests marked `full` load merged models."""
    need_disk(session)
    session.install(CPU_TORCH, "transformers==4.57.*")


@nox.session(python=False, requires=["transformers4.57"])
def full(session):
    """Tests marked `full`."""
    session.chdir(ROOT)
    session.run(*HERE, "-m", "pytest", "-m", "full", *session.posargs)


def install_sources(session, cuda_kernels="0"):
    """The package with what its tests need. Not editable: the extension in the checkout belongs to who develops it."""
    build = {"UMMRM_CUDA": cuda_kernels}
    session.install(f"{ROOT}[test]", env=build)
    session.install("--no-deps", "--force-reinstall", str(ROOT), env=build)


def fast_tier(session, *tests):
    session.chdir(ROOT)
    python = safe(Path(session.bin) / "python")
    show = "from ummrm.ops import library; print('CUDA kernels for', library.build_info()['cuda_archs'])"
    session.run(*python, "-c", show)
    session.run(*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *session.posargs)


@nox.session(name="python3.12-torch2.11", python="3.12")
def oldest(session):
    """The fast tier on the oldest torch, which cannot import newer setuptools, and on its Triton."""
    need_disk(session)
    session.install(
        "torch==2.11.0", "setuptools<82", "triton==3.6.0", "numpy<2.4"
    )  # newer numpy breaks its interpreter
    install_sources(session)
    fast_tier(session)


@nox.session(name="triton3.6", python=False)
def oldest_triton(session):
    """The compile check of the Triton kernels, whole, under the oldest Triton that is supported."""
    python = ENVIRONMENTS / OLDEST / "bin/python"
    if not python.exists():
        not_run(session, "it runs in the environment of python3.12-torch2.11, which has not been made")
    session.chdir(ROOT)
    session.run(*safe(python), "-m", "pytest", "-q", "-m", "full", "tests/ops/test_triton_compile.py")


@nox.session(name="torch2.14")
def newest(session):
    """The fast tier on PyPI's torch, which is built with CUDA: the kernels must build against it without a GPU."""
    need_nvcc(session)
    need_disk(session)
    session.install("torch==2.14.1", "setuptools")
    install_sources(session, cuda_kernels="1")
    fast_tier(session)


@nox.session(python=False)
def distributions(session):
    """Builds the source archive, and a wheel from it, as a release does; both go to build/dist."""
    session.chdir(ROOT)
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir(parents=True)
    make = f"import sys; sys.path.insert(0, 'tools'); import build_backend; build_backend.build_sdist({str(DIST)!r})"
    session.run(sys.executable, "-c", make)
    (archive,) = DIST.glob("ummrm-*.tar.gz")
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(DIST), str(archive)]
    session.run(sys.executable, "-m", "pip", "--quiet", *wheel, env={"UMMRM_CUDA": "0"})


def built_wheel(session):
    wheels = sorted(DIST.glob("ummrm-*.whl"))
    return str(wheels[0]) if len(wheels) == 1 else not_run(session, f"{DIST} must hold one wheel, has {len(wheels)}")


@nox.session(requires=["distributions"])
def package(session):
    """The wheel in a fresh environment with its command line alone, tried from another folder than the checkout."""
    need_disk(session)
    wheel = built_wheel(session)
    session.install(CPU_TORCH, f"{wheel}[cli]")
    session.install("--no-deps", "--force-reinstall", wheel)
    folder = session.create_tmp()
    shutil.rmtree(folder)
    os.makedirs(folder)
    session.chdir(folder)
    session.run(*safe(Path(session.bin) / "python"), str(ROOT / "tests/support/installed_package.py"), folder)


def lowest_requirements():
    """What pyproject.toml requires for users, each at its lower bound; torch's has a session of its own."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["cli"], *extras["trl"]]:
        name, version = re.match(r"([\w.-]+)>=([\w.]+)", requirement).groups()
        if name != "torch":
            yield f"{name}=={version}"


USERS_TESTS = ("tests/hf", "tests/nn", "tests/trainer", "tests/cli")


def with_extras(session, *how):
    """The wheel with its users' extras, and the tests of what stands on other libraries."""
    need_disk(session)
    wheel = built_wheel(session)
    session.install(CPU_TORCH, f"{wheel}[cli,trl]", *how)
    session.install("pytest", "pytest-timeout", "hypothesis")
    session.install("--no-deps", "--force-reinstall", wheel)
    session.run("python", "-m", "pip", "list")
    fast_tier(session, *USERS_TESTS)


@nox.session(name="deepspeed")
def with_deepspeed(session):
    """The tests of engines for several processes with DeepSpeed, whose ZeRO runs on CPUs over gloo."""
    need_disk(session)
    # it compiles a small extension of its own at the first start, where two processes would wait for each other's lock
    built = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(Path(session.virtualenv.location) / "extensions")}
    session.install(CPU_TORCH, "setuptools", "ninja")
    install_sources(session)
    session.install(DEEPSPEED, env=built)
    session.env.update(built, PATH=os.pathsep.join([str(session.bin), os.environ["PATH"]]))
    python = safe(Path(session.bin) / "python")
    session.run(*python, "-c", "from deepspeed.comm.torch import build_shm_op; build_shm_op()")
    session.chdir(ROOT)
    tests = ("tests/trainer/test_engines.py", "tests/trainer/test_engine_checkpoints.py")
    tests += ("tests/pipeline/test_distributed_recipes.py",)
    session.run(
        *python, "-m", "pytest", "-q", "-m", "full", "-k", "zero", "-p", "no:cacheprovider", *(session.posargs or tests)
    )


@nox.session(name="extras-lowest", requires=["distributions"])
def extras_lowest(session):
    """Tests with transformers, TRL and the others at the lower bounds of pyproject.toml."""
    with_extras(session, *lowest_requirements())


@nox.session(name="extras-newest", requires=["distributions"])
def extras_newest(session):
    """Tests with the newest transformers, TRL and the others that pyproject.toml allows."""
    with_extras(session, "--upgrade", "--upgrade-strategy=eager")
