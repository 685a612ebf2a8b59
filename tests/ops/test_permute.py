"""permute and unpermute: gathering slots in sorted order, and the gated sum back into tokens."""

import pytest
import torch
from op_inputs import assert_deterministic, assert_refused, expert_indices, floats, gate_dtype, gate_weights, strided
from tolerances import DTYPES, compare

from ummrm import ops
from ummrm.ops import reference

KINDS = ("random", "first", "hole", "some_dead", "all_dead")
SIZES = [(1, 1, 1, 1), (6, 5, 1, 1), (9, 3, 4, 4), (33, 13, 7, 5), (65, 130, 3, 2)]  # T, H, E, K
poisoned = pytest.mark.usefixtures("poisoned")


def sorted_slots(t, e, k, kind="random"):
    indices = expert_indices(t, e, k, kind)
    slot_to_sorted, sorted_to_slot, offsets = ops.sort_slots(indices, e)
    return indices, slot_to_sorted, sorted_to_slot, offsets


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("t", "h", "e", "k"), SIZES)
def test_permute_against_reference(backend, dtype, kind, t, h, e, k):
    _, _, sorted_to_slot, offsets = sorted_slots(t, e, k, kind)
    arguments = {
        "x": floats(t, h, dtype=dtype, requires_grad=True),
        "sorted_to_slot": sorted_to_slot,
        "expert_offsets": offsets,
        "top_k": k,
    }
    compare(ops.permute, reference.permute, arguments)
    rows = ops.permute(**arguments)
    live = int(offsets[-1])
    assert torch.equal(rows[:live], arguments["x"][(sorted_to_slot[:live] // k).long()])
    assert rows[live:].eq(0).all()


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", ["both", "shared", "routed", "none"])
@pytest.mark.parametrize("s", [0, 1, 2, 3])
def test_unpermute_against_reference(backend, dtype, weights, s):
    for kind, (t, h, e, k) in zip(KINDS, SIZES, strict=True):
        indices, slot_to_sorted, _, offsets = sorted_slots(t, e, k, kind)
        shared, routed = gate_weights(indices, gate_dtype(dtype), requires_grad=True)
        arguments = {
            "rows": floats(s * t + t * k, h, dtype=dtype, requires_grad=True),
            "slot_to_sorted": slot_to_sorted,
            "expert_offsets": offsets,
            "shared_weight": shared if weights in ("both", "shared") and s else None,
            "routed_weights": routed if weights in ("both", "routed") else None,
            "num_shared_experts": s,
            "top_k": k,
        }
        compare(ops.unpermute, reference.unpermute, arguments, floor_dtype=dtype)


@poisoned
def test_gradcheck(backend):
    indices, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(5, 4, 2, "some_dead")
    x = floats(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.permute(x, sorted_to_slot, offsets, 2), x)
    shared, routed = gate_weights(indices, torch.float64, requires_grad=True)
    rows = floats(2 * 5 + 10, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rows, shared, routed: ops.unpermute(rows, slot_to_sorted, offsets, shared, routed, 2, 2),
        (rows, shared, routed),
    )


@poisoned
@pytest.mark.parametrize("weighted", [False, True])
def test_reference_backward_is_the_derivative(weighted):
    """The hand-written reference.unpermute_backward against autograd of reference.unpermute."""
    indices, slot_to_sorted, _, offsets = sorted_slots(6, 4, 3, "some_dead")
    weights = gate_weights(indices, torch.float64, requires_grad=True) if weighted else (None, None)
    rows = floats(2 * 6 + 18, 5, dtype=torch.float64, requires_grad=True)
    out = reference.unpermute(rows, slot_to_sorted, offsets, *weights, 2, 3)
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, [rows, *weights] if weighted else [rows], grad)
    got = reference.unpermute_backward(grad, rows, slot_to_sorted, offsets, *weights, 2, 3)
    for a, b in zip(want, got, strict=False):
        torch.testing.assert_close(a, b.detach())
    assert [g.numel() for g in got[1:]] == ([6, 18] if weighted else [0, 0])


@poisoned
def test_dead_rows_are_never_read(backend):
    indices, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(30, 4, 2, "some_dead")
    shared, routed = gate_weights(indices, requires_grad=True)
    rows = floats(30 + 60, 8, requires_grad=True)
    with torch.no_grad():
        rows[30 + int(offsets[-1]) :] = float("nan")
    out = ops.unpermute(rows, slot_to_sorted, offsets, shared, routed, 1, 2)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.sum(), (rows, shared, routed))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][30 + int(offsets[-1]) :].eq(0).all() and grads[2][indices < 0].eq(0).all()
    x = floats(30, 8, requires_grad=True)
    with torch.no_grad():
        x[indices[:, 0] < 0] = float("nan")
    gathered = ops.permute(x, sorted_to_slot, offsets, 2)
    assert gathered.isfinite().all()
    (grad,) = torch.autograd.grad(gathered.sum(), x)
    assert grad[indices[:, 0] < 0].eq(0).all()


