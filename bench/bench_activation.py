"""activation (gated silu), forward and backward, against eager torch; bytes over the copy bandwidth of the run."""

import pytest
import torch
import torch.nn.functional as F

from ummrm import ops

from .harness import Case
from .record import OURS


def eager(z):
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_activation(contest, device, layer, dtype, direction):
    # forward 2 in, 1 out; backward 3 in, 2 out
    moved = layer.rows * layer.i * dtype.itemsize * (3 if direction == "forward" else 8)
    case = Case("activation", layer, dtype, direction, bytes=moved)

    def make():
        return {"z": torch.randn(layer.rows, 2 * layer.i, device=device, dtype=dtype, requires_grad=case.backward)}

    contest(case, {OURS: lambda z: ops.activation(z), "torch eager": eager}, make, eager)
