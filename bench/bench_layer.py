"""The whole layer: moe_ffn against its rivals and the dense FFN at equal FLOPs; merged_ffn against the dense FFN.

"Dense at equal FLOPs" is one FFN of intermediate size (K+S)*I on the same tokens, with our fused activation: the floor.
"""

import pytest
import torch

from ummrm import ops

from . import merges, rivals
from .contender import Contender
from .harness import Case
from .record import OURS
from .workload import layer_inputs


@pytest.mark.parametrize("direction", ["forward+backward", "forward"])
def bench_moe_ffn(contest, device, layer, dtype, direction):
    w, passes = layer, 3 if direction == "forward+backward" else 1
    case = Case("moe_ffn", layer, dtype, direction, flops=6 * w.rows * w.h * w.i * passes)

    def make():
        return layer_inputs(w, dtype, device)

    contest(case, rivals.layers(w, dtype, device, make), make, rivals.expert_loop)


def bench_merged_ffn(contest, device, layer, dtype):
    """The merge phase: forward and backward to the coefficients and x, experts frozen."""
    w = layer

    def make():
        inputs = layer_inputs(w, dtype, device)
        experts = {n: v.detach() for n, v in inputs.items() if n.endswith(("_up", "_down"))}
        coefficients = torch.rand(3, w.s + w.e, device=device).softmax(-1).requires_grad_()
        return {"x": inputs["x"], "coefficients": coefficients, **experts}

    def make_dense():
        inputs = layer_inputs(w, dtype, device)
        return {"x": inputs["x"], "up": inputs["shared_up"][0].detach(), "down": inputs["shared_down"][0].detach()}

    def eager(x, coefficients, shared_up, routed_up, shared_down, routed_down):
        up, down = torch.cat([shared_up, routed_up]), torch.cat([shared_down, routed_down])
        gate, up, down = merges.eager([*up.chunk(2, 1), down], coefficients, True)
        return rivals.dense_ffn(x, torch.cat([gate, up]), down)

    def make_xft():
        inputs = make()
        up, down = (torch.cat([inputs[f"shared_{n}"], inputs[f"routed_{n}"]]) for n in ("up", "down"))
        stacks = merges.xft_stacks([*up.chunk(2, 1), down])
        return {"x": inputs["x"], "coefficients": inputs["coefficients"], "stacks": stacks}

    def xft(x, coefficients, stacks):
        gate, up, down = merges.xft(stacks, coefficients, [(w.i, w.h), (w.i, w.h), (w.h, w.i)], dtype)
        return rivals.dense_ffn(x, torch.cat([gate, up]), down)

    case = Case("merged_ffn", layer, dtype, "forward+backward", flops=18 * w.t * w.h * w.i)
    contenders = {
        OURS: ops.merged_ffn,
        "torch eager merge": eager,
        merges.XFT: Contender(xft, make_xft),
        "dense FFN": Contender(rivals.dense_ffn, make_dense),
    }
    contest(case, contenders, make, eager)
