"""Builds the operators' CUDA path for the host emulator: csrc/ sends CPU tensors the way of CUDA tensors, and the
kernels of kernels/cuda run as fibers (UMMRM_EMULATED in csrc/device.h). What is tested so is everything between Python
and the kernels: checks, allocation, workspaces, arguments. It is a library to load over the extension (`pytest
--library`).
"""

import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent.parent
EMULATOR = ROOT / "tests/emulator"


def build(folder):
    """Compiles into `folder` what has changed, and returns the library's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    csrc = [
        p
        for p in (ROOT / "csrc").glob("*.cpp")
        if "UMMRM_REGISTER(" in p.read_text() or p.stem in ("check", "gemm", "large_empty")
    ]
    kernels = [p for p in (ROOT / "kernels").glob("c*/*") if p.suffix in (".cpp", ".cu")]
    sources = []
    for path in sorted([*csrc, *kernels, EMULATOR / "emulator.cpp"]):
        # Objects are named by their sources, several of which share a name; and .cu would be taken for CUDA.
        wrapper, text = folder / f"{path.parent.name}_{path.stem}.cpp", f'#include "{path}"\n'
        if not wrapper.is_file() or wrapper.read_text() != text:
            wrapper.write_text(text)
        sources.append(str(wrapper))
    cpp_extension.load(
        "ummrm_emulated",
        sources,
        extra_cflags=["-std=c++20", "-O1", "-w", "-fno-strict-aliasing", "-fvisibility=hidden", "-DUMMRM_EMULATED"]
        + ['-DUMMRM_CUDA_ARCHITECTURES=\\"emulated\\"', "-D__CUDACC_VER_MAJOR__=0", "-D__CUDACC_VER_MINOR__=0"],
        extra_include_paths=[
            str(EMULATOR),
            str(ROOT / "kernels/cuda"),
            str(ROOT / "kernels/include"),
            str(ROOT / "csrc"),
        ],
        build_directory=str(folder),
        is_python_module=False,
        is_standalone=False,
    )
    return folder / "ummrm_emulated.so"


if __name__ == "__main__":
    print(torch.__version__, build(sys.argv[1]))
