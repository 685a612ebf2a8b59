"""Measures the tiles of the Triton GEMMs on the GPU at hand, and keeps the fastest for each shape.

`python -m bench.tune_triton --hidden 4096 --intermediate 14336 --tokens 16384` measures every configuration of the
table (kernels/triton/configurations.py) at the products of such a layer and writes the file that the kernels read when
they are imported. It is run ahead of time, never by a training run: what a call computes must depend on shapes alone.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from pathlib import Path

import torch

from ummrm import backends, ops

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


def products(hidden: int, intermediate: int, tokens: int, experts: int, top_k: int, shared: int, glu: bool, dtype):
    """The raw operators of one layer's products, forward and backward, on random rows: name and call."""
    make = {"dtype": dtype, "device": "cuda"}
    indices = torch.rand(tokens, experts, device="cuda").argsort(-1)[:, :top_k].int().contiguous()
    offsets, raw = ops.sort_slots(indices, experts)[2], torch.ops.ummrm
    for name, (n, d) in {
        "up": (intermediate * (2 if glu else 1), hidden),
        "down": (hidden, intermediate),
    }.items():
        proj = torch.randn(shared, n, d, **make), torch.randn(experts, n, d, **make)
        rows = torch.randn(shared * tokens, d, **make), torch.randn(tokens * top_k, d, **make)
        grads = torch.randn(shared * tokens, n, **make), torch.randn(tokens * top_k, n, **make)
        sizes = offsets, tokens
        yield name, lambda p=proj, r=rows, s=sizes: raw.expert_gemm(*r, *p, *s)
        yield f"{name}, transposed", lambda p=proj, g=grads, s=sizes: raw.expert_gemm(*g, *p, *s, None, None, True)
        yield f"{name}, wgrad", lambda r=rows, g=grads, s=sizes: raw.expert_gemm_wgrad(*g, *r, *s, shared, True, True)


def tune(call, gemm, configurations):
    """(key, fastest configuration, {configuration: milliseconds}) of one product."""
    choose, asked, times = gemm.choose, [], {}

    def note(kind, target, dtype, rows, m, n, k):
        asked.append((kind, target.arch, dtype, rows, m, n, k))
        return choose(kind, target, dtype, rows, m, n, k)

    try:
        gemm.choose = note
        call()
        kind, arch, dtype, *shape = asked[0]
        for configuration in configurations.candidates(arch, dtype):
            gemm.choose = lambda *_, c=configuration: c
            times[configuration] = milliseconds(call)
    finally:
        gemm.choose = choose
    return configurations.key(kind, arch, dtype, *shape), min(times, key=times.get), times


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
    from ummrm.triton_kernels import configurations

    gemm = importlib.import_module("ummrm.triton_kernels.expert_gemm")
    output = arguments.output or configurations.TUNED
    chosen = configurations.read_tuned(output)
    sizes = zip(arguments.hidden, arguments.intermediate, strict=True)
    for (hidden, intermediate), tokens in itertools.product(sizes, arguments.tokens):
        counts = arguments.experts, arguments.top_k, arguments.shared, not arguments.plain
        for name, call in products(hidden, intermediate, tokens, *counts, DTYPES[arguments.dtype]):
            key, best, times = tune(call, gemm, configurations)
            worst = max(times.values())
            print(
                f"H={hidden} I={intermediate} T={tokens} {name}: {times[best]:.3f} ms with {best} (worst {worst:.3f})"
            )
            chosen[key] = best
    configurations.write_tuned(chosen, output)
    print(f"{len(chosen)} choices in {output}")


if __name__ == "__main__":
    main()
