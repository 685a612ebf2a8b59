"""Which backend serves which device, and the switch between them: one row a backend.

PyTorch's dispatcher chooses by device, so a backend is a set of kernels on device keys and nothing here runs per call.
The compiled kernels register themselves when `_library` loads; any other backend is registered here, op by op, over
them. The composed operators (`moe_ffn`, `merged_ffn`) call the small ones through the dispatcher and so follow the
switch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from . import _library, reference


def _reference_route(logits, mask, clean_logits, top_k, gate, fixed_shared_weight):
    return tuple(reference.route(logits, top_k, mask, clean_logits, gate, fixed_shared_weight))


def _reference_sort_slots(expert_indices, num_experts):
    if expert_indices.numel():
        low, high = expert_indices.aminmax()
        if low < -1 or high >= num_experts:
            raise IndexError(
                f"ummrm.sort_slots: `expert_indices` must lie in [-1, {num_experts - 1}] (-1 marks a masked token), "
                f"got values from {low} to {high}; take it from ummrm.ops.route with the same number of experts."
            )
    return reference.sort_slots(expert_indices, num_experts)


_REFERENCE_KERNELS = {
    "route": _reference_route,
    "sort_slots": _reference_sort_slots,
    **{
        name: getattr(reference, name)
        for name in (
            "route_backward",
            "permute",
            "unpermute",
            "unpermute_backward",
            "expert_gemm",
            "expert_gemm_wgrad",
            "expert_bias_grad",
            "activation",
            "activation_backward",
            "merge_experts",
            "merge_experts_dots",
        )
    },
}


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        devices: device types it can serve.
        kernels: operator name to Python kernel; empty for the compiled ones, which register themselves.
        obstacle: why it cannot run in this process, or None.
    """

    devices: tuple[str, ...]
    kernels: dict[str, Callable]
    obstacle: Callable[[], str | None] = lambda: None


BACKENDS = {
    "compiled": Backend(("cpu", "cuda") if _library.no_cuda_kernels is None else ("cpu",), {}),
    "reference": Backend(("cpu", "cuda"), _REFERENCE_KERNELS),
}

# Where no row of the table serves a device, the dispatcher's own message lists dispatch keys; this one says what to do.
_REFUSED_DEVICES = ("cuda", "mps", "xpu")


def _refusal(op: str, device: str) -> Callable:
    def refuse(*args, **kwargs):
        reason = ""
        if device == "cuda" and _library.no_cuda_kernels is not None:
            reason = f" (this build has no CUDA kernels: {_library.no_cuda_kernels})"
        raise ValueError(
            f"ummrm.{op}: `device` must be of a type that this build has kernels for, got {device!r}{reason}; move the "
            "model and its inputs to 'cpu', or install a build of ummrm with kernels for it."
        )

    return refuse


def _refuse(devices: Iterable[str]) -> torch.library.Library:
    """Registers refusals on those of `devices` that have no kernels. They end when what is returned is destroyed."""
    library = torch.library.Library("ummrm", "IMPL")
    for op in _REFERENCE_KERNELS:
        for device in devices:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ummrm::{op}", device.upper()):
                library.impl(op, _refusal(op, device), device.upper())
    return library


_refusals = _refuse(_REFUSED_DEVICES)
_overriding: tuple[str, torch.library.Library] | None = None


def use_backend(name: str) -> None:
    """Makes backend `name` serve every device that it can, for this process: a switch for tests and debugging.

    Call it before the first operator runs: a graph that `torch.compile` made before may keep what it was traced with.

    Args:
        name: `"compiled"` (the extension's C++ and CUDA kernels, the default) or `"reference"` (plain torch, slow).

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run in this process; nothing has changed then.
    """
    global _overriding, _refusals
    if name not in BACKENDS:
        raise ValueError(f"`name` must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}.")
    backend = BACKENDS[name]
    if obstacle := backend.obstacle():
        raise RuntimeError(f"Backend {name!r} cannot run here: {obstacle}")
    if _overriding is not None:
        _overriding[1]._destroy()  # the kernels below come back
        _overriding = None
    _refusals._destroy()  # torch 2.11 lets no Python kernel replace another
    if backend.kernels:
        library = torch.library.Library("ummrm", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # overriding is the purpose
            for op, kernel in backend.kernels.items():
                for device in backend.devices:
                    library.impl(op, kernel, device.upper())
        _overriding = name, library
    _refusals = _refuse(_REFUSED_DEVICES)


def backend_for(device: torch.device | str) -> str:
    """Name of the backend whose kernels run on `device`.

    Raises:
        ValueError: no backend serves that device type.
    """
    kind = torch.device(device).type
    if _overriding is not None and kind in BACKENDS[_overriding[0]].devices:
        return _overriding[0]
    for name, backend in BACKENDS.items():
        if kind in backend.devices and not backend.kernels:
            return name
    served = sorted({d for backend in BACKENDS.values() for d in backend.devices})
    raise ValueError(
        f"`device` must be of a type that a backend serves, got {kind!r}; move the tensors to {' or '.join(served)}"
        + (", after ummrm.use_backend('reference')." if kind in served else ".")
    )
