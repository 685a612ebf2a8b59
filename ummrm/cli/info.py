"""`ummrm info`: what the compiled extension was built with."""

from __future__ import annotations

import json

from .. import __version__
from ..ops import library


def info() -> None:
    """Prints what the compiled extension was built with, which kernels it uses, and why it has none for CUDA."""
    record = {"ummrm": __version__, **library.build_info(), "no_cuda_kernels": library.no_cuda_kernels}
    print(json.dumps(record, indent=2, default=str))
