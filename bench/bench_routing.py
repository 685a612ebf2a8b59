"""route and sort_slots, against eager torch."""

import pytest
import torch

from ummrm import ops

from . import rivals
from .workload import workload


@pytest.mark.parametrize("label", ["ummrm", "torch eager"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_route(contest, device, label, backward):
    w = workload(device)
    t = 16 * w.t  # routing is small: measured at the token count of a long batch
    torch.manual_seed(0)
    logits = torch.randn(t, w.e, device=device, requires_grad=True)
    function = {"ummrm": ops.route, "torch eager": rivals.route}

    def run(label=label):
        with torch.set_grad_enabled(backward):
            out = function[label](logits, w.k)
            if not backward:
                return list(out)
            loss = out[0].sum() + out[1].square().sum() + out[4].square().sum() + out[5]
            return torch.autograd.grad(loss, logits)

    group = f"route {'forward+backward' if backward else 'forward'}"
    contest(group, label, run, run("torch eager"), torch.float32, f"T={t} E={w.e} K={w.k}", rounds=30)


@pytest.mark.parametrize("label", ["ummrm", "torch sort"])
def bench_sort_slots(contest, device, label):
    w = workload(device)
    t = 16 * w.t
    torch.manual_seed(0)
    indices = ops.route(torch.randn(t, w.e, device=device), w.k).expert_indices

    def eager():
        experts, order = indices.flatten().sort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
        ends = torch.bincount(experts, minlength=w.e).cumsum(0)
        return [inverse, order, torch.cat([ends.new_zeros(1), ends])]

    want = [v.int() for v in eager()]
    function = {"ummrm": lambda: ops.sort_slots(indices, w.e), "torch sort": eager}[label]
    contest("sort_slots", label, function, want, torch.float32, f"T={t} E={w.e} K={w.k}", rounds=30)
