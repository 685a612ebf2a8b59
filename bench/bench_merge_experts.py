"""merge_experts and its dots, against eager torch; bytes over the copy bandwidth of the run."""

import pytest
import torch

from ummrm import ops

from . import rivals
from .workload import DTYPES, workload


def tensors(w, dtype, device):
    torch.manual_seed(0)
    shapes = [(2 * w.i, w.h), (w.h, w.i)]
    shared = [torch.randn(w.s, *shape, device=device).to(dtype) for shape in shapes]
    routed = [torch.randn(w.e, *shape, device=device).to(dtype) for shape in shapes]
    coefficients = torch.rand(2, w.s + w.e, device=device).softmax(-1)
    return shared, routed, coefficients, 3 * w.h * w.i * dtype.itemsize


@pytest.mark.parametrize("label", ["ummrm", "torch eager, fp32 sums", "torch eager, own dtype"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_merge(contest, device, label, dtype):
    w = workload(device)
    shared, routed, coefficients, size = tensors(w, dtype, device)
    joined = [torch.cat(pair) for pair in zip(shared, routed, strict=True)]
    functions = {
        "ummrm": lambda: ops.merge_experts(shared, routed, coefficients),
        "torch eager, fp32 sums": lambda: rivals.merge(joined, coefficients, True),
        "torch eager, own dtype": lambda: rivals.merge(joined, coefficients, False),
    }
    want, shape = functions["torch eager, fp32 sums"](), f"{w.s + w.e} experts, H={w.h} I={w.i}"
    contest(f"merge_experts {dtype}", label, functions[label], want, dtype, shape, (w.s + w.e + 1) * size, rounds=15)


@pytest.mark.parametrize("label", ["ummrm", "torch eager, fp32 sums"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_dots(contest, device, label, dtype):
    w = workload(device)
    shared, routed, _, size = tensors(w, dtype, device)
    grads = [torch.randn(r.shape[1:], device=device).to(dtype) for r in routed]

    def eager():
        pairs = zip(grads, shared, routed, strict=True)
        return torch.stack([torch.stack([(g.float() * e.float()).sum() for e in [*s, *r]]) for g, s, r in pairs])

    functions = {
        "ummrm": lambda: torch.ops.ummrm.merge_experts_dots(grads, shared, routed),
        "torch eager, fp32 sums": eager,
    }
    shape = f"{w.s + w.e} experts, H={w.h} I={w.i}"
    moved = (w.s + w.e + 1) * size
    contest(f"merge_experts_dots {dtype}", label, functions[label], [eager()], dtype, shape, moved, rounds=15)
