"""Builds the operators' CUDA path over the kernels as nvcc compiled them: csrc/ sends CPU tensors the way of CUDA
tensors (UMMRM_EMULATED in csrc/device.h), the host code of kernels/cuda launches, and the machine of tests/ptx executes
the PTX.

    python tests/support/ptx_extension.py FOLDER BUILD        into FOLDER, of what CMake made in BUILD with UMMRM_PTX
    LD_PRELOAD=FOLDER/device_allocator.so UMMRM_PTX=arch=90,order=late,seed=1 pytest --library FOLDER/ummrm_ptx.so ...

The first gives torch's tensors a GPU's alignment, and the machine the bounds of each.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent.parent
MACHINE = ROOT / "tests/ptx"
COMPILE = ["-std=c++20", "-O1", "-w", "-fno-strict-aliasing", "-fvisibility=hidden", "-DUMMRM_EMULATED"]


def allocator(folder):
    """The library to preload, compiled where its source is newer."""
    source, target = MACHINE / "extension/device_allocator.cpp", folder / "device_allocator.so"
    if not target.is_file() or target.stat().st_mtime < source.stat().st_mtime:
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-o", str(target), str(source), "-ldl"]
        subprocess.run(command, check=True)
    return target


def compiled(build):
    """The kernels' library of a CMake build and the machine's, in the order in which a linker takes them.

    Raises:
        FileNotFoundError: the build lacks them.
    """
    runtime = sorted((build / "tests/ptx/CMakeFiles/ptx_runtime.dir").glob("*.o"))
    objects = [path for path in runtime if not path.name.endswith(("_case.cpp.o", "planting.cpp.o"))]
    archives = [build / "libummrm_cuda.a", build / "tests/ptx/libptx_machine.a"]
    missing = [path for path in archives if not path.is_file()] + ([] if objects else [build / "tests/ptx"])
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing: build with -DUMMRM_PTX=ON first")
    return [*objects, *archives]


def build(folder, cmake_build):
    """Compiles into `folder` what has changed, and returns the library's path."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    allocator(folder)
    parts = compiled(Path(cmake_build).resolve())
    csrc = [
        p
        for p in (ROOT / "csrc").glob("*.cpp")
        if "UMMRM_REGISTER(" in p.read_text() or p.stem in ("check", "gemm", "large_empty")
    ]
    sources = []
    for path in sorted([*csrc, *(ROOT / "kernels/cpu").glob("*.cpp"), MACHINE / "extension/from_environment.cpp"]):
        # objects are named by their sources, several of which share a name
        wrapper, text = folder / f"{path.parent.name}_{path.stem}.cpp", f'#include "{path}"\n'
        if not wrapper.is_file() or wrapper.read_text() != text:
            wrapper.write_text(text)
        sources.append(str(wrapper))
    include = [MACHINE, ROOT / "kernels/cpu", ROOT / "kernels/include", ROOT / "csrc"]
    library = folder / "ummrm_ptx.so"
    newest = max(path.stat().st_mtime for path in parts)
    if library.is_file() and library.stat().st_mtime < newest:  # ninja does not watch what is linked
        library.unlink()
    cpp_extension.load(
        "ummrm_ptx",
        sources,
        extra_cflags=COMPILE,
        extra_include_paths=[str(path) for path in include],
        extra_ldflags=[*(str(path) for path in parts), "-ldl"],
        build_directory=str(folder),
        is_python_module=False,
        is_standalone=False,
    )
    return library


if __name__ == "__main__":
    print(torch.__version__, build(sys.argv[1], sys.argv[2]))
