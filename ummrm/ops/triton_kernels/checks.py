"""Argument checks of the Triton wrappers: what csrc/check.cpp does for the compiled ones, in the same words.

Each message names the argument, what was expected, what came and the remedy. Checks of shape, dtype and device cost no
synchronisation. Checks of index values do, off the CPU, and run there only where `index_values_wanted` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import accumulator

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
GATES = ("shared_complement", "fixed")
# So that a block's first row plus its length fits 32 bits where a kernel counts rows: no block has more than 2^16.
MAX_SLOTS = 2**31 - 2**16

# Whether index values on a GPU are read and checked: `ummrm.check`'s setting, put here by whoever loads this package.
index_values_wanted: Callable[[], bool] = bool  # False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def described(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


def _readable(indices: Tensor) -> bool:
    return indices.device.type == "cpu" or (indices.device.type == "cuda" and index_values_wanted())


@dataclass(frozen=True)
class Checker:
    """The operator whose arguments are being checked, for the head of its messages."""

    op: str

    def value(self, good: bool, name: str, expected: str, came: object, remedy: str) -> None:
        if not good:
            raise ValueError(f"ummrm.{self.op}: `{name}` must {expected}, got {came}; {remedy}.")

    def shape(self, name: str, tensor: Tensor, shape: Sequence[int], words: str, remedy: str) -> None:
        """`shape` has -1 where any size will do; `words` spells it out, as "[T, H]"."""
        if tensor.dim() == len(shape) and all(s in (-1, n) for s, n in zip(shape, tensor.shape, strict=True)):
            return
        known = any(s >= 0 for s in shape)
        sizes = " = [" + ", ".join("any" if s < 0 else str(s) for s in shape) + "]" if known else ""
        self.value(False, name, f"have shape {words}{sizes}", described(tensor), remedy)

    def dtype(self, name: str, tensor: Tensor, expected: torch.dtype, remedy: str) -> None:
        if tensor.dtype != expected:
            message = f"`{name}` must be {_name(expected)}, got {described(tensor)}; {remedy}."
            raise TypeError(f"ummrm.{self.op}: {message}")

    def result(self, name: str, asked: torch.dtype | None, like: Tensor) -> None:
        """A dtype asked for: that of `like` or its accumulator's."""
        own, wide = like.dtype, accumulator(like)
        if asked not in (None, own, wide):
            known = _name(own) if own == wide else f"{_name(own)} or {_name(wide)}"
            remedy = "leave it out for the inputs' own"
            raise TypeError(f"ummrm.{self.op}: `{name}` must be {known}, got {_name(asked)}; {remedy}.")

    def floating(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"ummrm.{self.op}: `{name}` must be float64, float32, bfloat16 or float16, got {described(tensor)}; "
                f"convert it, e.g. `{name}.float()`."
            )

    def device(self, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
        if tensor.device != like.device:
            self.value(
                False,
                name,
                f"be on the device of `{like_name}` ({like.device})",
                tensor.device,
                f"move it with `{name}.to({like_name}.device)`",
            )

    def index(self, name: str, tensor: Tensor, size: int, words: str, like: Tensor, like_name: str) -> None:
        """int32 [size], on the device of `like`."""
        self.device(name, tensor, like, like_name)
        self.shape(name, tensor, (size,), words, "take it from ummrm.ops.sort_slots")
        self.dtype(name, tensor, torch.int32, "take it from ummrm.ops.sort_slots")

    def at_least(self, name: str, value: int, least: int) -> None:
        self.value(value >= least, name, f"be at least {least}", value, "pass a larger value")

    def slots(self, name: str, count: int) -> None:
        """Rows or slots that a kernel counts in 32 bits."""
        self.value(count <= MAX_SLOTS, name, "have at most 2^31 - 2^16 rows", count, "split the batch")

    def gate_weights(self, name: str, tensor: Tensor, rows: Tensor, rows_name: str, shape, words: str) -> None:
        self.device(name, tensor, rows, rows_name)
        self.shape(name, tensor, shape, words, "give one weight a row" if "[T" not in words else "take it from route")
        self.dtype(name, tensor, accumulator(rows), "gate weights stay in fp32 (fp64 for fp64 rows)")

    def offsets(self, expert_offsets: Tensor, slots: int) -> None:
        """Starting at 0, never falling, ending at or below `slots`."""
        self.at_least("expert_offsets.numel()", expert_offsets.numel(), 1)
        if not _readable(expert_offsets):
            return
        previous = 0
        for e, offset in enumerate(expert_offsets.tolist()):
            if offset < previous or offset > slots or (e == 0 and offset != 0):
                raise IndexError(
                    f"ummrm.{self.op}: `expert_offsets` must start at 0, never fall and end at or below the number of "
                    f"slots ({slots}), got {offset} at position {e}; take it from ummrm.ops.sort_slots of the same "
                    "routing."
                )
            previous = offset

    def values(self, name: str, indices: Tensor, low: int, high: int, remedy: str) -> None:
        """Every value in [low, high)."""
        if not _readable(indices) or indices.numel() == 0:
            return
        bad = ((indices < low) | (indices >= high)).flatten().nonzero()
        if bad.numel():
            at = int(bad[0])
            raise IndexError(
                f"ummrm.{self.op}: `{name}` must lie in [{low}, {high - 1}], got {int(indices.flatten()[at])} at "
                f"position {at}; {remedy}."
            )

    def choice(self, name: str, value: str, choices: Sequence[str]) -> None:
        listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        self.value(value in choices, name, f"be {listed}", repr(value), "pass one of these")
