"""merged_ffn: experts folded by coefficients into one dense FFN on every forward, and again in backward."""

import pytest
import torch
from op_inputs import assert_deterministic, assert_refused, expert_parameters, floats, gate_dtype, strided
from tolerances import DTYPES, compare

from ummrm import ops
from ummrm.ops import composed_reference

poisoned = pytest.mark.usefixtures("poisoned")
raw = torch.ops.ummrm
CASES = [(1, 1, 1, 1, 1), (6, 5, 3, 1, 2), (9, 7, 5, 4, 1), (33, 17, 11, 7, 3), (64, 32, 48, 3, 1)]  # t, h, i, e, s
NEED = (
    "x",
    "coefficients",
    "shared_up",
    "routed_up",
    "shared_down",
    "routed_down",
    "shared_up_bias",
    "routed_up_bias",
    "shared_down_bias",
    "routed_down_bias",
)


def merged_inputs(t, h, i, e, s, glu=True, biases=True, dtype=torch.float32, requires_grad=True, wide=None):
    """Tensor arguments of merged_ffn; `wide` is the parameters' dtype where it is not x's."""
    wide = wide or dtype
    coefficients = torch.rand(3 if glu else 2, s + e, dtype=torch.float64) + 0.1
    coefficients = (coefficients / coefficients.sum(-1, keepdim=True)).to(gate_dtype(wide))
    return {
        "x": floats(t, h, dtype=dtype, requires_grad=requires_grad),
        "coefficients": coefficients.requires_grad_(requires_grad),
        **expert_parameters(h, i, e, s, glu, biases, wide, requires_grad),
    }


def in_order(arguments, activation="silu", glu=True):
    return (*(arguments.get(name) for name in NEED), activation, glu)


def check(arguments, floor_dtype=None):
    """Against the reference. On the way to a result up to three intermediates are rounded, and then the result."""
    compare(ops.merged_ffn, composed_reference.merged_ffn, arguments, floor_dtype, roundings=4)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "bare"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(backend, dtype, glu, biases, case):
    arguments = merged_inputs(*case, glu, biases, dtype) | {"glu": glu}
    check(arguments, floor_dtype=dtype)


@poisoned
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_wider_than_x(backend, narrow):
    """fp32 parameters under 16-bit autocast: merged in fp32, rounded once to x's dtype; gradients in fp32."""
    arguments = merged_inputs(20, 12, 10, 3, 1, dtype=narrow, wide=torch.float32)
    check(arguments, floor_dtype=narrow)
    out = ops.merged_ffn(**arguments)
    grads = torch.autograd.grad(out.float().sum(), [arguments[n] for n in NEED])
    assert out.dtype == narrow and grads[0].dtype == narrow
    assert all(g.dtype == torch.float32 for g in grads[1:])


@poisoned
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("glu", [True, False])
def test_activations(backend, activation, glu):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = merged_inputs(19, 12, 10, 4, 1, glu, dtype=dtype) | {"glu": glu, "activation": activation}
        check(arguments, floor_dtype=dtype)


@poisoned
@pytest.mark.parametrize("missing", ["up", "down"])
def test_biases_of_one_projection_only(backend, missing):
    arguments = merged_inputs(10, 6, 5, 3, 2)
    arguments = {n: v for n, v in arguments.items() if not n.endswith(f"{missing}_bias")}
    check(arguments)


