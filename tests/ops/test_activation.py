"""activation and its backward: gated and plain, every kind, with and without row weights."""

import pytest
import torch
from op_inputs import assert_deterministic, assert_refused, floats, gate_dtype, strided
from tolerances import DTYPES, assert_close_to_truth, compare, to_double

from ummrm import ops
from ummrm.ops import reference

poisoned = pytest.mark.usefixtures("poisoned")
KINDS = tuple(reference.ACTIVATIONS)
SIZES = [(1, 1), (3, 5), (17, 31), (65, 96), (2, 1030)]
raw = torch.ops.ummrm


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("glu", [True, False])
def test_against_reference(backend, dtype, kind, glu):
    for rows, i in SIZES:
        z = floats(rows, 2 * i if glu else i, dtype=dtype, requires_grad=True, scale=3)
        compare(ops.activation, reference.activation, {"pre_activation": z, "kind": kind, "glu": glu})


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("glu", [True, False])
def test_backward_with_row_weights(backend, dtype, kind, glu):
    """The three outputs: gradient, weighted activation, and the dots that are the gate gradients."""
    for rows, i in SIZES:
        z = floats(rows, 2 * i if glu else i, dtype=dtype)
        arguments = floats(rows, i, dtype=dtype), z, floats(rows, dtype=gate_dtype(dtype)), kind, glu
        actual, plain = raw.activation_backward(*arguments), reference.activation_backward(*arguments)
        for j, triple in enumerate(
            zip(actual, plain, reference.activation_backward(*to_double(arguments)), strict=True)
        ):
            assert_close_to_truth(*triple, f"output {j}")
        bare = raw.activation_backward(*arguments[:2], None, kind, glu)
        assert bare[1].shape == bare[2].shape == (0,)


