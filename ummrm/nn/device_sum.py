"""Running sums that stay on the device of what is added until somebody reads them. What is summed is the caller's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def widest(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on a device that has no fp64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


class DeviceSum:
    """The sum of vectors of one size, in fp64, or as a pair of fp32 numbers on a device without fp64.

    The second number of a pair is what rounding took from the first (Knuth's two-sum), so that a long sum of small
    numbers goes on growing.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._lost: torch.Tensor | None = None  # of a pair

    def add(self, values: torch.Tensor) -> None:
        """Adds `values` [n], of any dtype, on the device of the first ones; never waits for that device."""
        values = values.detach()
        if self._sum is None:
            self._sum = values.to(widest(values.device), copy=True)
            self._lost = torch.zeros_like(self._sum) if self._sum.dtype == torch.float32 else None
            return
        values, before = values.to(self._sum), self._sum
        self._sum = before + values
        if self._lost is not None:
            added = self._sum - before
            lost = (before - (self._sum - added)) + (values - added)
            self._lost = self._lost + torch.where(self._sum.isfinite(), lost, 0)  # infinity minus itself is NaN

    def value(self) -> torch.Tensor | None:
        """The sum [n], still on its device; None if nothing was added."""
        return self._sum if self._sum is None or self._lost is None else self._sum + self._lost

    def read(self) -> list[float]:
        """The sum, n numbers; waits for the device. Empty if nothing was added."""
        return read_all([self])[0]


def read_all(sums: Sequence[DeviceSum]) -> list[list[float]]:
    """`read` of several sums, waiting for the device once where all are on one."""
    parts = [part for each in sums for part in (each._sum, each._lost) if part is not None]
    if not parts:
        return [[] for _ in sums]
    numbers = iter(torch.cat([part.to(parts[0].device) for part in parts]).tolist())
    out = []
    for each in sums:
        size = 0 if each._sum is None else len(each._sum)
        kept = list(itertools.islice(numbers, size))
        lost = list(itertools.islice(numbers, 0 if each._lost is None else size)) or [0.0] * size
        out.append([a + b for a, b in zip(kept, lost, strict=True)])
    return out
