"""permute and unpermute, against eager gathers; bytes over the copy bandwidth of the same run."""

import pytest
import torch

from ummrm import ops
from ummrm.ops import reference

from . import rivals
from .harness import Case
from .record import OURS
from .workload import router_logits


def maps_of(layer, device):
    """Gate weights and slot maps, in plain torch, so that nothing but the measured operator is ours."""
    shared, routed, indices, *_ = rivals.route(router_logits(layer, device), layer.k)
    return shared, routed, reference.sort_slots(indices, layer.e)


def bench_permute(contest, device, layer, dtype):
    t, h, k = layer.t, layer.h, layer.k

    def make():
        _, sorted_to_slot, offsets = maps_of(layer, device)[2]
        return {
            "x": torch.randn(t, h, device=device, dtype=dtype),
            "sorted_to_slot": sorted_to_slot,
            "offsets": offsets,
        }

    def ours(x, sorted_to_slot, offsets):
        return ops.permute(x, sorted_to_slot, offsets, k)

    def eager(x, sorted_to_slot, offsets):
        return x[sorted_to_slot // k]

    case = Case("permute", layer, dtype, bytes=(t + t * k) * h * dtype.itemsize)
    contest(case, {OURS: ours, "torch eager": eager}, make, eager)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_unpermute(contest, device, layer, dtype, direction):
    """With gate weights; backward gives the gradients of rows and of weights."""
    t, h, k, s = layer.t, layer.h, layer.k, layer.s
    # forward: rows in, tokens out; backward: rows and token gradients in, row gradients out
    rows, tokens = layer.rows, t
    moved = (rows + tokens) + (0 if direction == "forward" else 2 * rows + tokens)
    case = Case("unpermute", layer, dtype, direction, bytes=moved * h * dtype.itemsize)

    def make():
        shared, routed, (slot_to_sorted, _, offsets) = maps_of(layer, device)
        return {
            "rows": torch.randn(layer.rows, h, device=device, dtype=dtype, requires_grad=case.backward),
            "slot_to_sorted": slot_to_sorted,
            "offsets": offsets,
            "shared_weight": shared.requires_grad_(case.backward),
            "routed_weights": routed.requires_grad_(case.backward),
        }

    def ours(rows, slot_to_sorted, offsets, shared_weight, routed_weights):
        return ops.unpermute(rows, slot_to_sorted, offsets, shared_weight, routed_weights, s, k)

    def eager(rows, slot_to_sorted, offsets, shared_weight, routed_weights):
        chosen = rows[s * t :][slot_to_sorted].view(t, k, h)
        shared = rows[: s * t].view(s, t, h).sum(0) * (shared_weight / s).unsqueeze(-1)
        return (shared + (chosen * routed_weights.unsqueeze(-1)).sum(1)).to(dtype)

    contest(case, {OURS: ours, "torch eager": eager}, make, eager)
