"""The CUDA side of the build, without a GPU: which toolkit is chosen and what is said where there is none, and that the
launches in csrc/ compile. The kernels are compiled by `make test-cpp`, the whole extension in the slow tier.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from torch.utils import cpp_extension

_SPEC = importlib.util.spec_from_file_location("cuda_build", ROOT / "tools/cuda_build.py")
cuda_build = importlib.util.module_from_spec(_SPEC)
sys.modules["cuda_build"] = cuda_build  # where its dataclass looks itself up
_SPEC.loader.exec_module(cuda_build)


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Installs a pretended nvcc: machine(version, on="path", "home" or "wrapper"), and gives its toolkit's folder."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "UMMRM_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def install(version, on="path"):
        home = tmp_path / f"cuda-{version}"
        # As nvcc does it: the dry run tells the folder on stderr, and the version says "release 13.0, V...".
        write_program(
            home / "bin/nvcc",
            f'case "$1" in --dryrun) echo "#$ TOP={home}/bin/.." >&2;; *) echo "release {version}, V";; esac',
        )
        if on == "home":
            monkeypatch.setenv("CUDA_HOME", str(home))
        elif on == "path":
            monkeypatch.setenv("PATH", f"{home}/bin:/usr/bin:/bin")
        else:
            write_program(tmp_path / "wrappers/nvcc", f'exec {home}/bin/nvcc "$@"')
            monkeypatch.setenv("PATH", f"{tmp_path}/wrappers:/usr/bin:/bin")
        return home

    monkeypatch.setattr(cuda_build, "find_cmake", lambda: "/usr/bin/cmake")
    return install


@pytest.mark.parametrize("on", ["path", "home", "wrapper"])
def test_the_toolkit_is_where_nvcc_says(machine, on):
    home = machine("13.0", on)
    toolkit = cuda_build.choose_toolkit("13.0", "auto")
    assert toolkit.home == home and toolkit.version == (13, 0) and toolkit.nvcc == home / "bin/nvcc"


def test_cuda_home_comes_before_path(machine):
    machine("12.8", "path")
    home = machine("13.0", "home")
    assert cuda_build.choose_toolkit("13.1").home == home


def test_a_minor_version_may_differ_and_a_major_may_not(machine):
    machine("13.2")
    assert cuda_build.choose_toolkit("13.0").version == (13, 2)
    with pytest.raises(cuda_build.Missing, match=r"a torch with CUDA 12.8, and the nvcc found is 13.2"):
        cuda_build.choose_toolkit("12.8")


def test_what_is_missing_is_said_and_is_an_error_only_where_asked_for(machine, monkeypatch):
    machine("13.0")
    reasons = {"a torch without CUDA": (None, {}), "no cmake": ("13.0", {"find_cmake": lambda: None})}
    reasons["no nvcc"] = "13.0", {"find_toolkit": lambda: None}
    for reason, (torch_cuda, changes) in reasons.items():
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(cuda_build, name, value)
            with pytest.raises(cuda_build.Missing, match=reason):
                cuda_build.choose_toolkit(torch_cuda, "auto")
            with pytest.raises(SystemExit, match=f"UMMRM_CUDA=1 .*{reason}"):
                cuda_build.choose_toolkit(torch_cuda, "1")
    with pytest.raises(cuda_build.Missing, match="UMMRM_CUDA=0"):
        cuda_build.choose_toolkit("13.0", "0")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        cuda_build.choose_toolkit("13.0", "yes")


def test_an_old_cmake_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cmake", None)  # the environment's own, which would come first
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    oldest = (ROOT / "CMakeLists.txt").read_text().split("cmake_minimum_required(VERSION ")[1].split(")")[0]
    for version, found in (("3.22.1", False), (f"{oldest}.0", True), ("3.100.2", True), ("4.0.0-rc1", True)):
        write_program(tmp_path / "cmake", f'echo "cmake version {version}"')
        assert cuda_build.find_cmake() == (str(tmp_path / "cmake") if found else None), version


def test_heavy_compilers_fit_into_memory(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(cuda_build, "CONTAINER_LIMITS", (limit, tmp_path / "absent"))
    monkeypatch.delenv("UMMRM_HEAVY_COMPILERS", raising=False)
    for gigabytes, limited, want in ((8, "max", 2), (128, "max", 10), (128, str(16 * 2**30), 2), (64, None, 5)):
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 2**18}.get)
        limit.unlink(missing_ok=True)
        if limited is not None:
            limit.write_text(limited + "\n")
        assert cuda_build.heavy_compilers() == want, (gigabytes, limited)
    monkeypatch.setenv("UMMRM_HEAVY_COMPILERS", "7")
    assert cuda_build.heavy_compilers() == 7


ALL_MAJOR = "75-real;80-real;90-real;100-real;110-real;120"


@pytest.mark.parametrize(
    ("archs", "ampere", "hopper", "without"),
    [
        ("75", "", "", "75"),
        ("80", "80", "", ""),
        ("86", "86", "", ""),
        ("89-real", "89-real", "", ""),
        ("90", "", "90a-real", ""),
        ("90a", "", "90a-real", ""),
        ("90-virtual", "", "90a-real", ""),
        ("100", "100", "", ""),
        ("120", "120", "", ""),
        ("80;90a-real;100a-real", "80", "90a-real", ""),  # the newest takes Ampere's PTX
        ("80-real;90a-real;100a-real", "80-real;100a-real", "90a-real", ""),
        ("native", "", "90a-real", ""),
        ("all-major", "80-real;100-real;110-real;120", "90a-real", "75-real"),
    ],
)
def test_every_architecture_gets_its_tensor_cores(tmp_path, archs, ampere, hopper, without):
    """Real CMake on the function that CMakeLists.txt asks, with what it says of `native` and `all-major` given."""
    if cuda_build.find_cmake() is None:
        pytest.skip("no cmake on this machine that CMakeLists.txt accepts")
    script = tmp_path / "ask.cmake"
    script.write_text(
        f'set(CMAKE_CUDA_ARCHITECTURES_NATIVE "90-real")\nset(CMAKE_CUDA_ARCHITECTURES_ALL_MAJOR "{ALL_MAJOR}")\n'
        f'include("{ROOT}/tools/architectures.cmake")\nset(archs "{archs}")\nummrm_expand_architectures(archs)\n'
        'ummrm_tensor_core_architectures("${archs}" a h w)\nmessage(STATUS "${a}|${h}|${w}")\n'
    )
    done = subprocess.run([cuda_build.find_cmake(), "-P", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"-- {ampere}|{hopper}|{without}"


def test_native_needs_a_gpu(tmp_path):
    if cuda_build.find_cmake() is None:
        pytest.skip("no cmake on this machine that CMakeLists.txt accepts")
    script = tmp_path / "ask.cmake"
    script.write_text(f'include("{ROOT}/tools/architectures.cmake")\nset(a native)\nummrm_expand_architectures(a)\n')
    done = subprocess.run([cuda_build.find_cmake(), "-P", script], capture_output=True, text=True)
    assert done.returncode and "UMMRM_CUDA_ARCHS must name architectures" in done.stderr


def test_a_library_that_was_made_before_is_taken(tmp_path, monkeypatch):
    library = tmp_path / "libummrm_cuda.a"
    library.write_bytes(b"!<arch>\n")
    monkeypatch.setenv("UMMRM_CUDA_LIBRARY", str(library))
    assert cuda_build.compile_kernels(None, tmp_path / "folder", 1) == library
    assert not (tmp_path / "folder").exists()
    for wrong in (str(tmp_path), str(tmp_path / "absent.a")):
        monkeypatch.setenv("UMMRM_CUDA_LIBRARY", wrong)
        with pytest.raises(SystemExit, match="UMMRM_CUDA_LIBRARY must be .*, got .*; make one with"):
            cuda_build.compile_kernels(None, tmp_path / "folder", 1)


def test_an_earlier_build_leaves_no_settings(tmp_path, monkeypatch):
    """Real CMake on a project that prints what it was told, in one build folder."""
    if cuda_build.find_cmake() is None:
        pytest.skip("no cmake on this machine that CMakeLists.txt accepts")
    for variable in ("UMMRM_CUDA_ARCHS", "UMMRM_CUTLASS", "UMMRM_TENSOR_CORES"):
        monkeypatch.delenv(variable, raising=False)
    project, folder = tmp_path / "project", tmp_path / "build"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(told LANGUAGES NONE)\n"
        'set(UMMRM_CUDA_ARCHS "80" CACHE STRING "")\noption(UMMRM_TENSOR_CORES "" ON)\n'
        'message(STATUS "told ${UMMRM_CUDA_ARCHS} ${UMMRM_TENSOR_CORES} ${UMMRM_REFUSE_SPILLS}")\n'
    )
    monkeypatch.setattr(cuda_build, "ROOT", project)
    toolkit = cuda_build.Toolkit(Path("/usr/local/cuda"), (13, 0))

    def told():
        done = subprocess.run(cuda_build.configure_command(toolkit, folder), capture_output=True, text=True, check=True)
        return re.search(r"told (.*)", done.stdout)[1]

    assert told() == "80 ON OFF"
    with monkeypatch.context() as patch:
        patch.setenv("UMMRM_TENSOR_CORES", "0")
        patch.setenv("UMMRM_CUDA_ARCHS", "90a-real")
        assert told() == "90a-real 0 OFF"
    assert told() == "80 ON OFF"


def test_a_broken_nvcc_is_none(machine, tmp_path, monkeypatch):
    write_program(tmp_path / "broken/nvcc", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/broken:/usr/bin:/bin")
    toolkit = cuda_build.find_toolkit()
    assert toolkit is None or toolkit.home.is_relative_to("/usr/local")  # a real one, if this machine has it


def test_the_launches_compile(tmp_path):
    """Every csrc file that launches CUDA kernels, as one translation unit, against torch's and CUDA's headers."""
    toolkit = cuda_build.find_toolkit()
    if toolkit is None:
        pytest.skip("no nvcc on this machine: the CUDA launches of csrc/ are not compiled")
    # The one header that a CPU wheel of torch lacks, of those that c10/cuda needs.
    (tmp_path / "c10/cuda/impl").mkdir(parents=True)
    (tmp_path / "c10/cuda/impl/cuda_cmake_macros.h").write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    unit = tmp_path / "launches.cpp"
    files = [p for p in sorted((ROOT / "csrc").glob("*.cpp")) if "on_cuda(" in p.read_text()]
    assert len(files) >= 4
    unit.write_text("".join(f'#define implement implement_{p.stem}\n#include "{p}"\n#undef implement\n' for p in files))
    folders = [tmp_path, ROOT / "kernels/include", toolkit.home / "include", *cpp_extension.include_paths()]
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", "-DUMMRM_CUDA", "-Wall", "-Werror"]
    command += ["-Wno-psabi", "-Wno-unknown-pragmas", *(f"-isystem{p}" for p in folders), str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
