"""Argument checks of the fakes, in the words of csrc/check.cpp, for sizes that may be symbols.

Nothing here reads a value, asks for a size as a number or branches on one. A condition goes to `torch._check`, which
raises where it is known to fail and becomes a guard or a run-time assertion where it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import ACTIVATIONS, accumulator

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GATES = ("shared_complement", "fixed")
BELOW = 2**31  # tokens, slots and counts are indexed in 32 bits

Size = Any  # an int, or a torch.SymInt, which no annotation of int admits


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: Tensor) -> str:
    return f"{name_of(tensor.dtype)} {list(tensor.shape)}"


@dataclass(frozen=True)
class Checker:
    """The operator whose arguments are being checked, for the head of its messages."""

    op: str

    def value(self, good: Any, name: str, expected: str, came: Any, remedy: str) -> None:
        torch._check_value(good, lambda: f"ummrm.{self.op}: `{name}` must {expected}, got {came}; {remedy}.")

    def type(self, good: bool, name: str, expected: str, came: str, remedy: str) -> None:
        if not good:
            raise TypeError(f"ummrm.{self.op}: `{name}` must be {expected}, got {came}; {remedy}.")

    def shape(self, name: str, tensor: Tensor, shape: Sequence[Size | None], words: str, remedy: str) -> None:
        """`shape` has None where any size will do; `words` spells it out, as "[T, H]"."""
        known = any(size is not None for size in shape)
        sizes = " = [" + ", ".join("any" if size is None else str(size) for size in shape) + "]" if known else ""
        self.value(tensor.dim() == len(shape), name, f"have shape {words}{sizes}", _described(tensor), remedy)
        for size, own in zip(shape, tensor.shape, strict=True):
            if size is not None:
                self.value(own == size, name, f"have shape {words}{sizes}", _described(tensor), remedy)

    def dtype(self, name: str, tensor: Tensor, expected: torch.dtype, remedy: str) -> None:
        self.type(tensor.dtype == expected, name, name_of(expected), _described(tensor), remedy)

    def floating(self, name: str, tensor: Tensor) -> None:
        words = "float64, float32, bfloat16 or float16"
        self.type(tensor.dtype in _FLOATS, name, words, _described(tensor), f"convert it, e.g. `{name}.float()`")

    def device(self, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
        expected = f"be on the device of `{like_name}` ({like.device})"
        remedy = f"move it with `{name}.to({like_name}.device)`"
        self.value(tensor.device == like.device, name, expected, tensor.device, remedy)

    def beside(self, name, tensor, like, like_name, shape, words, dtype, remedies) -> None:
        """Device of `like`, shape and dtype, in this order; `remedies` are for the last two."""
        self.device(name, tensor, like, like_name)
        self.shape(name, tensor, shape, words, remedies[0])
        self.dtype(name, tensor, dtype, remedies[1])

    def index(self, name: str, tensor: Tensor, size: Size | None, words: str, like: Tensor, like_name: str) -> None:
        remedies = ("take it from ummrm.ops.sort_slots",) * 2
        self.beside(name, tensor, like, like_name, (size,), words, torch.int32, remedies)

    def offsets(self, tensor: Tensor, like: Tensor, like_name: str) -> None:
        self.index("expert_offsets", tensor, None, "[E + 1]", like, like_name)
        self.count("expert_offsets.numel()", tensor.shape[0], 1)

    def count(self, name: str, value: Size, least: int) -> None:
        """The upper bound is asked of numbers alone: as a guard it would bound every dynamic size by it."""
        self.value(value >= least, name, f"be at least {least}", value, "pass a larger value")
        self.value(not isinstance(value, int) or value < BELOW, name, "be below 2^31", value, "pass a smaller value")

    def slots(self, name: str, tokens: Size, top_k: Size) -> None:
        self.count("top_k", top_k, 1)
        counted = isinstance(tokens, int) and isinstance(top_k, int)
        came = f"T = {tokens} and top_k = {top_k}"
        self.value(not counted or tokens * top_k < BELOW, name, "have T * top_k below 2^31", came, "split the batch")

    def choice(self, name: str, value: str, choices: Sequence[str]) -> None:
        listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        self.value(value in choices, name, f"be {listed}", f"'{value}'", "pass one of these")

    def activation(self, name: str, value: str) -> None:
        self.choice(name, value, tuple(ACTIVATIONS))

    def row_weights(self, name: str, tensor: Tensor | None, rows: Tensor, rows_name: str, shape, words, remedy) -> None:
        if tensor is not None:
            remedies = remedy, "gate weights stay in fp32 (fp64 for fp64 rows)"
            self.beside(name, tensor, rows, rows_name, shape, words, accumulator(rows), remedies)
