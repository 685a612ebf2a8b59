"""activation (gated silu), forward and backward, against eager torch; bytes over the copy bandwidth of the run."""

import pytest
import torch
import torch.nn.functional as F

from ummrm import ops

from .workload import DTYPES, workload


def eager(z):
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("label", ["ummrm", "torch eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_activation(contest, device, label, dtype, backward):
    w = workload(device)
    torch.manual_seed(0)
    z = torch.randn(w.rows, 2 * w.i, device=device).to(dtype).requires_grad_()
    grad = torch.randn(w.rows, w.i, device=device).to(dtype)
    functions = {"ummrm": ops.activation, "torch eager": eager}

    def run(label=label):
        with torch.set_grad_enabled(backward):
            out = functions[label](z)
            return torch.autograd.grad(out, z, grad) if backward else [out]

    moved = w.rows * w.i * dtype.itemsize * (3 + (5 if backward else 0))  # forward 2 in, 1 out; backward 3 in, 2 out
    group = f"activation {'forward+backward' if backward else 'forward'} {dtype}"
    contest(group, label, run, run("torch eager"), dtype, f"rows={w.rows} I={w.i}", moved, rounds=15)
