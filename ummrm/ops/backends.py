"""Which backend serves which device, and the switch between them: one row a backend.

PyTorch's dispatcher chooses by device, so a backend is a set of kernels on device keys and nothing here runs per call.
The compiled kernels register themselves when `library` loads; any other backend is registered here, op by op, over
them, behind the extension's argument checks, which are the only ones. Where the extension has no CUDA kernel for an
operator, Triton's serves it, if Triton is installed; it is imported when the first of them runs. It also serves GPUs
whose tensor cores it uses better than the extension does, unless `use_backend` has said something else. The composed
operators (`moe_ffn`, `merge_ffn`, `merged_ffn`) call the small ones through the dispatcher and so follow the switch; a
backend may bring a composition of its own, which serves where it serves all that it is made of.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from . import library, reference
from .autograd import composite_route


def _checked(op: str, kernel: Callable) -> Callable:
    """`kernel` behind the extension's checks of `op`, with the defaults that the dispatcher leaves out filled in."""
    check, arguments = getattr(library.checks, op), getattr(torch.ops.ummrm, op).default._schema.arguments
    defaults = tuple(a.default_value for a in arguments)

    @functools.wraps(kernel)
    def checked(*args):
        args += defaults[len(args) :]
        check(*args)
        return kernel(*args)

    return checked


_REFERENCE_KERNELS = {
    "route": _checked("route", composite_route),
    **{
        name: _checked(name, getattr(reference, name))
        for name in (
            "route_backward",
            "sort_slots",
            "permute",
            "unpermute",
            "unpermute_backward",
            "expert_gemm",
            "expert_gemm_wgrad",
            "expert_gemm_wgrad_add",
            "expert_bias_grad",
            "activation",
            "activation_backward",
            "expert_glu",
            "expert_glu_backward",
            "merge_experts",
            "merge_experts_dots",
            "merge_experts_grads",
        )
    },
}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def load_triton() -> ModuleType:
    """Imports Triton's kernels, `ummrm.ops.triton_kernels`.

    Raises:
        ImportError: Triton is not installed, or too old.
    """
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        raise ImportError(f"ummrm: Triton must be 3.6 or newer, got {triton.__version__}; pip install -U triton.")
    from . import triton_kernels

    return triton_kernels


def _triton_kernel(op: str) -> Callable:
    def kernel(*args):
        return load_triton().KERNELS[op](*args)

    return _checked(op, kernel)


def _interprets() -> bool:
    """Whether Triton runs kernels on the CPU in this process: TRITON_INTERPRET=1, which Triton reads."""
    if not _installed("triton"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _triton_obstacle() -> str | None:
    if not _installed("triton"):
        return "Triton is not installed; on Linux: pip install 'ummrm[triton]'."
    try:
        interprets = _interprets()
        load_triton()
    except ImportError as error:
        return str(error)
    if not interprets and not torch.cuda.is_available():
        return "there is no GPU; to interpret its kernels on the CPU, start Python with TRITON_INTERPRET=1."
    return None


# Triton's own composition, with kernels fused
_COMPOSED = ("moe_ffn", "moe_ffn_forward", "moe_ffn_backward", "moe_ffn_backward_add")
_TRITON_KERNELS = {op: _triton_kernel(op) for op in (*_REFERENCE_KERNELS, *_COMPOSED)}


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        devices: device types it can serve.
        kernels: operator name to Python kernel; empty for the compiled ones, which register themselves.
        obstacle: why it cannot run in this process, or None.
        interprets: whether in this process its kernels are interpreted, and so serve the CPU as well.
    """

    devices: tuple[str, ...]
    kernels: dict[str, Callable]
    obstacle: Callable[[], str | None] = lambda: None
    interprets: Callable[[], bool] = lambda: False

    def served(self) -> tuple[str, ...]:
        """The device types that it serves in this process."""
        return (*self.devices, "cpu") if self.interprets() else self.devices


BACKENDS = {
    "compiled": Backend(("cpu", "cuda") if library.no_cuda_kernels is None else ("cpu",), {}),
    "reference": Backend(("cpu", "cuda"), _REFERENCE_KERNELS),
    "triton": Backend(("cuda",), _TRITON_KERNELS, _triton_obstacle, _interprets),  # ROCm's key is CUDA too
}

# Where no row of the table serves a device, the dispatcher's own message lists dispatch keys; this one says what to do.
_GAPS = ("cuda", "mps", "xpu")


def _refusal(op: str, device: str) -> Callable:
    or_triton = ", install Triton ('ummrm[triton]')" if device == "cuda" else ""

    def refuse(*args, **kwargs):
        reason = ""
        if device == "cuda" and library.no_cuda_kernels is not None:
            reason = f" (this build has no CUDA kernels: {library.no_cuda_kernels})"
        raise ValueError(
            f"ummrm.{op}: `device` must be of a type that this build has kernels for, got {device!r}{reason}; move the "
            f"model and its inputs to 'cpu'{or_triton}, or install a build of ummrm with kernels for it."
        )

    return refuse


def _fill_gaps() -> torch.library.Library:
    """Registers Triton's kernels, else refusals, where there is no kernel. They end with what is returned."""
    filler = torch.library.Library("ummrm", "IMPL")
    triton = BACKENDS["triton"].devices if _installed("triton") else ()
    for device in _GAPS:
        key = device.upper()
        gaps = [
            op for op in _REFERENCE_KERNELS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ummrm::{op}", key)
        ]
        for op in gaps:
            filler.impl(op, _TRITON_KERNELS[op] if device in triton else _refusal(op, device), key)
        if device in triton and len(gaps) == len(_REFERENCE_KERNELS):
            for op in _COMPOSED:
                filler.impl(op, _TRITON_KERNELS[op], key)
    return filler


_filler = _fill_gaps()
_overriding: tuple[str, torch.library.Library] | None = None
_asked = False  # whether `use_backend` was called: what it said stays

# Major compute capability of GPUs on which Triton is the default. sm_100: the extension has Ampere's mma.sync for it, a
# sixth of what its tensor cores do or less; Triton emits tcgen05. sm_120 has no tcgen05.
_TRITON_FIRST = (10,)


def _choose_by_gpu() -> None:
    """Makes Triton the default where all GPUs of the process are such as `_TRITON_FIRST` has, and Triton can run."""
    if _asked or "cuda" not in BACKENDS["compiled"].devices or BACKENDS["triton"].obstacle() is not None:
        return
    majors = [torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())]
    if majors and all(major in _TRITON_FIRST for major in majors):
        _serve_by("triton")


