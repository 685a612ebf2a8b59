"""route and sort_slots: gate weights, statistics, the token mask, ties, and the stable order by expert."""

import pytest
import torch
from op_inputs import assert_deterministic, assert_refused, expert_indices, floats, strided
from tolerances import DTYPES, compare

from ummrm import ops
from ummrm.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")
GATES = ("shared_complement", "fixed")
SIZES = [(1, 1, 1), (5, 1, 1), (7, 3, 3), (33, 7, 5), (130, 16, 2), (17, 67, 9)]  # T, E, K
MASKS = ["none", "some", "all_dead", "some", "none", "some"]


def mask_of(kind, t):
    return {"none": None, "some": torch.rand(t) < 0.6, "all_dead": torch.zeros(t, dtype=torch.bool)}[kind]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "e", "k", "mask"), [(*size, mask) for size, mask in zip(SIZES, MASKS, strict=True)])
def test_route_against_reference(backend, gate, dtype, t, e, k, mask):
    arguments = {
        "logits": floats(t, e, dtype=dtype, requires_grad=True, scale=2),
        "top_k": k,
        "mask": mask_of(mask, t),
        "gate": gate,
        "fixed_shared_weight": 0.3,
    }
    compare(ops.route, reference.route, arguments)
    noise_free = {"clean_logits": floats(t, e, dtype=dtype, requires_grad=True, scale=2)}
    compare(ops.route, reference.route, arguments | noise_free)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("clean", [False, True])
def test_route_gradcheck(backend, gate, clean):
    logits = floats(4, 5, dtype=torch.float64, requires_grad=True)
    clean_logits = floats(4, 5, dtype=torch.float64, requires_grad=True) if clean else None
    mask = torch.tensor([True, True, False, True])

    def differentiable(logits, clean_logits):
        out = ops.route(logits, mask, clean_logits, top_k=3, gate=gate, fixed_shared_weight=0.3)
        return out.shared_weight, out.routed_weights, out.mean_prob, out.mean_z

    assert torch.autograd.gradcheck(differentiable, (logits, clean_logits))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("clean", [False, True])
