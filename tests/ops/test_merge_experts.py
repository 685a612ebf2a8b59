"""merge_experts and its backward, dots and experts' gradients: any number of tensors and experts, any stride between
experts."""

import pytest
import torch
from op_inputs import assert_deterministic, floats, gate_dtype
from tolerances import DTYPES, assert_close_to_truth, compare, to_double

from ummrm import ops
from ummrm.ops import reference

poisoned = pytest.mark.usefixtures("poisoned")
SIZES = [(1, 1), (1, 2), (2, 7), (3, 8), (1, 40)]  # S, E
SHAPES = [(1,), (5,), (3, 7), (33, 65)]
raw = torch.ops.ummrm


def merge_inputs(s, e, shapes=SHAPES, dtype=torch.float32, grad=True):
    shared = [floats(s, *shape, dtype=dtype, requires_grad=grad) for shape in shapes]
    routed = [floats(e, *shape, dtype=dtype, requires_grad=grad) for shape in shapes]
    coefficients = torch.rand(len(shapes), s + e, dtype=torch.float64).to(gate_dtype(dtype)).requires_grad_(grad)
    return {"shared": shared, "routed": routed, "coefficients": coefficients}


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("s", "e"), SIZES)
def test_against_reference(backend, dtype, s, e):
    compare(ops.merge_experts, reference.merge_experts, merge_inputs(s, e, dtype=dtype), floor_dtype=dtype)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dots(backend, dtype):
    """Blocks that do not divide the tensor, and one that spans many."""
    inputs = merge_inputs(2, 3, [(3,), (4099,), (130, 129)], dtype, grad=False)
    grads = [torch.randn_like(r[0]) for r in inputs["routed"]]
    arguments = grads, inputs["shared"], inputs["routed"]
    actual, plain = raw.merge_experts_dots(*arguments), reference.merge_experts_dots(*arguments)
    assert_close_to_truth(actual, plain, reference.merge_experts_dots(*to_double(arguments)))


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_grads(backend, dtype, needs):
    """Experts' gradients: whole tensors, parts with coefficients of their own, more parts than a launch takes."""
    for (s, e), shape, parts in (
        ((2, 3), (3, 5), 1),
        ((0, 2), (18, 257), 2),
        ((1, 0), (22, 3), 11),
        ((1, 40), (4099,), 1),
    ):
        grad = floats(*shape, dtype=dtype)
        coefficients = torch.rand(parts, s + e, dtype=torch.float64).to(gate_dtype(dtype))
        arguments = grad, coefficients, s, *needs
        actual, plain = raw.merge_experts_grads(*arguments), reference.merge_experts_grads(*arguments)
        assert [t.shape[0] for t in actual] == [count if need else 0 for count, need in zip((s, e), needs, strict=True)]
        for results in zip(actual, plain, reference.merge_experts_grads(*to_double(arguments)), strict=True):
            assert_close_to_truth(*results)


@poisoned
def test_grads_of_strided_inputs_and_of_nothing(backend):
    grad, coefficients = torch.randn(6, 8), torch.rand(2, 5)
    want = raw.merge_experts_grads(grad, coefficients, 2, True, True)
    got = raw.merge_experts_grads(grad.mT.contiguous().mT, coefficients.repeat(1, 2)[:, :5], 2, True, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    empty = raw.merge_experts_grads(torch.empty(0, 4), coefficients, 1, True, True)
    assert [tuple(t.shape) for t in empty] == [(1, 0, 4), (4, 0, 4)]


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"grad": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "grad"),
        ({"grad": torch.tensor(1.0)}, ValueError, "coefficients"),
        ({"grad": torch.randn(5, 3)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(0, 5)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(5)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(2, 5).double()}, TypeError, "coefficients"),
        ({"coefficients": torch.rand(2, 5, device="meta")}, ValueError, "coefficients"),
        ({"num_shared": 6}, ValueError, "num_shared"),
        ({"num_shared": -1}, ValueError, "num_shared"),
    ],
)
def test_grads_refuse(override, error, argument):
    good = {"grad": torch.randn(4, 3), "coefficients": torch.rand(2, 5), "num_shared": 1}
    raw.merge_experts_grads(**good, need_shared=True, need_routed=True)
    with pytest.raises(error, match=f"`{argument}` must .*got"):
        raw.merge_experts_grads(**good | override, need_shared=True, need_routed=True)


