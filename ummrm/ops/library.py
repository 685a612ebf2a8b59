"""The compiled extension as torch operators: loads `_C`, then registers the operators' fakes and their autograd.

The only importer of `_C`. Schemas stand in csrc/module.cpp and kernels in csrc/, fakes in `fakes.py` and
`composed_fakes.py`, autograd in `autograd.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from . import (
    autograd,
    composed_fakes,  # noqa: F401  (adds its fakes to those of `fakes`)
    fakes,
)

_RECORD = "_build_record.json"  # written by setup.py beside the extension
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps <the ummrm source folder>"


def check_build(folder: Path, running: str) -> dict:
    """The build's record, as setup.py wrote it beside the extension in `folder`.

    Raises ImportError unless that was built against torch version `running`, up to the patch.

    torch's C++ ABI changes with every minor version; loading a mismatched library ends in an undefined symbol or worse.
    """
    path = folder / _RECORD
    if not path.is_file():
        raise ImportError(f"ummrm: the compiled extension `ummrm._C` is missing in {folder}; build it: {_REBUILD}")
    record = json.loads(path.read_text())
    built = record["torch_version"]
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"ummrm: `ummrm._C` was built against torch {built} and must run with the same minor version, "
            f"but torch {running} is installed. Rebuild it: {_REBUILD}"
        )
    return record


_record = check_build(Path(__file__).parent.parent, torch.__version__)
from .. import _C  # noqa: E402  (only after the check)

build_info, tile_table = _C.build_info, _C.tile_table
activation_names, onednn_product = _C.activation_names, _C.onednn_product
host_product = _C.host_product  # one fp32 product of moe_ffn's on a CPU, for its test and its benchmark
use_fusions = _C.use_fusions  # for tests and measurement: "all" of the fused CUDA kernels, "none", or "measured"
use_host_layer = _C.use_host_layer  # off where `moe_ffn` has to follow other backends' operators on the CPU
checks = _C.checks  # each operator's argument checks alone, for backends that are not compiled


_checking = False


def check(enabled: bool) -> None:
    """Whether values are checked on devices where reading them waits for the device. CPU tensors always are."""
    global _checking
    _C.check(enabled)
    _checking = bool(enabled)


def checking() -> bool:
    """What `check` last said; for checks outside the extension."""
    return _checking


no_cuda_kernels: str | None = _record["no_cuda_kernels"]  # why the extension has none; None if it has

_library = torch.library.Library("ummrm", "IMPL")


fakes.register(_library)
autograd.register(_library)
