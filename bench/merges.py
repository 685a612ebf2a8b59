"""How others merge experts: sums in torch, mergekit by the function that its users call, XFT by its formula.

`joined` is a list of [n, ...] stacks, of which each is merged by its own row of coefficients.
"""

import importlib.util

import torch

XFT = "XFT's way"
MERGEKIT = "mergekit linear"


def eager(joined, coefficients, accumulate):
    """sum_e c_e W_e, one expert after the other; in fp32, or in their own dtype."""
    merged = []
    for weights, c in zip(joined, coefficients, strict=True):
        total = torch.zeros_like(weights[0], dtype=torch.float32 if accumulate else None)
        for weight, coefficient in zip(weights, c, strict=True):
            total = total + coefficient.to(total.dtype) * weight
        merged.append(total.to(weights.dtype))
    return merged


def einsum(joined, coefficients):
    """The sum as one einsum, in their own dtype."""
    return [torch.einsum("e,e...->...", c.to(w.dtype), w) for w, c in zip(joined, coefficients, strict=True)]


def compiled():
    """The sum in fp32 by inductor, for the sizes of one case."""
    torch.compiler.reset()

    @torch.compile(dynamic=False)
    def run(joined, coefficients):
        pairs = zip(joined, coefficients, strict=True)
        return [(c.view(-1, *[1] * (w.dim() - 1)) * w.float()).sum(0).to(w.dtype) for w, c in pairs]

    return run


def compiled_dots():
    """The gradient of the coefficients in fp32 by inductor, for the sizes of one case."""
    torch.compiler.reset()

    @torch.compile(dynamic=False)
    def run(joined, grads):
        return torch.stack([(w.float() * g.float()).flatten(1).sum(1) for w, g in zip(joined, grads, strict=True)])

    return run


def mergekit():
    """mergekit's linear method on tensors in memory; why it cannot be run, where it is not installed."""
    if importlib.util.find_spec("mergekit") is None:
        return "mergekit is not installed"
    try:
        from mergekit.merge_methods import merge_tensors
    except ImportError as error:
        return f"mergekit: {error}"

    def run(joined, coefficients):
        options = [{"weight": c.tolist(), "normalize": False} for c in coefficients]
        pairs = zip(joined, options, strict=True)
        return [merge_tensors(list(w.unbind()), "linear", parameters=p) for w, p in pairs]

    return run


def xft_stacks(joined):
    """XFT keeps each expert's tensor as a row of an fp32 matrix, outside of what is timed."""
    return [w.detach().float().flatten(1) for w in joined]


def xft(stacks, coefficients, shapes, dtype):
    """A product of the transposed matrix with the coefficients (arXiv 2404.15247; its code is no package)."""
    triples = zip(stacks, coefficients, shapes, strict=True)
    return [torch.mm(stack.t(), c.unsqueeze(1)).view(shape).to(dtype) for stack, c, shape in triples]
