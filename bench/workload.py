"""What every suite measures on which device: few, wide experts, as upcycled reward models have them.

A suite asks for its sizes by the name of its function; conftest.py makes one case of each. On CUDA they are the sizes
that `targets.py` speaks of, the most telling first: a run that meets its deadline leaves the rest.
"""

from dataclasses import asdict, dataclass

import torch

from . import rivals

_MEMORY_BOUND = ("activation", "permute", "unpermute", "merge", "dots", "adamw", "merged_ffn")


@dataclass(frozen=True)
class Layer:
    """T tokens, H hidden, I intermediate, E routed experts, K of them a token, S shared.

    `routing` says how tokens fall on experts: "balanced" (random logits) or "skewed" (see `router_logits`).
    """

    t: int
    h: int
    i: int
    e: int
    k: int
    s: int = 1
    routing: str = "balanced"

    def __str__(self):
        return f"T={self.t} H={self.h} I={self.i} E={self.e} K={self.k} S={self.s} {self.routing}"

    @property
    def rows(self):
        return self.t * (self.s + self.k)

    @property
    def sizes(self):
        return asdict(self)


_CPU = Layer(512, 512, 1408, 8, 2)
# the layer on a CPU: T, H, I, E, K; the last ones take minutes each
_ON_CPU = ((1024, 64, 128, 7, 5), (512, 512, 1408, 8, 2), (1024, 512, 256, 64, 8))
_QUICK = len(_ON_CPU)
_ON_CPU += ((4096, 384, 1536, 7, 5), (2048, 1024, 2816, 8, 2))
_WIDE = Layer(16384, 4096, 14336, 8, 2)
_LAYERS = ((2048, 8192, 8, 2), (4096, 14336, 8, 2), (1024, 2816, 7, 5), (896, 4864, 7, 5))  # H, I, E, K
_BY_SEQUENCE = ((512, 512, 1408), (1024, 512, 1408), (2048, 512, 1408), (2048, 1024, 2816))  # T, H, I
_PRODUCTS = [Layer(t, h, i, 1, 1, 0) for h, i in ((512, 2816), (1408, 512), (1024, 5632)) for t in (128, 512, 2048)]
_TELLING = 2 * len(_LAYERS)  # sizes of the layer, of those below: balanced, of 16 and 4 thousand tokens
_ROUTED = ((7, 5), (8, 2), (16, 4))  # E, K

SIZES = {
    "cpu": {
        **{name: [_CPU] for name in ("activation", "merge", "dots", "projection", "weight_gradient")},
        "moe_ffn": [Layer(*sizes) for sizes in _ON_CPU],
        "merged_ffn": [_CPU],
        **{name: [Layer(8 * _CPU.t, _CPU.h, _CPU.i, 8, 2)] for name in ("permute", "unpermute")},
        **{name: [Layer(16 * _CPU.t, _CPU.h, _CPU.i, 8, 2)] for name in ("route", "route_and_sort", "sort_slots")},
        "grouped_ffn": [Layer(*layer, 4, 1, 0) for layer in _BY_SEQUENCE],
        "adamw": [Layer(*layer, 4, 1, 0) for layer in _BY_SEQUENCE[2:]],
        "product": _PRODUCTS,
    },
    "cuda": {
        **{name: [_WIDE] for name in ("activation", "merge", "dots", "permute", "unpermute")},
        **{
            name: [Layer(65536, 4096, 14336, e, k) for e, k in _ROUTED]
            for name in ("route", "route_and_sort", "sort_slots")
        },
        **{name: [Layer(16384, *layer) for layer in _LAYERS] for name in ("projection", "weight_gradient")},
        "moe_ffn": [
            Layer(t, *layer, 1, routing)
            for t, routing in (
                (16384, "balanced"),
                (4096, "balanced"),
                (16384, "skewed"),
                (4096, "skewed"),
                (65536, "balanced"),
                (65536, "skewed"),
            )
            for layer in _LAYERS
        ],
        "merged_ffn": [Layer(16384, 2048, 8192, 8, 2)],
        **{name: [Layer(16384, 2048, 8192, 4, 1, 0)] for name in ("grouped_ffn", "adamw")},
        "product": [],  # of libraries for CPUs
    },
}


def dtypes(name, device_type):
    """What a suite is run in: on CUDA matrix products in the type that training uses, copies in a wide one as well."""
    wide = (torch.float32, torch.bfloat16)
    return wide if device_type == "cpu" or name in _MEMORY_BOUND[:-1] else (torch.bfloat16,)


def importance(name, parameters, device_type):
    """Sort key of a case: what a run must not miss for want of time comes first.

    On CUDA cheap operators, then the layer at the most telling sizes, training first, then single products, and the
    layer's other sizes. On a CPU the layer's training in fp32 at sizes that take seconds, then all else, its large
    sizes, and at the end what other libraries' products take.
    """
    if name == "product":
        return (4, 0, False)
    if name == "moe_ffn":
        place, forward = SIZES[device_type][name].index(parameters["layer"]), parameters["direction"] == "forward"
        if device_type == "cuda":
            return (1, place, forward) if place < _TELLING else (3, place, False)
        secondary = forward or parameters["dtype"] is not torch.float32
        return (3 if place >= _QUICK else 2 if secondary else 0, place, secondary)
    if device_type == "cuda":
        return (0 if name in ("route_and_sort", *_MEMORY_BOUND) else 2, 0, False)
    return (1, 0, False)


def router_logits(layer, device):
    """[T, E]. Skewed: expert e is e * 2.8 / (E - 1) less likely in logits, so that the first gets several times its
    share and the last few tokens; no expert is empty and none is sure.

    Logits of a token are at least 2^-15 apart: how experts rank depends on nobody's rounding.
    """
    logits = torch.randn(layer.t, layer.e, device=device)
    experts = torch.arange(layer.e, device=device)
    if layer.routing == "skewed":
        logits -= experts * (2.8 / max(layer.e - 1, 1))
    return (logits * 2**10).round() / 2**10 + experts / (2**10 * max(layer.e, 32))


def layer_inputs(layer, dtype, device):
    """Tensor arguments of moe_ffn without biases, all trained; routed in plain torch, whatever is measured."""

    def make(*shape, scale=1.0):
        return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_()

    w, routing = layer, rivals.route(router_logits(layer, device), layer.k)
    return {
        "x": make(w.t, w.h),
        "shared_weight": routing[0].requires_grad_(),
        "routed_weights": routing[1].requires_grad_(),
        "expert_indices": routing[2],
        "shared_up": make(w.s, 2 * w.i, w.h, scale=w.h**-0.5),
        "routed_up": make(w.e, 2 * w.i, w.h, scale=w.h**-0.5),
        "shared_down": make(w.s, w.h, w.i, scale=w.i**-0.5),
        "routed_down": make(w.e, w.h, w.i, scale=w.i**-0.5),
    }