@poisoned
def test_gradcheck(backend):
    inputs = merge_inputs(2, 3, [(3,), (2, 2)], torch.float64)

    def function(coefficients, *tensors):
        return tuple(ops.merge_experts(list(tensors[:2]), list(tensors[2:]), coefficients))

    assert torch.autograd.gradcheck(function, (inputs["coefficients"], *inputs["shared"], *inputs["routed"]))


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_experts_merge_to_themselves(backend, dtype):
    """Coefficients that are exact and sum to one leave equal experts unchanged, bit for bit."""
    weight = floats(1, 7, 9, dtype=dtype)
    out = ops.merge_experts(
        [weight], [weight.repeat(2, 1, 1)], torch.tensor([[0.5, 0.25, 0.25]], dtype=gate_dtype(dtype))
    )
    assert torch.equal(out[0], weight[0])


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulates_in_expert_order(backend, dtype):
    """Same bits as a running sum in accumulation precision, expert by expert."""
    inputs = merge_inputs(2, 5, [(6, 11)], dtype, grad=False)
    total = torch.zeros(6, 11, dtype=gate_dtype(dtype))
    for c, w in zip(inputs["coefficients"][0], [*inputs["shared"][0], *inputs["routed"][0]], strict=True):
        total = (
            torch.addcmul(total.double(), c.double(), w.double()).to(total) if dtype != torch.float64 else total + c * w
        )
    (out,) = ops.merge_experts(**inputs)
    torch.testing.assert_close(
        out, total.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(total.dtype).eps
    )


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_fused_projection(backend, dtype):
    """Gate and up rows of one [n, 2I, H] parameter pass as views, forward and backward."""
    inputs = merge_inputs(2, 3, [(8, 5)], dtype)
    coefficients = inputs["coefficients"].expand(2, -1)

    def split(function):
        def merged(shared, routed, coefficients):
            return function(list(shared.chunk(2, 1)), list(routed.chunk(2, 1)), coefficients)

        return merged

    arguments = {"shared": inputs["shared"][0], "routed": inputs["routed"][0], "coefficients": coefficients}
    compare(split(ops.merge_experts), split(reference.merge_experts), arguments, floor_dtype=dtype)


@poisoned
def test_strided_gradient_and_coefficients(backend):
    inputs = merge_inputs(1, 3, [(4, 6)])
    inputs["coefficients"] = inputs["coefficients"].detach().repeat(1, 2)[:, ::2].contiguous().requires_grad_()
    leaves = [inputs["coefficients"], inputs["shared"][0], inputs["routed"][0]]
    grad = torch.randn(6, 4).T
    wide = torch.empty(1, 8)[:, ::2].copy_(inputs["coefficients"].detach()).requires_grad_()
    a = torch.autograd.grad(ops.merge_experts(**inputs), leaves, [grad])
    b = torch.autograd.grad(
        ops.merge_experts(**inputs | {"coefficients": wide}), [wide, *leaves[1:]], [grad.contiguous()]
    )
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@poisoned
def test_strided_experts(backend):
    """Slices that are not contiguous are copied first."""
    inputs = merge_inputs(2, 3, [(5, 6)], grad=False)
    views = {n: [t.mT.contiguous().mT for t in inputs[n]] for n in ("shared", "routed")}
    assert torch.equal(ops.merge_experts(**inputs)[0], ops.merge_experts(**inputs | views)[0])


@poisoned
def test_nan_and_infinity_propagate(backend):
    inputs = merge_inputs(1, 2, [(3, 4)], grad=False)
    inputs["routed"][0][1, 2, 3] = float("nan")
    inputs["shared"][0][0, 0, 0] = float("inf")
    (out,) = ops.merge_experts(**inputs)
    assert out.isnan().nonzero().tolist() == [[2, 3]] and out.isinf().nonzero().tolist() == [[0, 0]]
    dots = raw.merge_experts_dots([torch.ones(3, 4)], inputs["shared"], inputs["routed"])
    assert dots.isfinite().tolist() == [[False, True, False]]


@poisoned
def test_empty_tensors(backend):
    inputs = merge_inputs(1, 2, [(0, 4), (3,)])
    out = ops.merge_experts(**inputs)
    assert out[0].shape == (0, 4)
    (grad,) = torch.autograd.grad(out[0].sum() + out[1].sum(), inputs["coefficients"])
    assert grad[0].eq(0).all() and grad[1].ne(0).any()