def test_reference_backward_is_the_derivative(gate, clean):
    """The hand-written reference.route_backward against autograd of reference.route."""
    logits = floats(9, 5, dtype=torch.float64, requires_grad=True)
    clean_logits = floats(9, 5, dtype=torch.float64, requires_grad=True) if clean else None
    mask = torch.rand(9) < 0.7
    out = reference.route(logits, mask, clean_logits, top_k=3, gate=gate, fixed_shared_weight=0.3)
    grads = [torch.randn_like(out[i]) for i in (0, 1, 4, 5)]
    loss = sum((out[i] * g).sum() for i, g in zip((0, 1, 4, 5), grads, strict=True))
    want = torch.autograd.grad(loss, [logits, clean_logits] if clean else [logits])
    got = reference.route_backward(*grads, logits, mask, clean_logits, out[2], out[3], gate, 0.3)
    for a, b in zip(want, got, strict=False):
        torch.testing.assert_close(a, b.detach())
    assert got[1].numel() == (45 if clean else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_index(dtype):
    logits = torch.randint(0, 3, (200, 9)).to(dtype)
    indices = ops.route(logits, top_k=6).expert_indices
    want = [sorted(range(9), key=lambda e: (-row[e], e))[:6] for row in logits.tolist()]
    assert indices.tolist() == want
    assert ops.route(torch.zeros(3, 9, dtype=dtype), top_k=9).expert_indices.tolist() == [list(range(9))] * 3


def test_ranking_does_not_depend_on_the_rounding_of_exp():
    """Far from the largest, neighbouring floats have equal softmax, but they are no tie."""
    low = torch.tensor(-60.0)
    logits = torch.stack([torch.tensor(0.0), low, torch.nextafter(low, torch.tensor(0.0)), low]).unsqueeze(0)
    assert ops.route(logits, top_k=4).expert_indices.tolist() == [[0, 2, 1, 3]]


@pytest.mark.parametrize("gate", GATES)
def test_gate_weights_sum_to_one(gate):
    out = ops.route(floats(50, 8, scale=4), top_k=3, gate=gate, fixed_shared_weight=0.25)
    torch.testing.assert_close(out.shared_weight + out.routed_weights.sum(-1), torch.ones(50))
    assert (out.routed_weights[:, :-1] >= out.routed_weights[:, 1:]).all()


def test_single_choices():
    logits = floats(11, 4)
    p = logits.softmax(-1).amax(-1)
    torch.testing.assert_close(
        ops.route(logits, top_k=1).routed_weights[:, 0], p
    )  # K=1: p_(1), since softmax of one is 1
    one = ops.route(floats(11, 1), top_k=1)
    assert (one.shared_weight == 0).all() and (one.routed_weights == 1).all()  # E=1: nothing left for the shared expert


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_rows(backend, bad):
    logits = floats(4, 5, requires_grad=True)
    with torch.no_grad():
        logits[1, 3] = bad
        logits[2] = -float("inf")
    out = ops.route(logits, top_k=3)
    assert out.shared_weight[1:3].isnan().all() and out.routed_weights[1:3].isnan().all()
    assert out.expert_indices[1:3].tolist() == [[0, 1, 2]] * 2
    assert out.shared_weight[[0, 3]].isfinite().all() and out.mean_prob.isnan().all() and not out.mean_z.isfinite()
    assert out.tokens_per_expert.sum() == 12
    (grad,) = torch.autograd.grad(out.routed_weights.sum() + out.shared_weight.square().sum(), logits)
    assert grad[[0, 3]].isfinite().all() and grad[1:3].isnan().all()


@pytest.mark.parametrize("infinity", [float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nan_beside_an_infinity(backend, dtype, infinity):
    """An infinity is the largest of its row, or all of the rest: it must not hide the NaN from the statistics."""
    for first, second in ((float("nan"), infinity), (infinity, float("nan"))):
        for clean in (False, True):
            logits = floats(20, 5, dtype=dtype)
            bad = logits.clone()
            bad[7] = infinity if infinity < 0 else bad[7]
            bad[7, 1], bad[7, 4] = first, second
            arguments = (logits, None, bad) if clean else (bad,)
            out = ops.route(*arguments, top_k=2)
            assert out.mean_z.isnan() and out.mean_prob.isnan().all()
            assert reference.route(*arguments, top_k=2).mean_z.isnan()


def test_masked_nan_is_invisible(backend):
    logits = floats(4, 5, requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    with torch.no_grad():
        logits[1] = float("nan")
        logits[3, 0] = float("inf")
    out = ops.route(logits, mask, top_k=2)
    assert out.expert_indices[~mask].eq(-1).all() and out.routed_weights[~mask].eq(0).all()
    assert out.shared_weight[~mask].eq(1).all()
    want = ops.route(logits[mask].detach(), top_k=2)
    torch.testing.assert_close(out.mean_prob, want.mean_prob)
    torch.testing.assert_close(out.mean_z, want.mean_z)
    assert torch.equal(out.tokens_per_expert, want.tokens_per_expert)
    (grad,) = torch.autograd.grad(
        out.routed_weights.square().sum() + out.shared_weight.square().sum() + out.mean_prob[0] + out.mean_z, logits
    )
    assert grad[mask].isfinite().all() and grad[~mask].eq(0).all()


def test_large_logits_do_not_overflow():
    out = ops.route(torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]]), top_k=2)
    assert out.shared_weight[0] == 0 and out.expert_indices.tolist() == [[0, 2], [0, 1]]
    torch.testing.assert_close(out.shared_weight[1], torch.tensor(2 / 3))


def test_route_without_tokens(backend):
    logits = torch.empty(0, 4, requires_grad=True)
    out = ops.route(logits, torch.empty(0, dtype=torch.bool), top_k=2)
    assert [list(t.shape) for t in out] == [[0], [0, 2], [0, 2], [4], [4], []]
    assert out.tokens_per_expert.eq(0).all() and out.mean_prob.eq(0).all() and out.mean_z == 0
    (grad,) = torch.autograd.grad(out.mean_prob.sum() + out.mean_z, logits)
    assert grad.shape == (0, 4)


def test_route_strided_inputs(backend):
    logits, mask = floats(20, 6), torch.rand(20) < 0.6
    want = ops.route(logits, mask, logits * 2, top_k=3)
    views = strided(logits), strided(mask.unsqueeze(0))[0], strided(logits * 2)
    for a, b in zip(want, ops.route(*views, top_k=3), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(want, ops.route(logits.T.contiguous().T, mask, views[2], top_k=3), strict=True):
        assert torch.equal(a, b)


def test_route_does_not_change_its_inputs():
    logits, mask = floats(9, 6, requires_grad=True), torch.rand(9) < 0.5
    before = logits.detach().clone(), mask.clone()
    torch.autograd.grad(ops.route(logits, mask, top_k=2).shared_weight.sum(), logits)
    assert torch.equal(logits, before[0]) and torch.equal(mask, before[1])


def test_route_is_deterministic():
    logits = floats(3000, 16, dtype=torch.bfloat16, requires_grad=True)

    def both():
        out = ops.route(logits, top_k=4)
        loss = out.routed_weights.square().sum() + out.mean_prob.square().sum() + out.mean_z
        return [*out, *torch.autograd.grad(loss, logits)]

    assert_deterministic(both)


@pytest.mark.parametrize("kind", ["random", "first", "hole", "some_dead", "all_dead"])
@pytest.mark.parametrize(("t", "e", "k"), [*SIZES, (4000, 5, 3)])
def test_sort_slots_against_reference(backend, kind, t, e, k):
    indices = expert_indices(t, e, k, kind)
    slot_to_sorted, sorted_to_slot, offsets = ops.sort_slots(indices, e)
    for a, b in zip((slot_to_sorted, sorted_to_slot, offsets), reference.sort_slots(indices, e), strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b)
    slots = torch.arange(t * k)
    assert torch.equal(sorted_to_slot[slot_to_sorted.long()].long(), slots)
    key = indices.flatten().long()
    key = torch.where(key < 0, e, key) * t * k + slots  # by expert, then by slot: strictly ascending when stable
    assert (key[sorted_to_slot.long()].diff() > 0).all()
    assert offsets[0] == 0 and offsets[-1] == (indices >= 0).sum()


def test_sort_slots_of_duplicates_and_nothing(backend):
    """A token may choose an expert twice; no token is no slot."""
    indices = torch.tensor([[1, 1], [0, 1]], dtype=torch.int32)
    assert [t.tolist() for t in ops.sort_slots(indices, 3)] == [[1, 2, 0, 3], [2, 0, 1, 3], [0, 1, 4, 4]]
    empty = ops.sort_slots(torch.empty(0, 2, dtype=torch.int32), 3)
    assert [t.tolist() for t in empty] == [[], [], [0, 0, 0, 0]]


def test_sort_slots_strided_and_deterministic():
    indices = expert_indices(5000, 8, 3, "some_dead")
    for a, b in zip(ops.sort_slots(indices, 8), ops.sort_slots(strided(indices), 8), strict=True):
        assert torch.equal(a, b)
    assert_deterministic(lambda: ops.sort_slots(indices, 8))


ROUTE = {
    "logits": torch.randn(5, 4),
    "top_k": 2,
    "mask": torch.ones(5, dtype=torch.bool),
    "clean_logits": torch.randn(5, 4),
}


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"logits": torch.randn(5)}, ValueError, "logits"),
        ({"logits": torch.randn(5, 4, 1)}, ValueError, "logits"),
        ({"logits": torch.randn(5, 0)}, ValueError, "top_k"),
        ({"logits": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "logits"),
        ({"logits": torch.ones(5, 4, dtype=torch.complex64)}, TypeError, "logits"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_k": 5}, ValueError, "top_k"),
        ({"mask": torch.ones(5)}, TypeError, "mask"),
        ({"mask": torch.ones(5, dtype=torch.int32)}, TypeError, "mask"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, "mask"),
        ({"mask": torch.ones(5, 1, dtype=torch.bool)}, ValueError, "mask"),
        ({"mask": torch.ones(5, dtype=torch.bool, device="meta")}, ValueError, "mask"),
        ({"clean_logits": torch.randn(5, 3)}, ValueError, "clean_logits"),
        ({"clean_logits": torch.randn(4, 4)}, ValueError, "clean_logits"),
        ({"clean_logits": torch.ones(5, 4, dtype=torch.int32)}, TypeError, "clean_logits"),
        ({"gate": "sigmoid"}, ValueError, "gate"),
        ({"gate": ""}, ValueError, "gate"),
        ({"gate": "fixed", "fixed_shared_weight": 1.5}, ValueError, "fixed_shared_weight"),
        ({"gate": "fixed", "fixed_shared_weight": -0.1}, ValueError, "fixed_shared_weight"),
        ({"gate": "fixed", "fixed_shared_weight": float("nan")}, ValueError, "fixed_shared_weight"),
    ],
)
def test_route_refuses(override, error, argument):
    assert_refused("route", ROUTE, override, error, argument)


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"expert_indices": torch.zeros(5, 2)}, TypeError, "expert_indices"),
        ({"expert_indices": torch.zeros(5, 2, dtype=torch.int64)}, TypeError, "expert_indices"),
        ({"expert_indices": torch.tensor([[0, 3]], dtype=torch.int32)}, IndexError, "expert_indices"),
        ({"expert_indices": torch.tensor([[0, -2]], dtype=torch.int32)}, IndexError, "expert_indices"),
        ({"num_experts": -1}, ValueError, "num_experts"),
    ],
)
def test_sort_slots_refuses(override, error, argument):
    good = {"expert_indices": torch.zeros(5, 2, dtype=torch.int32), "num_experts": 3}
    assert_refused("sort_slots", good, override, error, argument)


