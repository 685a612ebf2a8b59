"""merge_experts and its dots, against torch, mergekit, XFT and a copy; bytes over the copy bandwidth of the run."""

import torch

from ummrm import ops

from . import merges
from .contender import Contender
from .harness import Case
from .record import OURS


def experts(layer, dtype, device):
    """The two projections of every expert, and coefficients."""
    w = layer
    joined = [torch.randn(w.s + w.e, *shape, device=device, dtype=dtype) for shape in ((2 * w.i, w.h), (w.h, w.i))]
    return {"joined": joined, "coefficients": torch.rand(2, w.s + w.e, device=device).softmax(-1)}


def traffic(layer, dtype):
    """Every expert read once, one more FFN read (a gradient) or written (the result)."""
    return (layer.s + layer.e + 1) * 3 * layer.h * layer.i * dtype.itemsize


def bench_merge(contest, device, layer, dtype):
    def make():
        return experts(layer, dtype, device)

    def ours(joined, coefficients):
        return ops.merge_experts([w[: layer.s] for w in joined], [w[layer.s :] for w in joined], coefficients)

    def eager(joined, coefficients):
        return merges.eager(joined, coefficients, True)

    def low(joined, coefficients):
        return merges.eager(joined, coefficients, False)

    def make_xft():
        inputs = make()
        return {"stacks": merges.xft_stacks(inputs["joined"]), "coefficients": inputs["coefficients"]}

    def xft(stacks, coefficients):
        return merges.xft(stacks, coefficients, [(2 * layer.i, layer.h), (layer.h, layer.i)], dtype)

    def make_copy():
        source = torch.randn(traffic(layer, dtype) // 8, device=device)
        return {"source": source, "target": torch.empty_like(source)}

    contenders = {
        OURS: ours,
        "torch eager, fp32 sums": eager,
        "torch eager, own dtype": low,
        "torch einsum, own dtype": merges.einsum,
        "torch compiled, fp32 sums": Contender(merges.compiled(), make, eager, foreign=True),
        merges.MERGEKIT: merges.mergekit(),
        merges.XFT: Contender(xft, make_xft, xft_reference(layer, dtype)),
        "copy of the same bytes": Contender(lambda source, target: target.copy_(source), make_copy),
    }
    contest(Case("merge", layer, dtype, bytes=traffic(layer, dtype)), contenders, make, eager)


def xft_reference(layer, dtype):
    """The plain sum over XFT's own form of the experts."""

    def run(stacks, coefficients):
        shapes = (2 * layer.i, layer.h), (layer.h, layer.i)
        joined = [stack.view(-1, *shape).to(dtype) for stack, shape in zip(stacks, shapes, strict=True)]
        return merges.eager(joined, coefficients, True)

    return run


def bench_dots(contest, device, layer, dtype):
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

    case = Case("dots", layer, dtype, bytes=traffic(layer, dtype))
    compiled = Contender(merges.compiled_dots(), make, eager, foreign=True)
    contest(case, {OURS: ours, "torch eager, fp32 sums": eager, "torch compiled, fp32 sums": compiled}, make, eager)
