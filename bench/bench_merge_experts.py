"""merge_experts and its dots, against eager torch; bytes over the copy bandwidth of the run."""

import pytest
import torch

from ummrm import ops

from . import rivals
from .harness import Case


def experts(layer, dtype, device):
    """The two projections of every expert, and coefficients."""
    w = layer
    joined = [torch.randn(w.s + w.e, *shape, device=device, dtype=dtype) for shape in ((2 * w.i, w.h), (w.h, w.i))]
    return {"joined": joined, "coefficients": torch.rand(2, w.s + w.e, device=device).softmax(-1)}


def traffic(layer, dtype):
    """Every expert read once, one more FFN read (a gradient) or written (the result)."""
    return (layer.s + layer.e + 1) * 3 * layer.h * layer.i * dtype.itemsize


@pytest.mark.parametrize("label", ["ummrm", "torch eager, fp32 sums", "torch eager, own dtype"])
def bench_merge(contest, device, layer, dtype, label):
    def ours(joined, coefficients):
        return ops.merge_experts([w[: layer.s] for w in joined], [w[layer.s :] for w in joined], coefficients)

    def eager(joined, coefficients):
        return rivals.merge(joined, coefficients, True)

    def low(joined, coefficients):
        return rivals.merge(joined, coefficients, False)

    function = {"ummrm": ours, "torch eager, fp32 sums": eager, "torch eager, own dtype": low}[label]
    case = Case("merge", layer, dtype, bytes=traffic(layer, dtype))
    contest(case, label, function, lambda: experts(layer, dtype, device), eager, rounds=15)


@pytest.mark.parametrize("label", ["ummrm", "torch eager, fp32 sums"])
def bench_dots(contest, device, layer, dtype, label):
    """The gradient of the coefficients, all that backward costs where experts are frozen."""

    def make():
        arguments = experts(layer, dtype, device)
        return {"joined": arguments["joined"], "grads": [torch.randn_like(w[0]) for w in arguments["joined"]]}

    def ours(joined, grads):
        shared, routed = [w[: layer.s] for w in joined], [w[layer.s :] for w in joined]
        return torch.ops.ummrm.merge_experts_dots(grads, shared, routed)

    def eager(joined, grads):
        pairs = zip(grads, joined, strict=True)
        return torch.stack([torch.stack([(g.float() * e.float()).sum() for e in w]) for g, w in pairs])

    function = {"ummrm": ours, "torch eager, fp32 sums": eager}[label]
    case = Case("dots", layer, dtype, bytes=traffic(layer, dtype))
    contest(case, label, function, make, eager, rounds=15)
