"""PEP 517 backend: setuptools, but building against the torch of the environment that is being installed into.

pip's isolated build hides that environment, so a torch listed in `build-system.requires` would be downloaded anew and
could be another version than the one that imports the extension. This backend looks past the isolation instead, and
asks pip only for what is absent. It knows nothing of the extension itself; that is setup.py.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata

from cuda_build import OLDEST_CMAKE, find_cmake

# The isolated build runs the target interpreter with a sitecustomize on PYTHONPATH; -I looks past it.
_HOST_PATH = json.loads(
    subprocess.check_output([sys.executable, "-I", "-c", "import json, sys; print(json.dumps(sys.path))"])
)
sys.path += [entry for entry in _HOST_PATH if entry not in sys.path]


def _version(name):
    try:
        return tuple(int(part) for part in metadata.version(name).split("+")[0].split(".")[:2] if part.isdigit())
    except metadata.PackageNotFoundError:
        return None


def _missing():
    """Build requirements that the environment does not meet. torch 2.11 cannot import setuptools 82 or newer."""
    torch, setuptools = _version("torch"), _version("setuptools")
    capped = torch is not None and torch < (2, 12)
    need = []
    if setuptools is None or setuptools < (77,) or (capped and setuptools >= (82,)):
        need.append("setuptools>=77,<82" if capped else "setuptools>=77")
    if torch is None:
        need.append("torch>=2.11")
    if _version("ninja") is None:
        need.append("ninja")
    # CMake compiles the CUDA kernels (tools/cuda_build.py), where there may be a compiler for them.
    nvcc = shutil.which("nvcc") or os.environ.get("CUDA_HOME") or os.path.exists("/usr/local/cuda/bin/nvcc")
    if nvcc and os.environ.get("UMMRM_CUDA") != "0" and find_cmake() is None:
        need.append(f"cmake>={'.'.join(map(str, OLDEST_CMAKE))}")
    return need


def get_requires_for_build_wheel(config_settings=None):
    return _missing()


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    return [requirement for requirement in _missing() if requirement.startswith("setuptools")]


def __getattr__(name):  # build_wheel, build_editable, build_sdist, prepare_metadata_for_build_*
    from setuptools import build_meta

    return getattr(build_meta, name)
