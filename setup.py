"""Builds the extension `ummrm._C` from csrc/ and kernels/cpu/: the folders are the source list. Where torch is built
with CUDA and its nvcc is found, CMake compiles kernels/cuda for it (tools/cuda_build.py).

The metadata is in pyproject.toml. The build writes `ummrm/_build_record.json` last, beside the extension, so that the
package can tell which torch it was compiled against without loading it, and why it has no CUDA kernels if it has none.
Environment variables read at build time: MAX_JOBS (parallel compilers; torch's), CXX (the compiler), and those of
tools/cuda_build.py: UMMRM_CUDA, UMMRM_CUDA_ARCHS, UMMRM_CUTLASS, UMMRM_TENSOR_CORES, UMMRM_HEAVY_COMPILERS,
UMMRM_CUDA_LIBRARY, CUDA_HOME.
"""

import json
import os
import platform
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build import build

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
from cuda_build import Missing, choose_toolkit, compile_kernels  # noqa: E402

CXX_STANDARD = "c++20"  # torch 2.15 refuses C++17
COMPILE = [
    "-O3",
    "-g0",
    f"-std={CXX_STANDARD}",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
    # Without these two, GCC keeps comparisons and square roots scalar; neither changes a result.
    "-fno-math-errno",
    "-fno-trapping-math",
]


def openmp(torch_dir):
    """Flags that put at::parallel_for on torch's own thread pool.

    at::parallel_for is a header: without OpenMP it is serial, and with another OpenMP runtime than torch's it would
    start a second pool that torch.set_num_threads does not reach. So the extension is linked to the very file that
    torch ships (pip wheels: lib/libgomp*.so*), and to the system's only where torch ships none (a torch built by
    hand or by conda, which then uses the system's as well).
    """
    lib, include = torch_dir / "lib", torch_dir / "include"
    if sys.platform == "darwin":
        ours = lib / "libomp.dylib"
        if ours.exists() and (include / "omp.h").exists():
            return ["-Xpreprocessor", "-fopenmp"], [str(ours)]
        return [], []
    shipped = sorted(lib.glob("libgomp*.so*")) or sorted((torch_dir.parent / "torch.libs").glob("libgomp*.so*"))
    return ["-fopenmp"], [str(shipped[0])] if shipped else ["-fopenmp"]


def extension():
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    try:  # in an environment that is not activated, ninja is importable but not on PATH
        import ninja

        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ["PATH"]
    except ModuleNotFoundError:
        pass

    torch_dir = Path(torch.__file__).parent
    compile_openmp, link = openmp(torch_dir)
    try:
        toolkit, no_cuda = choose_toolkit(torch.version.cuda), None
        print(f"ummrm: compiling CUDA kernels with {toolkit.nvcc}", file=sys.stderr)
    except Missing as reason:
        toolkit, no_cuda = None, str(reason)
        print(f"ummrm: no CUDA kernels in this build: {reason}", file=sys.stderr)
    sources = sorted(p.relative_to(ROOT).as_posix() for d in ("csrc", "kernels/cpu") for p in (ROOT / d).glob("*.cpp"))
    ext = CppExtension(
        "ummrm._C",
        sources,
        include_dirs=[str(ROOT / "kernels/include")] + ([str(toolkit.home / "include")] if toolkit else []),
        define_macros=[("UMMRM_CUDA", None)] if toolkit else [],
        library_dirs=[str(torch_dir / "lib"), str(toolkit.library)] if toolkit else [],
        libraries=["c10_cuda", "cudart"] if toolkit else [],
        extra_compile_args=COMPILE + compile_openmp,
        extra_link_args=link,
    )

    # One folder per interpreter and torch: two torches never share an object, and what one left is never shipped for
    # another. It is kept between builds, where an editable install would use a temporary one, so that ninja recompiles
    # only what has changed.
    folder = ROOT / "build" / f"{platform.machine()}-{sys.implementation.cache_tag}-torch{torch.__version__}"

    class BuildFolder(build):
        def initialize_options(self):
            super().initialize_options()
            self.build_base = str(folder)

    class Build(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(folder / "temp")
            self.force = True  # always link: setuptools compares times with sources alone, not with torch or headers

        def run(self):
            record = Path(self.get_ext_fullpath("ummrm._C")).parent / "_build_record.json"
            record.unlink(missing_ok=True)
            if toolkit:
                jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count())
                ext.extra_objects = [str(compile_kernels(toolkit, folder / "cuda", jobs))]
            super().run()
            content = {
                "torch_version": str(torch.__version__),
                "torch_cuda": torch.version.cuda,
                "no_cuda_kernels": no_cuda,
                "cxx_standard": CXX_STANDARD,
                "python": platform.python_version(),
                "sources": sources,
            }
            record.write_text(json.dumps(content, indent=1) + "\n")

    return [ext], {"build": BuildFolder, "build_ext": Build}


# Metadata and source archives need no torch, and do not wait for its import; anything that compiles does.
COMPILES = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}
ext_modules, cmdclass = extension() if COMPILES & set(sys.argv) else ([], {})

setup(
    packages=find_packages(include=["ummrm", "ummrm.*"]),
    include_package_data=False,  # what the source archive holds beside the package stays there
    package_data={
        "ummrm": ["py.typed"],
        "ummrm.evaluation": ["report.html.j2"],
        "ummrm.ops.triton_kernels": ["tuned.json"],
    },
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
