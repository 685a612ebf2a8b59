"""Which kernels a layer's forward and backward launch, and how long each takes: where the time of `moe_ffn` goes.

    python -m bench.kernels [--backend name] [--tokens T] [--hidden H] [--intermediate I] [--experts E] [--top-k K]

Times are of torch's profiler, on CUDA. Beside the layer stands the dense FFN at equal FLOPs (rivals.equal_flops_ffn).
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from ummrm import ops
from ummrm.ops import backends

from . import rivals
from .record import DENSE, OURS
from .workload import Layer, layer_inputs

STEPS = 5


def step(function, inputs):
    """A call without arguments: forward and backward to all that requires a gradient."""
    leaves = [t for t in inputs.values() if t.requires_grad]
    grad = torch.randn_like(function(**inputs))
    return lambda: torch.autograd.grad(function(**inputs), leaves, grad)


def kernels(call, steps=STEPS):
    """(name, launches, milliseconds) a call of every kernel, the longest first."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    rows = [(e.key, e.count / steps, e.self_device_time_total / steps / 1e3) for e in record.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def table(title, rows):
    total = sum(ms for *_, ms in rows)
    lines = [f"{title}: {total:.3f} ms in {sum(count for _, count, _ in rows):.0f} launches"]
    return "\n".join(
        lines + [f"  {ms:9.3f} ms {ms / total:6.1%} {count:5.1f} x  {name[:150]}" for name, count, ms in rows]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default=None)
    sizes = {"tokens": 16384, "hidden": 4096, "intermediate": 14336, "experts": 8, "top-k": 2}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if options.backend is not None:
        backends.use_backend(options.backend)
    layer = Layer(options.tokens, options.hidden, options.intermediate, options.experts, options.top_k)
    print(f"{torch.cuda.get_device_name()}, bfloat16, {layer}")
    for label, function, make in (
        (OURS, ops.moe_ffn, layer_inputs),
        (DENSE, rivals.equal_flops_ffn, rivals.equal_flops_inputs),
    ):
        rows = kernels(step(function, make(layer, torch.bfloat16, "cuda")))
        print(table(label, rows))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
