"""How setup.py finds out whether the CUDA kernels can be compiled, and has CMake compile them into a static library.

UMMRM_CUDA, read at build time: `auto` (default) compiles them if torch is built with CUDA and its nvcc is found, and
says why if not; `0` does not; `1` makes a missing part an error. UMMRM_CUDA_ARCHS (architectures as CMake names them,
`;` between them), UMMRM_CUTLASS and UMMRM_TENSOR_CORES (third_party/README.md) go to CMake, and UMMRM_HEAVY_COMPILERS
(compilers of tensor-core kernels at once; by default as many as memory takes). UMMRM_CUDA_LIBRARY is a libummrm_cuda.a
that CMake made before from the same sources: nothing of kernels/cuda is compiled then, which knows no torch and so
serves extensions for several. The standard library alone is used here.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_CMAKE = (3, 24)  # as CMakeLists.txt says
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Toolkit:
    """An installed CUDA toolkit: its folder, and nvcc's version as (major, minor)."""

    home: Path
    version: tuple[int, int]

    @property
    def nvcc(self):
        return self.home / "bin" / "nvcc"

    @property
    def library(self):
        return next(f for f in (self.home / "lib64", self.home / "lib") if f.is_dir())


class Missing(Exception):
    """Why the CUDA kernels are not compiled."""


def find_toolkit():
    """The toolkit of $CUDA_HOME, else of the nvcc on PATH, else /usr/local/cuda; None if there is none.

    The nvcc on PATH may be a wrapper script anywhere, so nvcc itself is asked where it lives.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for nvcc in (home and os.path.join(home, "bin", "nvcc"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if not nvcc or not os.access(nvcc, os.X_OK):
            continue
        asked = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        top, release = re.search(r"TOP=(\S+)", asked.stderr), re.search(r"release (\d+)\.(\d+)", version)
        if top and release:
            return Toolkit(Path(top[1]).resolve(), (int(release[1]), int(release[2])))
    return None


def choose_toolkit(torch_cuda, wish=None):
    """The toolkit to compile with, beside a torch built with CUDA version `torch_cuda` (None: without).

    Raises:
        Missing: there is nothing to compile with, or nothing was asked for, and UMMRM_CUDA allows that.
        SystemExit: UMMRM_CUDA is none of auto, 0 and 1, or it is 1 and something is missing.
    """
    wish = os.environ.get("UMMRM_CUDA", "auto") if wish is None else wish
    if wish not in ("auto", "0", "1"):
        sys.exit(f"UMMRM_CUDA must be auto, 0 or 1, got {wish!r}.")
    if wish == "0":
        raise Missing("it was built with UMMRM_CUDA=0")
    try:
        if torch_cuda is None:
            raise Missing("it was built for a torch without CUDA")
        toolkit = find_toolkit()
        if toolkit is None:
            raise Missing("no nvcc was found when it was built (on PATH, in CUDA_HOME or in /usr/local/cuda)")
        if toolkit.version[0] != int(torch_cuda.split(".")[0]):
            found = ".".join(map(str, toolkit.version))
            raise Missing(f"it was built for a torch with CUDA {torch_cuda}, and the nvcc found is {found}")
        if find_cmake() is None:
            raise Missing(f"no cmake {'.'.join(map(str, OLDEST_CMAKE))} or newer was found when it was built")
    except Missing as reason:
        if wish == "1":
            sys.exit(f"UMMRM_CUDA=1 asks for the CUDA kernels, which cannot be compiled: {reason}.")
        raise
    return toolkit


def find_cmake():
    """The cmake of the running environment, else of PATH, whichever CMakeLists.txt accepts; None if there is none.

    Distributions in use have older ones on PATH, which would end the build with an error.
    """
    candidates = [shutil.which("cmake")]
    try:
        import cmake

        candidates.insert(0, str(Path(cmake.CMAKE_BIN_DIR) / "cmake"))
    except (ModuleNotFoundError, AttributeError):
        pass
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"version (\d+)\.(\d+)", said)
        if version and (int(version[1]), int(version[2])) >= OLDEST_CMAKE:
            return candidate
    return None


def heavy_compilers():
    """How many compilers of tensor-core kernels run at once: each takes up to 6 GB, and half the memory is others'.

    UMMRM_HEAVY_COMPILERS says it for machines that tell less memory than they have, as some virtual ones do.
    """
    if given := os.environ.get("UMMRM_HEAVY_COMPILERS"):
        return int(given)
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in CONTAINER_LIMITS:
        text = limit.read_text().strip() if limit.is_file() else ""
        sizes += [int(text)] if text.isdigit() else []  # "max" is no limit
    return max(2, min(sizes) // (12 * 2**30))


def configure_command(toolkit, folder):
    """CMake's command line for a build folder that earlier builds may have left.

    What the environment does not name is taken out of the folder's cache: a build without tensor cores must not make
    the next one such. A spill, which a compiler that nobody has tried may have, slows a kernel and does not end a
    user's build.
    """
    ninja = shutil.which("ninja")
    command = [find_cmake(), "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DUMMRM_REFUSE_SPILLS=OFF"]
    command += [f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}", f"-DPython3_EXECUTABLE={sys.executable}"]
    command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    command.append(f"-DUMMRM_HEAVY_COMPILERS={heavy_compilers()}")
    for variable in ("UMMRM_CUDA_ARCHS", "UMMRM_CUTLASS", "UMMRM_TENSOR_CORES"):
        set_here = variable in os.environ
        command.append(f"-D{variable}={os.environ[variable]}" if set_here else f"-U{variable}")
    return [str(part) for part in command]


def compile_kernels(toolkit, folder, jobs):
    """Compiles kernels/cuda in `folder` with `jobs` compilers at once, and returns the static library's path.

    Only what has changed since the last time is compiled; with UMMRM_CUDA_LIBRARY nothing, and that file is returned.
    """
    if given := os.environ.get("UMMRM_CUDA_LIBRARY"):
        library = Path(given).resolve()
        if not library.is_file() or library.suffix != ".a":
            sys.exit(
                f"UMMRM_CUDA_LIBRARY must be a libummrm_cuda.a, got {given!r}; make one with "
                "`cmake --build FOLDER --target ummrm_cuda`, or leave the variable out to compile the kernels here."
            )
        return library
    configure = configure_command(toolkit, folder)
    subprocess.run(configure, check=True)
    subprocess.run([configure[0], "--build", str(folder), "--target", "ummrm_cuda", "-j", str(jobs)], check=True)
    return folder / "libummrm_cuda.a"
