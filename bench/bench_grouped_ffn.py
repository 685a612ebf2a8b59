"""By sequence: the rows of each expert stand together. Against a product in slices and the dense FFN; AdamW beside it.

A dense FFN has the same FLOPs; the E-fold weight gradients are what grouping costs at least. An optimiser step goes
over E FFNs instead of one, whatever the batch: `adamw` says what that is.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ummrm import ops

from . import rivals
from .contender import Contender
from .harness import Case
from .record import DENSE, OURS

SLICES = "plain torch in slices"


def in_slices(x, expert_offsets, up, down):
    """torch's matrix products on each expert's rows, around our fused activation."""
    sizes = expert_offsets.diff().tolist()
    parts = zip(x.split(sizes), up.unbind(), down.unbind(), strict=True)
    return torch.cat([F.linear(ops.activation(F.linear(rows, u)), d) for rows, u, d in parts])


def inputs(w, dtype, device):
    """Tensor arguments of grouped_ffn without biases: equally many rows of each expert, as drawn groups are."""

    def make(*shape, scale=1.0):
        return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_()

    return {
        "x": make(w.t, w.h),
        "expert_offsets": torch.arange(w.e + 1, dtype=torch.int32, device=device) * (w.t // w.e),
        "up": make(w.e, 2 * w.i, w.h, scale=w.h**-0.5),
        "down": make(w.e, w.h, w.i, scale=w.i**-0.5),
    }


@pytest.mark.parametrize("direction", ["forward+backward", "forward"])
def bench_grouped_ffn(contest, device, layer, dtype, direction):
    w, passes = layer, 3 if direction == "forward+backward" else 1
    case = Case("grouped_ffn", layer, dtype, direction, flops=6 * w.t * w.h * w.i * passes)
    contenders = {OURS: ops.grouped_ffn, SLICES: in_slices, DENSE: rivals.equal_flops(w, dtype, device)}
    contest(case, contenders, lambda: inputs(w, dtype, device), in_slices)


def bench_adamw(contest, device, layer, dtype):
    """One fused step: parameter, gradient and two moments are read, parameter and moments written."""
    w = layer
    each = 3 * w.h * w.i
    case = Case("adamw", layer, dtype, bytes=7 * each * w.e * dtype.itemsize)
    counts = {"E FFNs": each * w.e, DENSE: each}

    def make(count):
        made = torch.randn(count, device=device, dtype=dtype).mul_(0.02).requires_grad_()
        made.grad = torch.randn_like(made)
        optimizer = torch.optim.AdamW([made], lr=1e-5, fused=True)
        optimizer.step()  # makes its states
        return {"optimizer": optimizer, "parameter": made}  # by which the harness knows how large a set is

    def step(optimizer, parameter):
        optimizer.step()
        return torch.empty(0, device=device)

    contenders = {n: Contender(step, partial(make, c), bytes=7 * c * dtype.itemsize) for n, c in counts.items()}
    contest(case, contenders)
