"""The whole layer: moe_ffn against its rivals and the dense FFN at equal FLOPs; merged_ffn against the dense FFN.

"Dense at equal FLOPs" is one FFN of intermediate size (K+S)*I on the same tokens, with our fused activation: the floor.
"""

import pytest
import torch
import torch.nn.functional as F

from ummrm import ops

from . import rivals
from .workload import DTYPES, forward_backward, layer_inputs, without_grad, workload

DENSE = "dense FFN, equal FLOPs"


@pytest.mark.parametrize("label", ["ummrm", *rivals.LAYERS, DENSE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_moe_ffn(contest, device, fast_gemm, label, dtype, backward):
    fast_gemm(dtype)
    w = workload(device)
    torch.manual_seed(0)
    arguments = layer_inputs(w, dtype, device)

    def runner(function, arguments):
        return forward_backward(function, arguments) if backward else without_grad(lambda: function(**arguments))

    if label == DENSE:
        width = (w.k + w.s) * w.i
        dense = {
            "x": arguments["x"],
            "up": torch.randn(2 * width, w.h, device=device, dtype=dtype).requires_grad_(),
            "down": torch.randn(w.h, width, device=device, dtype=dtype).requires_grad_(),
        }

        def ffn(x, up, down):
            return F.linear(ops.activation(F.linear(x, up)), down)

        function, want = runner(ffn, dense), None
    else:
        function = runner({"ummrm": ops.moe_ffn, **rivals.LAYERS}[label], arguments)
        want = runner(rivals.expert_loop, arguments)()
        want = list(want) if backward else [want]
    flops = 6 * w.rows * w.h * w.i * (3 if backward else 1)
    group = f"moe_ffn {'forward+backward' if backward else 'forward'} {dtype}"
    contest(group, label, function, want, dtype, w.shape, flops=flops, rounds=5)


@pytest.mark.parametrize("label", ["ummrm", "torch eager merge", "dense FFN"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_merged_ffn(contest, device, fast_gemm, label, dtype):
    """The merge phase: forward and backward to the coefficients and x, experts frozen."""
    fast_gemm(dtype)
    w = workload(device)
    torch.manual_seed(0)
    experts = {n: v.detach() for n, v in layer_inputs(w, dtype, device).items() if n.endswith(("_up", "_down"))}
    x = torch.randn(w.t, w.h, device=device).to(dtype).requires_grad_()
    coefficients = torch.rand(3, w.s + w.e, device=device).softmax(-1).requires_grad_()
    joined = [torch.cat([experts[f"shared_{n}"], experts[f"routed_{n}"]]) for n in ("up", "down")]

    def eager(x, coefficients):
        parts = [*joined[0].chunk(2, 1), joined[1]]
        gate, up, down = rivals.merge(parts, coefficients, True)
        return rivals.dense_ffn(x, torch.cat([gate, up]), down)

    arguments = {"x": x, "coefficients": coefficients}
    if label == "dense FFN":
        dense = {"x": x, "up": experts["shared_up"][0], "down": experts["shared_down"][0]}
        function, want = forward_backward(rivals.dense_ffn, dense), None
    else:
        ours = {"ummrm": lambda x, coefficients: ops.merged_ffn(x, coefficients, **experts)}
        function = forward_backward({**ours, "torch eager merge": eager}[label], arguments)
        want = forward_backward(eager, arguments)()
    contest(f"merged_ffn forward+backward {dtype}", label, function, want, dtype, w.shape, rounds=5)