@poisoned
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("glu", [True, False])
def test_gradcheck(backend, kind, glu):
    z = floats(3, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        z[z.abs() < 0.05] = 0.5  # relu has a corner at 0
    assert torch.autograd.gradcheck(lambda z: ops.activation(z, kind, glu), z)


@poisoned
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("glu", [True, False])
def test_reference_backward_is_the_derivative(kind, glu):
    """The hand-written reference.activation_backward against autograd of reference.activation."""
    z = floats(7, 8, dtype=torch.float64, requires_grad=True)
    out, weights = reference.activation(z, kind, glu), torch.rand(7, dtype=torch.float64)
    grad = torch.randn_like(out)
    got = reference.activation_backward(grad, z.detach(), weights, kind, glu)
    torch.testing.assert_close(got[0], torch.autograd.grad(out, z, weights[:, None] * grad)[0])
    torch.testing.assert_close(got[1], weights[:, None] * out.detach())
    torch.testing.assert_close(got[2], (grad * out.detach()).sum(-1))


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extremes_and_nan(backend, dtype, kind):
    """Far out nothing overflows on the way: act(-x) is 0 and act(x) is x (x^2); a NaN stays in its element."""
    big = 200.0  # exp(200) overflows fp32, 200^2 is still an fp16
    z = torch.tensor([[big, -big, 0.0, float("nan")]], dtype=dtype, requires_grad=True)
    out = ops.activation(z, kind, glu=False)
    want = big * big if kind == "relu2" else big
    assert out[0, 0].item() == torch.tensor(want, dtype=dtype).item() and out[0, 3].isnan()
    assert out[0, 1:3].abs().max().item() < 1e-80  # fp64 knows exp(-200)
    (grad,) = torch.autograd.grad(out.sum(), z)
    slope = 2 * big if kind == "relu2" else 1
    assert grad[0, 0] == slope and grad[0, 1].abs().item() < 1e-80


@poisoned
@pytest.mark.parametrize("glu", [True, False])
def test_empty_and_strided(backend, glu):
    z = torch.empty(0, 6, requires_grad=True)
    out = ops.activation(z, "silu", glu)
    assert out.shape == (0, 3 if glu else 6) and torch.autograd.grad(out.sum(), z)[0].shape == (0, 6)
    z = floats(9, 10, requires_grad=True)
    for view in (strided(z), z.detach().T.contiguous().T.requires_grad_()):
        a, b = ops.activation(z, "gelu", glu), ops.activation(view, "gelu", glu)
        grad = torch.randn(a.shape[1], a.shape[0]).T
        pair = torch.autograd.grad(a, z, grad)[0], torch.autograd.grad(b, view, grad)[0]
        for left, right in ((a, b), pair):  # torch's own vector and scalar loops differ in the last bit
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@poisoned
def test_deterministic():
    z = floats(400, 514, dtype=torch.bfloat16, requires_grad=True)
    weights, grad = torch.rand(400), floats(400, 257, dtype=torch.bfloat16)
    assert_deterministic(lambda: [ops.activation(z), *raw.activation_backward(grad, z.detach(), weights, "silu", True)])


def test_input_is_not_changed():
    z = floats(5, 6, requires_grad=True)
    before = z.detach().clone()
    ops.activation(z).sum().backward()
    assert torch.equal(z, before)


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"pre_activation": torch.randn(4)}, ValueError, "pre_activation"),
        ({"pre_activation": torch.randn(2, 3, 4)}, ValueError, "pre_activation"),
        ({"pre_activation": torch.randn(4, 5)}, ValueError, "pre_activation"),
        ({"pre_activation": torch.ones(4, 6, dtype=torch.int32)}, TypeError, "pre_activation"),
        ({"kind": "swish"}, ValueError, "kind"),
        ({"kind": "SILU"}, ValueError, "kind"),
        ({"kind": ""}, ValueError, "kind"),
    ],
)
def test_refuses(override, error, argument):
    assert_refused(
        "activation", {"pre_activation": torch.randn(4, 6), "kind": "silu", "glu": True}, override, error, argument
    )


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"grad": torch.randn(4, 6)}, ValueError, "grad"),
        ({"grad": torch.randn(4, 3).bfloat16()}, TypeError, "grad"),
        ({"row_weights": torch.rand(3)}, ValueError, "row_weights"),
        ({"row_weights": torch.rand(4).bfloat16()}, TypeError, "row_weights"),
        ({"kind": "tanh"}, ValueError, "kind"),
    ],
)
def test_backward_refuses(override, error, argument):
    good = {
        "grad": torch.randn(4, 3),
        "pre_activation": torch.randn(4, 6),
        "row_weights": torch.rand(4),
        "kind": "silu",
        "glu": True,
    }
    raw.activation_backward(**good)
    with pytest.raises(error, match=f"`{argument}` must .*got"):
        raw.activation_backward(**good | override)


@poisoned
def test_opcheck():
    z = floats(4, 6, requires_grad=True)
    for glu in (True, False):
        torch.library.opcheck(raw.activation.default, (z, "gelu", glu))
        grad = floats(4, 3 if glu else 6)
        for weights in (None, torch.rand(4)):
            torch.library.opcheck(raw.activation_backward.default, (grad, z.detach(), weights, "gelu", glu))


@poisoned
def test_compiled(compiled):
    z = floats(4, 6, requires_grad=True)
    want, got = ops.activation(z), compiled(ops.activation)(z)
    assert torch.equal(want, got)
    assert torch.equal(*(torch.autograd.grad(out.sum(), z)[0] for out in (want, got)))


@pytest.mark.full
def test_beyond_two_to_the_31_elements():
    """2.2e9 pre-activations, 4.4 GB of bf16: offsets need 64 bits."""
    rows, i = 2**21 + 5, 512
    z = torch.zeros(rows, 2 * i, dtype=torch.bfloat16)  # pages that nothing writes are not even allocated
    head, tail = floats(5, 2 * i, dtype=torch.bfloat16), floats(5, 2 * i, dtype=torch.bfloat16)
    z[:5], z[-5:] = head, tail
    out = ops.activation(z, "relu")
    assert z.numel() > 2**31
    assert torch.equal(out[:5], ops.activation(head, "relu")) and torch.equal(out[-5:], ops.activation(tail, "relu"))
