"""route and sort_slots, each and one after the other, against eager torch; in a CUDA graph where there is one."""

import pytest
import torch

from ummrm import ops

from . import rivals
from .harness import Case
from .workload import router_logits


def ours(logits, top_k):
    return ops.route(logits, top_k=top_k)


@pytest.mark.parametrize("label", ["ummrm", "torch eager"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_route(contest, device, layer, direction, label):
    case = Case("route", layer, torch.float32, direction)

    def make():
        return {"logits": router_logits(layer, device).requires_grad_(case.backward), "top_k": layer.k}

    function = {"ummrm": ours, "torch eager": rivals.route}[label]
    contest(case, label, function, make, rivals.route, graph=label == "ummrm" and not case.backward, rounds=30)


@pytest.mark.parametrize("label", ["ummrm", "torch eager"])
def bench_route_and_sort(contest, device, layer, label):
    """All that lies between the router's product and the permutation."""

    def make():
        return {"logits": router_logits(layer, device)}

    def both(logits):
        routing = ops.route(logits, top_k=layer.k)
        return [*routing, *ops.sort_slots(routing.expert_indices, layer.e)]

    def eager(logits):
        routing = rivals.route(logits, layer.k)
        return [*routing, *rivals.sort_slots(routing[2], layer.e)]

    case, function = Case("route_and_sort", layer, torch.float32), {"ummrm": both, "torch eager": eager}[label]
    contest(case, label, function, make, eager, graph=label == "ummrm", rounds=30)


@pytest.mark.parametrize("label", ["ummrm", "torch sort"])
def bench_sort_slots(contest, device, layer, label):
    def make():
        return {"expert_indices": rivals.route(router_logits(layer, device), layer.k)[2], "num_experts": layer.e}

    function = {"ummrm": ops.sort_slots, "torch sort": rivals.sort_slots}[label]
    case = Case("sort_slots", layer, torch.float32)
    contest(case, label, function, make, rivals.sort_slots, graph=label == "ummrm", rounds=30)