@poisoned
def test_nan_stays_with_its_token(backend):
    indices, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(10, 4, 2)
    x = floats(10, 3)
    x[4, 1] = float("nan")
    rows = ops.permute(x, sorted_to_slot, offsets, 2)
    assert rows.isnan().sum() == 2
    out = ops.unpermute(torch.cat([x, rows]), slot_to_sorted, offsets, *gate_weights(indices), 1, 2)
    assert out.isnan().nonzero().tolist() == [[4, 1]]


@poisoned
def test_unpermute_inverts_permute():
    x = floats(20, 6)
    _, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(20, 5, 3)
    rows = ops.permute(x, sorted_to_slot, offsets, 3)
    out = ops.unpermute(rows, slot_to_sorted, offsets, None, torch.full((20, 3), 1 / 3), 0, 3)
    torch.testing.assert_close(out, x)


@poisoned
def test_no_tokens(backend):
    _, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(0, 3, 2)
    x = torch.empty(0, 4, requires_grad=True)
    rows = ops.permute(x, sorted_to_slot, offsets, 2)
    out = ops.unpermute(torch.cat([x, x, rows]), slot_to_sorted, offsets, torch.empty(0), torch.empty(0, 2), 2, 2)
    assert rows.shape == (0, 4) and out.shape == (0, 4)
    assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 4)


@poisoned
def test_strided_inputs(backend):
    indices, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(12, 4, 3, "some_dead")
    x, (shared, routed) = floats(12, 6), gate_weights(indices)
    rows = ops.permute(x, sorted_to_slot, offsets, 3)
    assert torch.equal(rows, ops.permute(strided(x), strided(sorted_to_slot[None])[0], strided(offsets[None])[0], 3))
    assert torch.equal(rows, ops.permute(x.T.contiguous().T, sorted_to_slot, offsets, 3))
    buffer = torch.cat([x, rows]).requires_grad_()
    maps = slot_to_sorted, offsets
    want = ops.unpermute(buffer, *maps, shared, routed, 1, 3)
    views = strided(slot_to_sorted[None])[0], strided(offsets[None])[0], strided(shared[None])[0], strided(routed)
    assert torch.equal(want, ops.unpermute(strided(buffer), *views, 1, 3))
    grad = torch.randn(6, 12).T
    torch.testing.assert_close(
        torch.autograd.grad(want, buffer, grad)[0],
        torch.autograd.grad(ops.unpermute(buffer, *views, 1, 3), buffer, grad.contiguous())[0],
        rtol=0,
        atol=0,
    )


@poisoned
def test_deterministic():
    indices, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(700, 5, 4, "some_dead")
    shared, routed = gate_weights(indices, requires_grad=True)
    x = floats(700, 33, dtype=torch.bfloat16, requires_grad=True)

    def both():
        rows = ops.permute(x, sorted_to_slot, offsets, 4)
        out = ops.unpermute(torch.cat([x, rows]), slot_to_sorted, offsets, shared, routed, 1, 4)
        return [out, *torch.autograd.grad(out.square().sum(), (x, shared, routed))]

    assert_deterministic(both)


