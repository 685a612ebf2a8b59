"""Measures the tiles of the Triton GEMMs on the GPU at hand, and keeps the fastest for each shape.

`python -m bench.tune_triton --hidden 4096 --intermediate 14336 --tokens 16384` measures every configuration of the
table (ummrm/ops/triton_kernels/configurations.py) at the products of such a layer, and the up-projection with the
activation in its epilogue against the two launched one after the other, and writes the file that the kernels read
when they are imported. It is run ahead of time, never by a training run: what a call computes must depend on shapes
alone.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from ummrm import ops
from ummrm.ops import backends

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ROUNDS, _SECONDS = 3, 0.1  # a configuration is timed so often, each time for about so long


def milliseconds(function) -> float:
    """The best of _ROUNDS means, each over enough calls to fill _SECONDS, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def mean(calls: int) -> float:
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    function()  # compiles
    calls = max(1, int(1000 * _SECONDS / max(mean(1), 1e-3)))
    return min(mean(calls) for _ in range(_ROUNDS))


@dataclass(frozen=True)
class Product:
    """A launch to be tuned.

    Attributes:
        name: for people.
        call: runs it.
        module: whose `chooser` it asks for a configuration.
        fused: whether it may also run unfused.
    """

    name: str
    call: Callable[[], object]
    module: ModuleType
    chooser: str = "choose"
    fused: bool = False


def products(hidden: int, intermediate: int, tokens: int, experts: int, top_k: int, shared: int, glu: bool, dtype):
    """The products of one layer, forward and backward, on random rows; what is fused after what it replaces."""
    gemm, moe = (importlib.import_module(f"ummrm.ops.triton_kernels.{name}") for name in ("expert_gemm", "moe_ffn"))
    make = {"dtype": dtype, "device": "cuda"}
    indices = torch.rand(tokens, experts, device="cuda").argsort(-1)[:, :top_k].int().contiguous()
    (_, sorted_to_slot, offsets), raw = ops.sort_slots(indices, experts), torch.ops.ummrm
    width = intermediate * (2 if glu else 1)
    sizes = offsets, tokens
    for name, (n, d) in {"up": (width, hidden), "down": (hidden, intermediate)}.items():
        proj = torch.randn(shared, n, d, **make), torch.randn(experts, n, d, **make)
        rows = torch.randn(shared * tokens, d, **make), torch.randn(tokens * top_k, d, **make)
        grads = torch.randn(shared * tokens, n, **make), torch.randn(tokens * top_k, n, **make)
        yield Product(name, lambda p=proj, r=rows: raw.expert_gemm(*r, *p, *sizes), gemm)
        call = lambda p=proj, g=grads: raw.expert_gemm(*g, *p, *sizes, None, None, True)  # noqa: E731
        yield Product(f"{name}, transposed", call, gemm)
        call = lambda r=rows, g=grads: raw.expert_gemm_wgrad(*g, *r, *sizes, shared, True, True)  # noqa: E731
        yield Product(f"{name}, wgrad", call, gemm)
    rows = moe.gathered(torch.randn(tokens, hidden, **make), sorted_to_slot, top_k)
    shapes = (shared, width, hidden), (experts, width, hidden), (shared, hidden, intermediate)
    down = torch.randn(experts, hidden, intermediate, **make)
    p = moe.Experts(*(torch.randn(shape, **make) for shape in shapes), down, None, None, None, None)
    for kind in ("silu", "gelu"):
        call = lambda kind=kind: moe.up_side(rows, p, *sizes, kind, glu, True)  # noqa: E731
        yield Product(f"up with {kind}", call, moe, "choose_fused", True)


def tune(product: Product, configurations):
    """(key, fastest configuration, {configuration: milliseconds}) of one product; None for a configuration is unfused.
    What does not compile or launch is left out, with a message.

    Raises:
        RuntimeError: nothing does.
    """
    choose, asked, times = getattr(product.module, product.chooser), [], {}

    def note(*arguments):
        asked.append(arguments)
        return choose(*arguments)

    try:
        setattr(product.module, product.chooser, note)
        product.call()
        kind, target, dtype, rows, *shape = asked[0]
        if product.fused:
            listed = configurations.fused_candidates(kind, target.arch, dtype)
            shape = 0, *shape
        else:
            listed = configurations.candidates(target.arch, dtype)
        if kind != "wgrad" and dtype.itemsize == 2:
            listed = configurations.with_tma(target.arch, listed)
        for configuration in (*listed, None) if product.fused else listed:
            setattr(product.module, product.chooser, lambda *_, c=configuration: c)
            try:
                times[configuration] = milliseconds(product.call)
            except Exception as error:  # of many kinds: the compiler's, the launcher's, out of memory
                print(f"{product.name}: {configuration} is left out: {type(error).__name__}: {error}")
    finally:
        setattr(product.module, product.chooser, choose)
    if not times:
        raise RuntimeError(f"no configuration of {product.name!r} runs here")
    return configurations.key(kind, target.arch, dtype, rows, *shape), min(times, key=times.get), times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--intermediate", type=int, nargs="+", default=[2816, 14336])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--experts", type=int, default=7)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--shared", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="an FFN without a gate")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--output", type=Path, help="default: the file that the kernels read")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a GPU must be at hand, got none; run this where the model will be trained")

    backends.use_backend("triton")
    from ummrm.ops.triton_kernels import configurations

    output = arguments.output or configurations.TUNED
    chosen = configurations.read_tuned(output)
    sizes = zip(arguments.hidden, arguments.intermediate, strict=True)
    for (hidden, intermediate), tokens in itertools.product(sizes, arguments.tokens):
        counts = arguments.experts, arguments.top_k, arguments.shared, not arguments.plain
        for product in products(hidden, intermediate, tokens, *counts, DTYPES[arguments.dtype]):
            what = f"H={hidden} I={intermediate} T={tokens} {product.name}"
            try:
                key, best, times = tune(product, configurations)
            except RuntimeError as error:
                print(f"{what}: not tuned: {error}")
                continue
            print(f"{what}: {times[best]:.3f} ms with {best or 'no fusion'} (worst {max(times.values()):.3f})")
            chosen[key] = best
            configurations.use_tuned(chosen)  # what is unfused is compared at its best
            configurations.write_tuned(chosen, output)  # each time: a run that is cut short keeps what it has
    print(f"{len(chosen)} choices in {output}")


if __name__ == "__main__":
    main()
