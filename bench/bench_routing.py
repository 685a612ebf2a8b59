"""route and sort_slots, each and one after the other, against eager torch; in a CUDA graph where there is one."""

import pytest
import torch

from ummrm import ops

from . import rivals
from .contender import Contender
from .harness import Case
from .record import OURS
from .workload import router_logits


def ours(logits, top_k):
    return ops.route(logits, top_k=top_k)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_route(contest, device, layer, direction):
    case = Case("route", layer, torch.float32, direction)

    def make():
        return {"logits": router_logits(layer, device).requires_grad_(case.backward), "top_k": layer.k}

    contenders = {OURS: Contender(ours, graph=not case.backward), "torch eager": rivals.route}
    contest(case, contenders, make, rivals.route)


def bench_route_and_sort(contest, device, layer):
    """All that lies between the router's product and the permutation."""

    def make():
        return {"logits": router_logits(layer, device)}

    def both(logits):
        routing = ops.route(logits, top_k=layer.k)
        return [*routing, *ops.sort_slots(routing.expert_indices, layer.e)]

    def eager(logits):
        routing = rivals.route(logits, layer.k)
        return [*routing, *rivals.sort_slots(routing[2], layer.e)]

    contenders = {OURS: Contender(both, graph=True), "torch eager": eager}
    contest(Case("route_and_sort", layer, torch.float32), contenders, make, eager)


def bench_sort_slots(contest, device, layer):
    def make():
        return {"expert_indices": rivals.route(router_logits(layer, device), layer.k)[2], "num_experts": layer.e}

    contenders = {OURS: Contender(ops.sort_slots, graph=True), "torch sort": rivals.sort_slots}
    contest(Case("sort_slots", layer, torch.float32), contenders, make, rivals.sort_slots)
