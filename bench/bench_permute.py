"""permute and unpermute, against eager gathers; bytes over the copy bandwidth of the same run."""

import pytest
import torch

from ummrm import ops

from .workload import DTYPES, workload


@pytest.fixture(params=DTYPES, ids=str)
def routed(request, device):
    w, dtype = workload(device), request.param
    torch.manual_seed(0)
    t = 8 * w.t
    routing = ops.route(torch.randn(t, w.e, device=device), w.k)
    maps = ops.sort_slots(routing.expert_indices, w.e)
    x = torch.randn(t, w.h, device=device).to(dtype)
    rows = torch.randn((w.s + w.k) * t, w.h, device=device).to(dtype)
    return w, t, dtype, routing, maps, x, rows


@pytest.mark.parametrize("label", ["ummrm", "torch eager"])
def bench_permute(contest, routed, label):
    w, t, dtype, _, (_, sorted_to_slot, offsets), x, _ = routed

    def eager():
        return x[sorted_to_slot // w.k]

    function = {"ummrm": lambda: ops.permute(x, sorted_to_slot, offsets, w.k), "torch eager": eager}[label]
    moved = (t + t * w.k) * w.h * dtype.itemsize
    contest(f"permute {dtype}", label, function, [eager()], dtype, f"T={t} H={w.h} K={w.k}", moved, rounds=15)


@pytest.mark.parametrize("label", ["ummrm", "torch eager"])
def bench_unpermute(contest, routed, label):
    w, t, dtype, routing, (slot_to_sorted, _, offsets), _, rows = routed

    def eager():
        chosen = rows[w.s * t :][slot_to_sorted].view(t, w.k, w.h)
        shared = rows[: w.s * t].view(w.s, t, w.h).sum(0) * (routing.shared_weight / w.s).unsqueeze(-1)
        return (shared + (chosen * routing.routed_weights.unsqueeze(-1)).sum(1)).to(dtype)

    def ours():
        weights = routing.shared_weight, routing.routed_weights
        return ops.unpermute(rows, slot_to_sorted, offsets, *weights, w.s, w.k)

    moved = (rows.shape[0] + t) * w.h * dtype.itemsize
    function = {"ummrm": ours, "torch eager": eager}[label]
    contest(f"unpermute {dtype}", label, function, [eager()], dtype, f"T={t} H={w.h} K={w.k}", moved, rounds=15)