def test_too_many_slots_are_refused():
    """T*K must be below 2^31; the tensor behind this is one row."""
    indices = torch.zeros(1, 2**11, dtype=torch.int32).expand(2**20, 2**11)
    with pytest.raises(ValueError, match="`expert_indices` must .*got"):
        ops.sort_slots(indices, 3)


def test_opcheck():
    logits, mask = floats(6, 5, requires_grad=True), torch.rand(6) < 0.7
    clean = floats(6, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.ummrm.route.default, (logits, mask, None, 2, "shared_complement", 0.5))
    torch.library.opcheck(torch.ops.ummrm.route.default, (logits, None, clean, 2, "fixed", 0.5))
    torch.library.opcheck(torch.ops.ummrm.sort_slots.default, (expert_indices(6, 5, 2), 5))
    out = ops.route(logits.detach(), mask, top_k=2)
    grads = [torch.randn_like(out[i]) for i in (0, 1, 4, 5)]
    arguments = (*grads, logits.detach(), mask, None, out[2], out[3], "fixed", 0.5)
    torch.library.opcheck(torch.ops.ummrm.route_backward.default, arguments)


def test_compiled(compiled):
    logits, mask = floats(10, 5, requires_grad=True), torch.rand(10) < 0.7

    def function(logits):
        out = ops.route(logits, mask, top_k=2)
        slots = ops.sort_slots(out.expert_indices, 5)
        return out.routed_weights * 2, out.mean_prob, slots[0]

    want, got = function(logits), compiled(function)(logits)
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    pair = [torch.autograd.grad(out[0].sum() + out[1].square().sum(), logits)[0] for out in (want, got)]
    assert torch.equal(*pair)
