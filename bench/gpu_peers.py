"""What else users have for GPUs: other people's routed experts, where installed, beside the same shared FFN.

No machine that measured anything so far had one of them, so that a call which fails is recorded with what it said and
fails nothing. Weights are laid out as each wants them when inputs are made, outside of what is timed.
"""

import importlib.util
from functools import cached_property, partial

import torch
import torch.nn.functional as F

from .contender import Contender

PACKAGES = {"ScatterMoE": "scattermoe", "MegaBlocks": "megablocks", "TransformerEngine": "transformer_engine"}


def layers(layer, dtype, device, make, reference, of_transformers):
    """Contenders by label, or why they are not run.

    Args:
        layer, dtype, device: of the case.
        make: its inputs.
        reference: what computes the layer from them.
        of_transformers: makes the contender of one of transformers' implementations.
    """
    found = {
        f"transformers {name}": Contender(of_transformers(name), make, reference, foreign=True)
        for name in ("sonicmoe", "deepgemm")
    }
    for label, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            found[label] = f"{package} is not installed"
            continue
        peer = {"ScatterMoE": ScatterMoE, "MegaBlocks": MegaBlocks, "TransformerEngine": TransformerEngine}[label]
        inputs = partial(_laid_out, peer, make)
        found[label] = Contender(peer(layer, dtype, device), inputs, partial(_plain, peer, reference), foreign=True)
    return found


def _laid_out(peer, make):
    """The case's inputs with the routed weights as a peer has them, under the names of its own parameters."""
    inputs = make()
    weights = peer.weights(inputs.pop("routed_up").detach(), inputs.pop("routed_down").detach())
    return inputs | {"weights": {name: w.contiguous().requires_grad_() for name, w in weights.items()}}


def _plain(peer, reference, weights, **inputs):
    """The reference on a peer's weights, so that their gradients are compared in its layout."""
    up, down = peer.stacked(weights, inputs["shared_up"].shape[1], inputs["x"].shape[1])
    return reference(routed_up=up, routed_down=down, **inputs)


class Peer:
    """A layer whose routed experts are somebody else's module, made at the first call."""

    def __init__(self, layer, dtype, device):
        self._layer, self._dtype, self._device = layer, dtype, device

    def __call__(self, x, shared_weight, routed_weights, expert_indices, shared_up, shared_down, weights):
        routed = self._routed(x, routed_weights.to(x.dtype), expert_indices.long(), weights)
        total = 0
        for up, down in zip(shared_up, shared_down, strict=True):
            gate, value = F.linear(x, up).chunk(2, dim=-1)
            total = total + F.linear(F.silu(gate) * value, down)
        return routed + (shared_weight / len(shared_up)).unsqueeze(-1).to(x.dtype) * total


class ScatterMoE(Peer):
    """scattermoe.mlp.GLUMLP, whose first half of rows is the value and whose second is the gate."""

    @staticmethod
    def weights(up, down):
        gate, value = up.chunk(2, dim=1)
        return {"experts.weight": torch.cat([value, gate], 1), "output_experts.weight": down}

    @staticmethod
    def stacked(weights, width, hidden):
        value, gate = weights["experts.weight"].chunk(2, dim=1)
        return torch.cat([gate, value], 1), weights["output_experts.weight"]

    @cached_property
    def _module(self):
        from scattermoe.mlp import GLUMLP

        w = self._layer
        return GLUMLP(w.h, w.i, w.e, w.k).to(self._device, self._dtype)

    def _routed(self, x, routed_weights, expert_indices, weights):
        return torch.func.functional_call(self._module, weights, (x, routed_weights, expert_indices))


class MegaBlocks(Peer):
    """MegaBlocks' dropless experts with grouped products, below its own router."""

    @staticmethod
    def weights(up, down):
        gate, value = (half.flatten(0, 1) for half in up.chunk(2, dim=1))
        return {"mlp.w1": gate, "mlp.v1": value, "mlp.w2": down.mT.flatten(0, 1)}

    @staticmethod
    def stacked(weights, width, hidden):
        gate, value, down = (weights[f"mlp.{name}"].view(-1, width // 2, hidden) for name in ("w1", "v1", "w2"))
        return torch.cat([gate, value], 1), down.mT

    @cached_property
    def _module(self):
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import ParallelDroplessMLP

        w = self._layer
        sizes = {"hidden_size": w.h, "ffn_hidden_size": w.i, "moe_num_experts": w.e, "moe_top_k": w.k}
        kind = {"mlp_type": "glu", "mlp_impl": "grouped", "activation_fn": F.silu, "bias": False, "return_bias": False}
        types = {"fp16": False, "bf16": self._dtype is torch.bfloat16, "device": self._device}
        return ParallelDroplessMLP(Arguments(**sizes, **kind, **types, moe_loss_weight=0)).to(self._dtype)

    def _routed(self, x, routed_weights, expert_indices, weights):
        arguments = x.unsqueeze(1), None, routed_weights, expert_indices
        return torch.func.functional_call(self._module, weights, arguments).squeeze(1)


class TransformerEngine(Peer):
    """TransformerEngine's GroupedLinear twice, around rows that torch sorts, since it takes no routing itself."""

    @staticmethod
    def weights(up, down):
        kinds = {"up": up, "down": down}
        return {f"{kind}.weight{e}": w for kind, stack in kinds.items() for e, w in enumerate(stack.unbind())}

    @staticmethod
    def stacked(weights, width, hidden):
        count = len(weights) // 2
        return tuple(torch.stack([weights[f"{kind}.weight{e}"] for e in range(count)]) for kind in ("up", "down"))

    @cached_property
    def _module(self):
        from transformer_engine.pytorch import GroupedLinear

        w = self._layer
        options = {"bias": False, "params_dtype": self._dtype, "device": self._device}
        shapes = {"up": (w.h, 2 * w.i), "down": (w.i, w.h)}
        return torch.nn.ModuleDict({name: GroupedLinear(w.e, *shape, **options) for name, shape in shapes.items()})

    def _product(self, name, rows, counts, weights):
        own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
        return torch.func.functional_call(self._module[name], own, (rows, counts))

    def _routed(self, x, routed_weights, expert_indices, weights):
        experts, order = expert_indices.flatten().sort(stable=True)
        counts = torch.bincount(experts, minlength=self._layer.e).tolist()
        rows = x[order // self._layer.k]
        gate, value = self._product("up", rows, counts, weights).chunk(2, dim=-1)
        out = self._product("down", F.silu(gate) * value, counts, weights)
        weighted = out * routed_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // self._layer.k, weighted)