@poisoned
def test_only_coefficients_or_only_experts():
    """Frozen experts (the merge phase) cost no weight gradient, and frozen coefficients no dots."""
    inputs = merge_inputs(1, 2, [(3, 4)], grad=False)
    inputs["coefficients"].requires_grad_()
    with torch.profiler.profile() as profile:
        ops.merge_experts(**inputs)[0].sum().backward()
    names = [event.name for event in profile.events()]
    assert "ummrm::merge_experts_dots" in names and "ummrm::merge_experts_grads" not in names
    inputs = merge_inputs(1, 2, [(3, 4)], grad=False)
    inputs["routed"][0].requires_grad_()
    with torch.profiler.profile() as profile:
        ops.merge_experts(**inputs)[0].sum().backward()
    names = [event.name for event in profile.events()]
    assert "ummrm::merge_experts_dots" not in names and names.count("ummrm::merge_experts_grads") == 1
    want = inputs["coefficients"][0, 1:].view(2, 1, 1).expand(2, 3, 4)
    torch.testing.assert_close(inputs["routed"][0].grad, want)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    inputs = merge_inputs(1, 5, [(300, 211), (300,)], dtype)
    leaves = [inputs["coefficients"], *inputs["shared"], *inputs["routed"]]

    def both():
        out = ops.merge_experts(**inputs)
        return [*out, *torch.autograd.grad(sum(o.float().square().sum() for o in out), leaves)]

    assert_deterministic(both)


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"shared": []}, ValueError, "shared"),
        ({"shared": [torch.randn(2, 3, 4)] * 2}, ValueError, "shared"),
        ({"shared": [torch.randn(2, 3, 5)]}, ValueError, "shared"),
        ({"shared": [torch.randn(2, 3, 4).double()]}, TypeError, "shared"),
        ({"routed": []}, ValueError, "routed"),
        ({"routed": [torch.ones(3, 3, 4, dtype=torch.int32)]}, TypeError, None),
        ({"routed": [torch.tensor(1.0)]}, ValueError, "routed"),
        ({"coefficients": torch.rand(1, 6)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(2, 5)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(5)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(1, 5).bfloat16()}, TypeError, "coefficients"),
        ({"coefficients": torch.rand(1, 5).double()}, TypeError, "coefficients"),
        ({"coefficients": torch.rand(1, 5, device="meta")}, ValueError, "coefficients"),
    ],
)
def test_refuses(override, error, argument):
    good = {"shared": [torch.randn(2, 3, 4)], "routed": [torch.randn(3, 3, 4)], "coefficients": torch.rand(1, 5)}
    ops.merge_experts(**good)
    with pytest.raises(error, match="must .*got") as caught:
        ops.merge_experts(**good | override)
    assert argument is None or f"`{argument}" in str(caught.value), caught.value


@poisoned
def test_opcheck():
    inputs = merge_inputs(2, 3, [(3,), (2, 4)])
    torch.library.opcheck(raw.merge_experts.default, tuple(inputs.values()))
    detached = [[t.detach() for t in inputs[n]] for n in ("shared", "routed")]
    torch.library.opcheck(raw.merge_experts_dots.default, ([torch.randn(3), torch.randn(2, 4)], *detached))
    for needs in ((True, True), (True, False)):
        torch.library.opcheck(raw.merge_experts_grads.default, (torch.randn(4, 3), torch.rand(2, 5), 2, *needs))


@poisoned
def test_compiled(compiled):
    inputs = merge_inputs(2, 3, [(3,), (2, 4)])
    leaves = [inputs["coefficients"], *inputs["shared"], *inputs["routed"]]
    want, got = ops.merge_experts(**inputs), compiled(ops.merge_experts)(**inputs)
    grads = [torch.randn_like(w) for w in want]
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(torch.autograd.grad(want, leaves, grads), torch.autograd.grad(got, leaves, grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.full
def test_beyond_two_to_the_31_elements():
    """Experts more than 2^31 elements apart, in memory that is reserved and, but for a few pages, never touched."""
    apart = 2**31 + 8
    storage = torch.empty(2 * apart + 256, dtype=torch.bfloat16)
    routed = storage.as_strided((3, 16, 16), (apart, 16, 1))
    routed.copy_(floats(3, 16, 16))
    shared, coefficients = floats(1, 16, 16, dtype=torch.bfloat16), torch.rand(1, 4)
    want = ops.merge_experts([shared], [routed.contiguous()], coefficients)
    assert torch.equal(ops.merge_experts([shared], [routed], coefficients)[0], want[0])
    grad = floats(16, 16, dtype=torch.bfloat16)
    dots = raw.merge_experts_dots([grad], [shared], [routed])
    assert torch.equal(dots, raw.merge_experts_dots([grad], [shared], [routed.contiguous()]))
    grad, coefficients = torch.randn(2**20 + 3).bfloat16(), torch.rand(1, 2**11 + 1)
    _, of_routed = raw.merge_experts_grads(grad, coefficients, 0, False, True)
    assert of_routed.numel() > 2**31
    for e in (0, 2**11):
        assert torch.equal(of_routed[e], (coefficients[0, e] * grad.float()).bfloat16())
