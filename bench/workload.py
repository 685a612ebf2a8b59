"""What every suite measures: few, wide experts, as upcycled reward models have them, at a size for the device."""

from dataclasses import dataclass

import torch

from ummrm import ops

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Workload:
    """T tokens, H hidden, I intermediate, E routed experts, K of them a token, S shared."""

    t: int
    h: int
    i: int
    e: int
    k: int
    s: int

    @property
    def shape(self):
        return f"T={self.t} H={self.h} I={self.i} E={self.e} K={self.k} S={self.s}"

    @property
    def rows(self):
        return self.t * (self.s + self.k)


def workload(device):
    return Workload(512, 512, 1408, 8, 2, 1) if device.type == "cpu" else Workload(16384, 2048, 5632, 8, 2, 1)


def layer_inputs(w, dtype, device):
    """Tensor arguments of moe_ffn without biases, all trained."""

    def make(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    routing = ops.route(torch.randn(w.t, w.e, device=device), w.k)
    return {
        "x": make(w.t, w.h),
        "shared_weight": routing.shared_weight.requires_grad_(),
        "routed_weights": routing.routed_weights.requires_grad_(),
        "expert_indices": routing.expert_indices,
        "shared_up": make(w.s, 2 * w.i, w.h, scale=w.h**-0.5),
        "routed_up": make(w.e, 2 * w.i, w.h, scale=w.h**-0.5),
        "shared_down": make(w.s, w.h, w.i, scale=w.i**-0.5),
        "routed_down": make(w.e, w.h, w.i, scale=w.i**-0.5),
    }


def forward_backward(function, arguments):
    """A callable that runs `function(**arguments)` and the gradients of everything that requires one."""
    leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    grad = None

    def run():
        nonlocal grad
        out = function(**arguments)
        grad = torch.ones_like(out) if grad is None else grad
        return torch.autograd.grad(out, leaves, grad)

    return run


def without_grad(function):
    def run():
        with torch.no_grad():
            return function()

    return run
