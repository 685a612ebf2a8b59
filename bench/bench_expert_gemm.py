"""The grouped products of the layer, each alone, against one mm of equal M, N and K, a loop, and grouped_mm.

up and down are forward; dAct and dX go back through them; wgrad_up and wgrad_down are the weight gradients. FLOPs over
the mm rate of the run. "mm, equal size" multiplies all rows by one expert's weight: what the groups cost is beside it.
"""

import pytest
import torch
import torch.nn.functional as F

from ummrm import ops
from ummrm.ops import reference

from . import rivals
from .contender import Contender
from .harness import Case
from .record import LOOP, MM, OURS, TORCH_GROUPED
from .workload import router_logits

PIECES = {"up": False, "down": False, "dAct": True, "dX": True}  # whether the projection is taken as it is


def group_offsets(layer, device):
    indices = rivals.route(router_logits(layer, device), layer.k)[2]
    return reference.sort_slots(indices, layer.e)[2]


def scaled(layer, dtype, device):
    return lambda *shape: torch.randn(shape, device=device, dtype=dtype).mul_(layer.h**-0.25)


@pytest.mark.parametrize("piece", PIECES)
def bench_projection(contest, device, layer, dtype, piece):
    w, transpose, new = layer, PIECES[piece], scaled(layer, dtype, device)
    n, d = (2 * w.i, w.h) if piece in ("up", "dX") else (w.h, w.i)
    width = n if transpose else d

    def make():
        blocks = 1 if piece == "up" else w.s  # x itself, or one block of rows for each shared expert
        return {
            "shared_rows": new(blocks * w.t, width),
            "routed_rows": new(w.t * w.k, width),
            "shared": new(w.s, n, d),
            "routed": new(w.e, n, d),
            "offsets": group_offsets(layer, device),
        }

    def ours(shared_rows, routed_rows, shared, routed, offsets):
        return ops.expert_gemm(shared_rows, routed_rows, shared, routed, offsets, w.t, transpose=transpose)

    def product(rows, weight):
        return rows @ weight if transpose else F.linear(rows, weight)

    def shared_parts(shared_rows, shared):
        blocks = [shared_rows] * w.s if piece == "up" else shared_rows.split(w.t)
        return [product(rows, weight) for rows, weight in zip(blocks, shared, strict=True)]

    def loop(shared_rows, routed_rows, shared, routed, offsets):
        parts = zip(routed_rows.split(offsets.diff().tolist()), routed, strict=True)
        return torch.cat([*shared_parts(shared_rows, shared), *(product(r, p) for r, p in parts)])

    def grouped(shared_rows, routed_rows, shared, routed, offsets):
        weights = routed if transpose else routed.mT
        return torch.cat([*shared_parts(shared_rows, shared), F.grouped_mm(routed_rows, weights, offs=offsets[1:])])

    def one(rows, weight):
        return product(rows, weight)

    case = Case(f"expert_gemm {piece}", layer, dtype, flops=2 * w.rows * n * d)
    single = Contender(one, lambda: {"rows": new(w.rows, width), "weight": new(n, d)})
    contest(case, {OURS: ours, MM: single, LOOP: loop, TORCH_GROUPED: grouped}, make, loop)


@pytest.mark.parametrize("piece", ["wgrad_up", "wgrad_down"])
def bench_weight_gradient(contest, device, layer, dtype, piece):
    w, new = layer, scaled(layer, dtype, device)
    n, d = (2 * w.i, w.h) if piece == "wgrad_up" else (w.h, w.i)

    def make():
        return {
            "shared_grads": new(w.s * w.t, n),
            "routed_grads": new(w.t * w.k, n),
            "shared_rows": new(w.t if piece == "wgrad_up" else w.s * w.t, d),
            "routed_rows": new(w.t * w.k, d),
            "offsets": group_offsets(layer, device),
        }

    def ours(offsets, **rows):
        return torch.ops.ummrm.expert_gemm_wgrad(*rows.values(), offsets, w.t, w.s, True, True)

    def loop(shared_grads, routed_grads, shared_rows, routed_rows, offsets):
        blocks = [shared_rows] * w.s if piece == "wgrad_up" else shared_rows.split(w.t)
        shared = torch.stack([g.T @ x for g, x in zip(shared_grads.split(w.t), blocks, strict=True)])
        parts = zip(*(v.split(offsets.diff().tolist()) for v in (routed_grads, routed_rows)), strict=True)
        return shared, torch.stack([g.T @ r for g, r in parts])

    def one(grads, rows):
        return grads.T @ rows

    case = Case(f"expert_gemm {piece}", layer, dtype, flops=2 * w.rows * n * d)
    single = Contender(one, lambda: {"grads": new(w.rows, n), "rows": new(w.rows, d)})
    contest(case, {OURS: ours, MM: single, LOOP: loop}, make, loop)