def use_backend(name: str) -> None:
    """Makes backend `name` serve every device that it can, for this process: a switch for tests and debugging.

    Call it before the first operator runs: a graph that `torch.compile` made before may keep what it was traced with.

    Args:
        name: `"compiled"` (the extension's C++ and CUDA kernels, the default), `"reference"` (plain torch, slow), or
            `"triton"` (GPUs, the default on those of compute capability 10; also the CPU in a process started with
            TRITON_INTERPRET=1, slower still).

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run in this process; nothing has changed then.
    """
    global _asked
    if name not in BACKENDS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}.")
    if obstacle := BACKENDS[name].obstacle():
        raise RuntimeError(f"Backend {name!r} cannot run here: {obstacle}")
    _asked = True
    _serve_by(name)


def _serve_by(name: str) -> None:
    global _overriding, _filler
    backend = BACKENDS[name]
    if _overriding is not None:
        _overriding[1]._destroy()  # the kernels below come back
        _overriding = None
    _filler._destroy()  # torch 2.11 lets no Python kernel replace another
    if backend.kernels:
        overriding = torch.library.Library("ummrm", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # overriding is the purpose
            for op, kernel in backend.kernels.items():
                for device in backend.served():
                    overriding.impl(op, kernel, device.upper())
        _overriding = name, overriding
    library.use_host_layer("cpu" not in backend.served() or not backend.kernels)
    _filler = _fill_gaps()


def backend_for(device: torch.device | str) -> str:
    """Name of the backend whose kernels run on `device`.

    Raises:
        ValueError: no backend serves that device type.
    """
    kind = torch.device(device).type
    if _overriding is not None and kind in BACKENDS[_overriding[0]].served():
        return _overriding[0]
    for name, backend in BACKENDS.items():
        if kind in backend.devices and not backend.kernels:
            return name
    if kind in BACKENDS["triton"].devices and _installed("triton"):
        return "triton"
    served = sorted({d for backend in BACKENDS.values() for d in backend.devices})
    raise ValueError(
        f"`device` must be of a type that a backend serves, got {kind!r}; move the tensors to {' or '.join(served)}"
        + (", after ummrm.use_backend('reference')." if kind in served else ".")
    )


# When CUDA starts, which asking for a GPU's capability would do, and which is the user's to do. A private name.
if hasattr(torch.cuda, "_lazy_call"):
    torch.cuda._lazy_call(_choose_by_gpu)
