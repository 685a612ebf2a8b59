"""What a user would pick instead: the same layer by other means, each written as its users write it."""

import os

import torch
import torch.nn.functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ummrm import ops

from . import gpu_peers
from .contender import Contender
from .record import (
    COMPILED,
    DENSE,
    LOOP,
    OURS,
    TORCH_GROUPED,
    TRANSFORMERS_BATCHED,
    TRANSFORMERS_EAGER,
    TRANSFORMERS_GROUPED,
)


def dense_ffn(x, up, down):
    """Gated FFN without biases, plain torch eager."""
    gate, value = F.linear(x, up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, down)


def _shared(x, p, shared_weight):
    total = sum(dense_ffn(x, up, down) for up, down in zip(p["shared_up"], p["shared_down"], strict=True))
    return (shared_weight / len(p["shared_up"])).unsqueeze(-1).to(x.dtype) * total


def _sorted(expert_indices, num_experts):
    experts, order = expert_indices.flatten().sort(stable=True)
    return order, torch.bincount(experts, minlength=num_experts)


def expert_loop(x, shared_weight, routed_weights, expert_indices, **p):
    """Sort once, then one expert after the other."""
    order, counts = _sorted(expert_indices, len(p["routed_up"]))
    rows = x[order // expert_indices.shape[1]].split(counts.tolist())
    out = torch.cat([dense_ffn(r, p["routed_up"][e], p["routed_down"][e]) for e, r in enumerate(rows)])
    return _combine(x, shared_weight, routed_weights, order, out, p)


def grouped_mm(x, shared_weight, routed_weights, expert_indices, **p):
    """Sort once, then torch.nn.functional.grouped_mm over the routed experts."""
    order, counts = _sorted(expert_indices, len(p["routed_up"]))
    offsets = counts.cumsum(0).to(torch.int32)
    rows = x[order // expert_indices.shape[1]]
    gate, value = F.grouped_mm(rows, p["routed_up"].mT, offs=offsets).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * value, p["routed_down"].mT, offs=offsets)
    return _combine(x, shared_weight, routed_weights, order, out, p)


def _combine(x, shared_weight, routed_weights, order, rows, p):
    weighted = rows * routed_weights.flatten()[order].unsqueeze(-1).to(x.dtype)
    routed = torch.zeros_like(x).index_add(0, order // routed_weights.shape[1], weighted)
    return routed + _shared(x, p, shared_weight)


class TransformersExperts:
    """transformers' own experts module (Mixtral's), made once as in a model, with a separate shared FFN beside it."""

    def __init__(self, implementation):
        self._implementation, self._module = implementation, None

    def _made(self, p):
        experts, width, hidden = p["routed_up"].shape
        config = MixtralConfig(hidden_size=hidden, intermediate_size=width // 2, num_local_experts=experts)
        config._experts_implementation = self._implementation
        with torch.device("meta"):
            module = MixtralExperts(config)
        return module

    def __call__(self, x, shared_weight, routed_weights, expert_indices, **p):
        if self._module is None:
            self._module = self._made(p)
        weights = {"gate_up_proj": p["routed_up"], "down_proj": p["routed_down"]}
        arguments = x, expert_indices.long(), routed_weights.to(x.dtype)
        return torch.func.functional_call(self._module, weights, arguments) + _shared(x, p, shared_weight)


def compiled_experts():
    """The same under torch.compile, shared FFN and all, for the sizes of one case."""
    torch.compiler.reset()  # earlier cases would count against the limit of recompilations
    return torch.compile(TransformersExperts("grouped_mm"), dynamic=False)


def layers(layer, dtype, device, make):
    """What the layer is run as on the inputs of `make`, by label: a contender, or the reason why it is not run here.

    On CUDA transformers' eager loop says no more than the loop here, and what else users have for GPUs is run as well.
    What a deadline may cut off stands last: the slow ones, and those that are compiled.
    """
    made = {OURS: ops.moe_ffn, DENSE: equal_flops(layer, dtype, device), LOOP: expert_loop, TORCH_GROUPED: grouped_mm}
    made[TRANSFORMERS_GROUPED] = TransformersExperts("grouped_mm")
    if device.type == "cpu":
        made[TRANSFORMERS_EAGER] = TransformersExperts("eager")
    made[TRANSFORMERS_BATCHED] = too_large(layer, dtype, device) or TransformersExperts("batched_mm")
    made[COMPILED] = Contender(compiled_experts(), make, expert_loop, foreign=True)  # not every machine has a compiler
    if device.type == "cuda" and (layer.t != 16384 or layer.routing != "balanced"):
        made[COMPILED] = "compiled for 16k tokens, balanced, alone"  # of all sizes it would be most of the run
    if device.type == "cuda":
        made |= gpu_peers.layers(layer, dtype, device, make, expert_loop, TransformersExperts)
    return made


def too_large(layer, dtype, device):
    """Why batched_mm is not run, or None: it copies an expert's weights for every slot, and their gradients too."""
    needed = 6 * layer.t * layer.k * layer.h * layer.i * dtype.itemsize
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= memory / 4:
        return None
    return f"copies of weights for each slot take {needed / 2**30:.0f} GiB, over a quarter of the memory"


def equal_flops(layer, dtype, device):
    """The dense FFN at equal FLOPs, as a contender."""
    return Contender(equal_flops_ffn, lambda: equal_flops_inputs(layer, dtype, device))


def equal_flops_inputs(layer, dtype, device):
    """One FFN of intermediate size (K+S)*I on the same tokens."""
    width = (layer.k + layer.s) * layer.i

    def make(*shape, scale=1.0):
        return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_()

    return {
        "x": make(layer.t, layer.h),
        "up": make(2 * width, layer.h, scale=layer.h**-0.5),
        "down": make(layer.h, width, scale=width**-0.5),
    }


def equal_flops_ffn(x, up, down):
    """torch's matrix products around our fused activation."""
    return F.linear(ops.activation(F.linear(x, up)), down)


def route(logits, top_k):
    """XFT gate weights in eager torch (torch.topk; ties are not resolved)."""
    p = logits.float().softmax(-1)
    top, indices = p.topk(top_k, dim=-1)
    routed = top[:, :1] * top.softmax(-1)
    counts = torch.bincount(indices.flatten(), minlength=logits.shape[-1])
    z = logits.float().logsumexp(-1).square().mean()
    return 1 - top[:, 0], routed, indices.int(), counts, p.mean(0), z


def sort_slots(expert_indices, num_experts):
    """Slots by expert, by torch's stable sort."""
    experts, order = expert_indices.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    ends = torch.bincount(experts, minlength=num_experts).cumsum(0)
    return [v.int() for v in (inverse, order, torch.cat([ends.new_zeros(1), ends]))]