@poisoned
@pytest.mark.parametrize(("glu", "biases"), [(True, True), (False, True), (True, False)])
def test_gradcheck(backend, glu, biases):
    arguments = merged_inputs(3, 3, 2, 3, 2, glu, biases, torch.float64)
    names = [n for n in NEED if n in arguments]

    def function(*tensors):
        return ops.merged_ffn(**dict(zip(names, tensors, strict=True)), glu=glu)

    assert torch.autograd.gradcheck(function, [arguments[n] for n in names])


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_ffn_of_the_merged_tensors(backend, dtype):
    """Merged by merge_ffn, which has the bits of merge_experts: what is exported is what was trained."""
    a = merged_inputs(15, 8, 6, 3, 2, dtype=dtype, requires_grad=False)
    x, c = a["x"], a["coefficients"]

    def merge(name, rows):
        pairs = a[f"shared_{name}"].chunk(len(rows), 1), a[f"routed_{name}"].chunk(len(rows), 1)
        return torch.cat(ops.merge_experts(*map(list, pairs), c[rows]))

    up, down, up_bias, down_bias = tensors = ops.merge_ffn(**without_x(a))
    parts = ("up", [0, 1]), ("down", [2]), ("up_bias", [0, 1]), ("down_bias", [2])
    for tensor, (name, rows) in zip(tensors, parts, strict=True):
        assert torch.equal(tensor, merge(name, rows))
    f = torch.nn.functional.linear
    want = f(ops.activation(f(x, up, up_bias)), down, down_bias)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ops.merged_ffn(**a), want, rtol=tolerance, atol=tolerance)


def without_x(arguments):
    return {n: v for n, v in arguments.items() if n != "x"}


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu", [True, False], ids=["gated", "plain"])
def test_merge_ffn_against_reference(backend, dtype, glu):
    """Values and gradients; and the same bits recorded or not, since they are saved without recording."""
    for case, missing in zip(CASES, (None, "up_bias", "down_bias", "bias", None), strict=True):
        arguments = without_x(merged_inputs(*case, glu, dtype=dtype)) | {"glu": glu}
        arguments = {n: v for n, v in arguments.items() if missing is None or not n.endswith(missing)}
        compare(ops.merge_ffn, composed_reference.merge_ffn, arguments, floor_dtype=dtype)
        with torch.no_grad():
            plain = ops.merge_ffn(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(plain, ops.merge_ffn(**arguments), strict=True))


@poisoned
def test_no_tokens(backend):
    arguments = merged_inputs(0, 5, 4, 3, 2)
    out = ops.merged_ffn(**arguments)
    assert out.shape == (0, 5)
    for name, grad in zip(NEED, torch.autograd.grad(out.sum(), [arguments[n] for n in NEED]), strict=True):
        assert grad.shape == arguments[name].shape and grad.eq(0).all()


@poisoned
def test_nan_propagates(backend):
    arguments = merged_inputs(6, 5, 4, 3, 1)
    with torch.no_grad():
        arguments["x"][2, 1] = float("nan")
    out = ops.merged_ffn(**arguments)
    assert out.isnan().any(-1).nonzero().flatten().tolist() == [2]
    with torch.no_grad():
        arguments["routed_down"][1, 3, 0] = float("nan")
    assert ops.merged_ffn(**arguments).isnan()[:, 3].all()


@poisoned
def test_strided_x(backend):
    arguments = merged_inputs(15, 8, 6, 4, 2)
    arguments["x"] = strided(arguments["x"]).detach().requires_grad_()
    check(arguments)
    arguments["x"] = arguments["x"].detach().T.contiguous().T.requires_grad_()
    check(arguments)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    arguments = merged_inputs(100, 48, 40, 5, 1, dtype=dtype)

    def both():
        out = ops.merged_ffn(**arguments)
        return [out, *torch.autograd.grad(out.float().square().sum(), [arguments[n] for n in NEED])]

    assert_deterministic(both)


def test_saves_x_and_the_pre_activation_only():
    """The merged weights are not kept for backward: they are merged again."""
    t, h, i = 21, 16, 12
    arguments = merged_inputs(t, h, i, 5, 2)
    known, sizes = {arguments[n].untyped_storage().data_ptr() for n in NEED[2:]}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.merged_ffn(**arguments)
    assert sum(sizes) == 4 * (t * h + t * 2 * i) + 4 * 3 * 7  # x, pre-activation, and the coefficients themselves


