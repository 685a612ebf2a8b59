"""expert_gemm and its weight gradient, against an expert loop and grouped_mm; FLOPs over the mm rate of the run."""

import pytest
import torch
import torch.nn.functional as F

from ummrm import ops

from .workload import DTYPES, workload


@pytest.fixture(params=DTYPES, ids=str)
def rows(request, device, fast_gemm):
    w, dtype = workload(device), request.param
    fast_gemm(dtype)
    torch.manual_seed(0)
    offsets = ops.sort_slots(ops.route(torch.randn(w.t, w.e, device=device), w.k).expert_indices, w.e)[2]

    def make(*shape):
        return (torch.randn(shape, device=device) * w.h**-0.25).to(dtype)

    return w, dtype, offsets, make


@pytest.mark.parametrize("label", ["ummrm", "expert loop", "torch grouped_mm"])
def bench_forward(contest, rows, label):
    w, dtype, offsets, make = rows
    x, sorted_rows = make(w.t, w.h), make(w.t * w.k, w.h)
    shared, routed = make(w.s, 2 * w.i, w.h), make(w.e, 2 * w.i, w.h)

    def loop():
        parts = sorted_rows.split(offsets.diff().tolist())
        return torch.cat(
            [*(F.linear(x, p) for p in shared), *(F.linear(r, p) for r, p in zip(parts, routed, strict=True))]
        )

    def grouped():
        return torch.cat([*(F.linear(x, p) for p in shared), F.grouped_mm(sorted_rows, routed.mT, offs=offsets[1:])])

    functions = {
        "ummrm": lambda: ops.expert_gemm(x, sorted_rows, shared, routed, offsets, w.t),
        "expert loop": loop,
        "torch grouped_mm": grouped,
    }
    flops = 4 * w.rows * w.h * w.i
    contest(f"expert_gemm {dtype}", label, functions[label], [loop()], dtype, w.shape, flops=flops)


@pytest.mark.parametrize("label", ["ummrm", "expert loop"])
def bench_weight_gradient(contest, rows, label):
    w, dtype, offsets, make = rows
    x, sorted_rows = make(w.t, w.h), make(w.t * w.k, w.h)
    grads = make(w.s * w.t, 2 * w.i), make(w.t * w.k, 2 * w.i)

    def loop():
        parts = zip(*(v.split(offsets.diff().tolist()) for v in (grads[1], sorted_rows)), strict=True)
        shared = torch.stack([g.T @ x for g in grads[0].split(w.t)])
        return shared, torch.stack([g.T @ r for g, r in parts])

    def ours():
        return torch.ops.ummrm.expert_gemm_wgrad(*grads, x, sorted_rows, offsets, w.t, w.s, True, True)

    function, flops = {"ummrm": ours, "expert loop": loop}[label], 4 * w.rows * w.h * w.i
    contest(f"expert_gemm_wgrad {dtype}", label, function, loop(), dtype, w.shape, flops=flops)
