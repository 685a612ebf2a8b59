"""The one door through which kernels are launched, and what is known of the device behind it.

Under `recording` nothing runs: launches are written down for a named target, on meta tensors. The compile check builds
from that what a launch on such a device would build, without one.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)  # what TRITON_INTERPRET said when Triton was imported


@dataclass(frozen=True)
class Target:
    """What the choice of a configuration may depend on.

    Attributes:
        arch: `sm_90`, `gfx942`, or `interpreter`.
        processors: streaming multiprocessors or compute units.
    """

    arch: str
    processors: int


@dataclass(frozen=True)
class Launch:
    """One recorded launch: positional arguments in order, and constants and options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict[str, Any]


_recorder: tuple[Target, list[Launch]] | None = None


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Collects what would be launched on `target` instead of launching it."""
    global _recorder
    before, _recorder = _recorder, (target, [])
    try:
        yield _recorder[1]
    finally:
        _recorder = before


@functools.cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Target(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def target_of(tensor: torch.Tensor) -> Target:
    if _recorder is not None:
        return _recorder[0]
    if tensor.device.type == "cuda":
        return _gpu(tensor.device.index)
    return Target("interpreter", 2)


def launch(kernel, grid: tuple[int, ...], like: torch.Tensor, *arguments, **options) -> None:
    """Runs `kernel` on the device of `like`, on its current stream; an empty grid is no launch."""
    options["enable_fp_fusion"] = True  # its default changes with Triton 3.10, and with it the last bits
    if _recorder is not None:
        _recorder[1].append(Launch(kernel, grid, arguments, options))
    elif 0 in grid:
        return
    elif like.device.type == "cuda":
        with torch.cuda.device(like.device):
            if options.get("TMA"):
                contextvars.copy_context().run(_launch_with_scratch, kernel, grid, like, arguments, options)
            else:
                kernel[grid](*arguments, **options)
    else:
        from .interpreter import quiet

        with quiet():
            kernel[grid](*arguments, **options)


def _launch_with_scratch(kernel, grid, like, arguments, options) -> None:
    """Descriptors lie in memory that Triton asks an allocator for. It is set in a context of its own: the program's
    stays as it is."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=like.device))
    kernel[grid](*arguments, **options)


def accumulator(tensor: torch.Tensor) -> torch.dtype:
    """dtype of sums, statistics and gate weights."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: torch.Tensor) -> tl.dtype:
    """`accumulator` as a kernel's constant."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def blocks(count: int, block: int) -> int:
    return -(-count // block)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` and 1."""
    return 1 << max(n - 1, 0).bit_length()


def tile(width: int, elements: int, dtype: torch.dtype, widest: int = 512) -> tuple[int, int]:
    """(rows, columns) of a block of about `elements` for rows `width` wide; a quarter as many in fp64, whose elementary
    functions are calls that spill beside more."""
    elements //= 4 if dtype == torch.float64 else 1
    columns = min(power_of_2(width), widest, elements)
    return elements // columns, columns