def test_frozen_experts_cost_dots_only():
    arguments = merged_inputs(9, 5, 4, 3, 1, requires_grad=False)
    arguments["coefficients"].requires_grad_()
    out = ops.merged_ffn(**arguments).sum()
    with torch.profiler.profile() as profile:
        out.backward()
    names = [event.name for event in profile.events() if event.name.startswith("ummrm::")]
    assert names.count("ummrm::merge_experts_dots") == 1
    arguments["coefficients"].requires_grad_(False)
    arguments["x"].requires_grad_()
    out = ops.merged_ffn(**arguments).sum()
    with torch.profiler.profile() as profile:
        out.backward()
    assert "ummrm::merge_experts_dots" not in [event.name for event in profile.events()]


def test_without_recording_nothing_is_saved():
    arguments = merged_inputs(9, 5, 4, 3, 1)
    with torch.no_grad(), torch.profiler.profile() as profile:
        out = ops.merged_ffn(**arguments)
    assert out.grad_fn is None
    assert "ummrm::merged_ffn_forward" not in [event.name for event in profile.events()]


GOOD = merged_inputs(5, 4, 3, 3, 2, requires_grad=False)


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"x": torch.randn(5)}, ValueError, "x"),
        ({"x": torch.randn(5, 3)}, ValueError, "routed_up"),
        ({"x": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "x"),
        ({"x": torch.randn(5, 4, device="meta")}, ValueError, "x"),
        ({"coefficients": torch.rand(2, 5)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(3, 4)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(5)}, ValueError, "coefficients"),
        ({"coefficients": torch.rand(3, 5).bfloat16()}, TypeError, "coefficients"),
        ({"shared_up": torch.randn(2, 6, 5)}, ValueError, "shared_up"),
        ({"shared_up": torch.randn(2, 6, 4).bfloat16()}, TypeError, "shared_up"),
        ({"routed_up": torch.randn(3, 5, 4)}, ValueError, "routed_up"),
        ({"shared_down": torch.randn(2, 4, 4)}, ValueError, "shared_down"),
        ({"routed_down": torch.randn(2, 4, 3)}, ValueError, "routed_down"),
        ({"routed_down": torch.randn(3, 4, 3).double()}, TypeError, "routed_down"),
        ({"shared_up_bias": torch.randn(2, 3)}, ValueError, "shared_up_bias"),
        ({"routed_down_bias": torch.randn(3, 3)}, ValueError, "routed_down_bias"),
        ({"shared_up_bias": None}, ValueError, "shared_up_bias"),
        ({"activation": "swish"}, ValueError, "activation"),
    ],
)
def test_refuses(override, error, argument):
    assert_refused("merged_ffn", GOOD, override, error, argument)
    if argument not in ("x", "activation") and "x" not in override:
        assert_refused("merge_ffn", without_x(GOOD), override, error, argument)


@poisoned
@pytest.mark.parametrize("biases", [True, False])
def test_opcheck(biases):
    arguments = merged_inputs(6, 4, 3, 3, 2, biases=biases)
    torch.library.opcheck(raw.merged_ffn.default, in_order(arguments))
    torch.library.opcheck(raw.merge_ffn.default, (*in_order(arguments)[1:10], True))
    detached = in_order({n: v.detach() for n, v in arguments.items()})
    torch.library.opcheck(raw.merged_ffn_forward.default, detached)
    out, pre_activation = raw.merged_ffn_forward(*detached)
    present = [arguments.get(n) is not None for n in NEED]
    for need in (present, [False, True] + [False] * 8, [False] * 10):
        backward = (torch.randn_like(out), *detached[:10], pre_activation, "silu", True, need)
        torch.library.opcheck(raw.merged_ffn_backward.default, backward)
        assert [g.numel() > 0 for g in raw.merged_ffn_backward(*backward)] == need


@poisoned
def test_compiled(compiled):
    arguments = merged_inputs(6, 4, 3, 3, 2)
    want, got = ops.merged_ffn(**arguments), compiled(ops.merged_ffn)(**arguments)
    assert torch.equal(want, got)
    leaves = [arguments[n] for n in NEED]
    for a, b in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (want, got)), strict=True):
        assert torch.equal(a, b)
