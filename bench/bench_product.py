"""One fp32 product at the sizes that experts have, by the libraries that a CPU offers: what our own kernels gain.

Of T rows, from H to I columns: rows @ weight^T forward, grad @ weight back to the rows, grad^T @ rows to the weight.
All allocate what they return. Run it for one number of threads at a time (`python -m bench.report -k "product and
forward" --threads 1`); numpy's BLAS is told the number.
"""

import importlib.util
from functools import partial

import pytest
import torch

from ummrm.ops import library

from .contender import Contender
from .harness import Case
from .record import OURS

KINDS = ("forward", "input_grad", "weight_grad")


def mm(kind, rows, other):
    """torch's, which is MKL's in PyPI's builds for x86-64."""
    return torch.mm(*_factors(kind, rows, other))


def onednn(kind, rows, other):
    return library.onednn_product(*_factors(kind, rows, other), None)


def _factors(kind, rows, other):
    return (other.T, rows) if kind == "weight_grad" else (rows, other.T if kind == "forward" else other)


def numpy_blas(kind, rows, other):
    """numpy's, which is OpenBLAS in PyPI's builds."""
    first, second = _factors(kind, rows, other)
    return torch.from_numpy(first.numpy() @ second.numpy())


def blis(kind, rows, other):
    from blis.py import gemm

    first, second = (other, rows) if kind == "weight_grad" else (rows, other)
    made = gemm(first.numpy(), second.numpy(), trans1=kind == "weight_grad", trans2=kind == "forward")
    return torch.from_numpy(made)


def libraries(threads):
    """Who multiplies, by label, or why not; numpy's BLAS is told the number of threads as torch was."""
    found = {OURS: library.host_product, "torch mm": mm, "oneDNN": onednn}
    if importlib.util.find_spec("threadpoolctl") is None:
        found["numpy"] = "threadpoolctl is not installed, which sets the threads of numpy's BLAS"
    else:
        import threadpoolctl

        threadpoolctl.ThreadpoolController().select(user_api="blas").limit(limits=threads)
        found["numpy"] = numpy_blas
    found["BLIS"] = "blis is not installed" if importlib.util.find_spec("blis") is None else blis
    if found["BLIS"] is blis and threads > 1:
        found["BLIS"] = "PyPI's blis runs on one thread"
    return found


def make_inputs(layer, kind):
    """rows and other: of a weight gradient the rows and their gradient, otherwise rows and weight."""
    shapes = {
        "forward": ((layer.t, layer.h), (layer.i, layer.h)),
        "input_grad": ((layer.t, layer.i), (layer.i, layer.h)),
        "weight_grad": ((layer.t, layer.h), (layer.t, layer.i)),
    }
    rows, other = (torch.randn(shape) for shape in shapes[kind])
    return {"rows": rows, "other": other}


def contenders(kind, threads):
    def by(label, function):
        if isinstance(function, str):
            return function
        if label == OURS:
            return lambda rows, other: function(rows, other, kind)
        return Contender(partial(function, kind), foreign=label in ("numpy", "BLIS"))

    return {label: by(label, function) for label, function in libraries(threads).items()}


@pytest.mark.parametrize("kind", KINDS)
def bench_product(contest, device, layer, kind):
    case = Case(f"product_{kind}", layer, torch.float32, flops=2 * layer.t * layer.h * layer.i)
    make = partial(make_inputs, layer, kind)
    contest(case, contenders(kind, torch.get_num_threads()), make, partial(mm, kind))