_, GOOD_SLOT_TO_SORTED, GOOD_SORTED_TO_SLOT, GOOD_OFFSETS = sorted_slots(5, 3, 2)
PERMUTE = {"x": torch.randn(5, 4), "sorted_to_slot": GOOD_SORTED_TO_SLOT, "expert_offsets": GOOD_OFFSETS, "top_k": 2}
UNPERMUTE = {
    "rows": torch.randn(5 + 10, 4),
    "slot_to_sorted": GOOD_SLOT_TO_SORTED,
    "expert_offsets": GOOD_OFFSETS,
    "shared_weight": torch.rand(5),
    "routed_weights": torch.rand(5, 2),
    "num_shared_experts": 1,
    "top_k": 2,
}


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"x": torch.randn(5)}, ValueError, "x"),
        ({"x": torch.ones(5, 4, dtype=torch.int32)}, TypeError, "x"),
        ({"sorted_to_slot": GOOD_SORTED_TO_SLOT.long()}, TypeError, "sorted_to_slot"),
        ({"sorted_to_slot": GOOD_SORTED_TO_SLOT[:9]}, ValueError, "sorted_to_slot"),
        ({"sorted_to_slot": GOOD_SORTED_TO_SLOT.view(5, 2)}, ValueError, "sorted_to_slot"),
        ({"sorted_to_slot": torch.full((10,), 10, dtype=torch.int32)}, IndexError, "sorted_to_slot"),
        ({"sorted_to_slot": torch.full((10,), -1, dtype=torch.int32)}, IndexError, "sorted_to_slot"),
        ({"expert_offsets": GOOD_OFFSETS.float()}, TypeError, "expert_offsets"),
        ({"expert_offsets": GOOD_OFFSETS.view(2, 2)}, ValueError, "expert_offsets"),
        ({"expert_offsets": torch.tensor([0, 4, 8, 11], dtype=torch.int32)}, IndexError, "expert_offsets"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"x": torch.randn(5, 4, device="meta")}, ValueError, "sorted_to_slot"),
    ],
)
def test_permute_refuses(override, error, argument):
    assert_refused("permute", PERMUTE, override, error, argument)


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"rows": torch.randn(15)}, ValueError, "rows"),
        ({"rows": torch.randn(14, 4)}, ValueError, "rows"),
        ({"rows": torch.ones(15, 4, dtype=torch.int64)}, TypeError, "rows"),
        ({"slot_to_sorted": GOOD_SLOT_TO_SORTED.long()}, TypeError, "slot_to_sorted"),
        ({"slot_to_sorted": torch.full((10,), 10, dtype=torch.int32)}, IndexError, "slot_to_sorted"),
        ({"slot_to_sorted": torch.full((10,), -1, dtype=torch.int32)}, IndexError, "slot_to_sorted"),
        ({"expert_offsets": GOOD_OFFSETS.long()}, TypeError, "expert_offsets"),
        ({"shared_weight": torch.rand(6)}, ValueError, "shared_weight"),
        ({"shared_weight": torch.rand(5, dtype=torch.bfloat16)}, TypeError, "shared_weight"),
        ({"routed_weights": torch.rand(5, 3)}, ValueError, "routed_weights"),
        ({"routed_weights": torch.rand(5, 2, dtype=torch.float64)}, TypeError, "routed_weights"),
        ({"num_shared_experts": -1}, ValueError, "num_shared_experts"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 3}, ValueError, "slot_to_sorted"),
    ],
)
def test_unpermute_refuses(override, error, argument):
    assert_refused("unpermute", UNPERMUTE, override, error, argument)


@poisoned
def test_opcheck():
    indices, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(6, 4, 2, "some_dead")
    x, rows = floats(6, 3, requires_grad=True), floats(2 * 6 + 12, 3, requires_grad=True)
    shared, routed = gate_weights(indices, requires_grad=True)
    torch.library.opcheck(torch.ops.ummrm.permute.default, (x, sorted_to_slot, offsets, 2))
    maps = slot_to_sorted, offsets
    torch.library.opcheck(torch.ops.ummrm.unpermute.default, (rows, *maps, shared, routed, 2, 2))
    torch.library.opcheck(torch.ops.ummrm.unpermute.default, (rows, *maps, None, None, 2, 2))
    detached = rows.detach(), *maps, shared.detach(), routed.detach()
    torch.library.opcheck(torch.ops.ummrm.unpermute_backward.default, (x.detach(), *detached, 2, 2))


@poisoned
def test_compiled(compiled):
    indices, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(8, 4, 2, "some_dead")
    x, (shared, routed) = floats(8, 3, requires_grad=True), gate_weights(indices, requires_grad=True)

    def function(x, shared, routed):
        rows = ops.permute(x, sorted_to_slot, offsets, 2)
        return ops.unpermute(torch.cat([x, rows * 2]), slot_to_sorted, offsets, shared, routed, 1, 2)

    want, got = function(x, shared, routed), compiled(function)(x, shared, routed)
    assert torch.equal(want, got)
    for a, b in zip(*(torch.autograd.grad(out.sum(), (x, shared, routed)) for out in (want, got)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.full
def test_beyond_two_to_the_31_elements():
    """T*K*H = 2.3e9 elements, 4.6 GB of bf16: offsets need 64 bits, forward and backward."""
    t, h, e, k = 70_000, 2048, 16, 16
    _, slot_to_sorted, sorted_to_slot, offsets = sorted_slots(t, e, k, "random")
    x = floats(1, h).bfloat16() + torch.arange(t, dtype=torch.bfloat16).unsqueeze(-1)
    rows = ops.permute(x, sorted_to_slot, offsets, k)
    assert rows.numel() > 2**31
    probe = torch.cat([torch.randint(0, t * k, (500,)), torch.tensor([0, t * k - 1])])
    assert torch.equal(rows[probe], x[(sorted_to_slot[probe] // k).long()])
    out = ops.unpermute(rows, slot_to_sorted, offsets, None, torch.full((t, k), 1 / k), 0, k)
    torch.testing.assert_close(out[-100:], x[-100:])
