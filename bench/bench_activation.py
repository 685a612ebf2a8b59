"""activation (gated silu), forward and backward, against eager torch; bytes over the copy bandwidth of the run."""

import pytest
import torch
import torch.nn.functional as F

from ummrm import ops

from .harness import Case


def eager(z):
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("label", ["ummrm", "torch eager"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_activation(contest, device, layer, dtype, direction, label):
    # forward 2 in, 1 out; backward 3 in, 2 out
    moved = layer.rows * layer.i * dtype.itemsize * (3 if direction == "forward" else 8)
    case = Case("activation", layer, dtype, direction, bytes=moved)

    def make():
        return {"z": torch.randn(layer.rows, 2 * layer.i, device=device, dtype=dtype, requires_grad=case.backward)}

    function = {"ummrm": lambda z: ops.activation(z), "torch eager": eager}[label]
    contest(case, label, function, make, eager, rounds=15)
