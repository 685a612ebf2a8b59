"""moe_ffn: the composed expert FFN as one autograd node, with what it saves and what it skips."""

import pytest
import torch
from op_inputs import (
    assert_deterministic,
    assert_refused,
    composed_on_the_cpu,
    expert_parameters,
    floats,
    gate_dtype,
    moe_inputs,
    strided,
)
from tolerances import DTYPES, compare

from ummrm import ops
from ummrm.ops import backends, composed_reference

poisoned = pytest.mark.usefixtures("poisoned")
raw = torch.ops.ummrm
# t, h, i, e, k, s, kind of routing
CASES = [
    (1, 1, 1, 1, 1, 1, "random"),
    (6, 5, 3, 1, 1, 2, "random"),
    (9, 7, 5, 4, 4, 1, "first"),
    (13, 6, 9, 7, 5, 1, "some_dead"),
    (33, 17, 11, 5, 2, 3, "hole"),
    (11, 8, 8, 6, 1, 1, "first"),
    (8, 8, 4, 3, 2, 2, "all_dead"),
    (64, 32, 48, 8, 3, 1, "random"),
]
NEED = (
    "x",
    "shared_weight",
    "routed_weights",
    "shared_up",
    "routed_up",
    "shared_down",
    "routed_down",
    "shared_up_bias",
    "routed_up_bias",
    "shared_down_bias",
    "routed_down_bias",
)


def in_order(arguments, activation="silu", glu=True):
    """Positional arguments of the raw operator."""
    names = [*NEED[:3], "expert_indices", *NEED[3:]]
    return (*(arguments.get(name) for name in names), activation, glu)


def check(arguments, floor_dtype=None):
    """Against the reference. On the way to a result up to three intermediates are rounded, and then the result."""
    compare(ops.moe_ffn, composed_reference.moe_ffn, arguments, floor_dtype, roundings=4)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "bare"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(backend, dtype, glu, biases, case):
    *sizes, kind = case
    arguments = moe_inputs(*sizes, glu, biases, kind, dtype) | {"glu": glu}
    check(arguments, floor_dtype=dtype)


@poisoned
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("glu", [True, False])
def test_activations(backend, activation, glu):
    for dtype in (torch.float32, torch.bfloat16):
        arguments = moe_inputs(19, 12, 10, 4, 2, 1, glu, dtype=dtype) | {"glu": glu, "activation": activation}
        check(arguments, floor_dtype=dtype)


@poisoned
@pytest.mark.parametrize("missing", ["_up_bias", "_down_bias", "shared_up_bias", "routed_down_bias"])
def test_some_biases_only(backend, missing):
    arguments = moe_inputs(10, 6, 5, 3, 2, 1)
    arguments = {n: v for n, v in arguments.items() if not n.endswith(missing)}
    check(arguments)


@poisoned
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("s", [1, 2, 3])
def test_every_k_and_s(backend, k, s):
    check(moe_inputs(14, 6, 5, 5, k, s, kind="some_dead"))


@poisoned
@pytest.mark.parametrize("gate", ["shared_complement", "fixed"])
@pytest.mark.parametrize(("glu", "s"), [(True, 2), (False, 1)])
def test_gradcheck_with_the_router(gate, glu, s):
    """Biases, distinct experts, masked tokens, the router and its statistics, all in one derivative."""
    t, h, i, e, k = 4, 3, 2, 3, 2
    mask = torch.tensor([True, False, True, True])
    names, tensors = zip(*expert_parameters(h, i, e, s, glu, dtype=torch.float64).items(), strict=True)
    x = floats(t, h, dtype=torch.float64, requires_grad=True)
    router = floats(e, h, dtype=torch.float64, requires_grad=True, scale=2)

    def function(x, router, *tensors):
        routing = ops.route(x @ router.T, mask, top_k=k, gate=gate, fixed_shared_weight=0.4)
        out = ops.moe_ffn(x, *routing[:3], **dict(zip(names, tensors, strict=True)), glu=glu)
        return out, routing.mean_prob, routing.mean_z

    assert torch.autograd.gradcheck(function, (x, router, *tensors))


@poisoned
def test_equal_experts_are_the_dense_ffn(backend):
    """At upcycling every expert is the dense FFN: so is the mixture, and the router gets no gradient."""
    dense = expert_parameters(12, 10, 1, 1, requires_grad=False)
    x, logits = floats(20, 12), floats(20, 4, requires_grad=True)
    out_dense = ops.moe_ffn(x, torch.ones(20), torch.zeros(20, 1), torch.full((20, 1), -1, dtype=torch.int32), **dense)
    copies = {n: dense[n.replace("routed", "shared")].repeat(4 if "routed" in n else 1, *[1] * (v.dim() - 1))
              for n, v in dense.items()}  # fmt: skip
    out = ops.moe_ffn(x, *ops.route(logits, top_k=2)[:3], **copies)
    torch.testing.assert_close(out, out_dense, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(out.square().sum(), logits)
    assert grad.abs().max() < 1e-3 * out.square().sum()


@poisoned
def test_nan_stays_with_its_token_and_expert(backend):
    arguments = moe_inputs(12, 5, 4, 4, 1, 1)
    with torch.no_grad():
        arguments["x"][3, 2] = float("nan")
    out = ops.moe_ffn(**arguments)
    rows = out.isnan().any(-1)
    assert rows.nonzero().flatten().tolist() == [3] and out[3].isnan().all()
    grads = dict(zip(NEED, torch.autograd.grad(out.sum(), [arguments[n] for n in NEED]), strict=True))
    hit = int(arguments["expert_indices"][3, 0])
    for name in ("routed_up", "routed_down"):
        bad = grads[name].isnan().flatten(1).any(-1)
        assert bad.nonzero().flatten().tolist() == [hit]
    arguments = moe_inputs(12, 5, 4, 4, 1, 1)
    with torch.no_grad():
        arguments["routed_down"][2] = float("nan")
    bad = ops.moe_ffn(**arguments).isnan().any(-1)
    assert torch.equal(bad, arguments["expert_indices"][:, 0] == 2)


@poisoned
def test_masked_tokens_see_shared_experts_only(backend):
    arguments = moe_inputs(10, 5, 4, 3, 2, 2, kind="some_dead")
    dead = arguments["expert_indices"][:, 0] < 0
    with torch.no_grad():
        for name in ("routed_up", "routed_down", "routed_up_bias", "routed_down_bias"):
            arguments[name].fill_(float("nan"))
    out = ops.moe_ffn(**arguments)
    assert torch.equal(out.isnan().any(-1), ~dead)


@poisoned
def test_no_tokens(backend):
    arguments = moe_inputs(0, 5, 4, 3, 2, 2)
    out = ops.moe_ffn(**arguments)
    assert out.shape == (0, 5)
    for name, grad in zip(NEED, torch.autograd.grad(out.sum(), [arguments[n] for n in NEED]), strict=True):
        assert grad.shape == arguments[name].shape and grad.eq(0).all()


@poisoned
def test_strided_inputs(backend):
    arguments = moe_inputs(15, 8, 6, 4, 2, 2, kind="some_dead")
    views = {n: strided(v) if v.dim() > 1 else strided(v.unsqueeze(0))[0] for n, v in arguments.items()}
    views = {n: v.detach().requires_grad_(v.is_floating_point()) for n, v in views.items()}
    check(views)
    columns = {n: v.detach().mT.contiguous().mT if v.dim() > 1 else v for n, v in arguments.items()}
    columns = {n: v.detach().requires_grad_(v.is_floating_point()) for n, v in columns.items()}
    check(columns)


@poisoned
def test_slots_may_repeat_an_expert(backend):
    arguments = moe_inputs(8, 5, 4, 3, 2, 1)
    arguments["expert_indices"][::2, 1] = arguments["expert_indices"][::2, 0]
    check(arguments)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    arguments = moe_inputs(200, 48, 40, 5, 3, 2, kind="some_dead", dtype=dtype)

    def both():
        out = ops.moe_ffn(**arguments)
        return [out, *torch.autograd.grad(out.float().square().sum(), [arguments[n] for n in NEED])]

    assert_deterministic(both)


def saved_bytes(function, parameters):
    """Bytes that autograd keeps for the backward of `function()`, parameters not counted."""
    known, sizes = {p.untyped_storage().data_ptr() for p in parameters}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu", [True, False])
def test_saved_bytes_are_the_docstring_formula(dtype, glu):
    t, h, i, e, k, s = 21, 16, 12, 5, 3, 2
    arguments = moe_inputs(t, h, i, e, k, s, glu, dtype=dtype)
    saved = saved_bytes(lambda: ops.moe_ffn(**arguments, glu=glu), [arguments[n] for n in NEED[3:]])
    b, g, w = dtype.itemsize, gate_dtype(dtype).itemsize, 2 * i if glu else i
    assert saved == b * (t * h + (s * t + t * k) * w) + g * (t + t * k) + 4 * (3 * t * k + e + 1)
    assert "b * (T*H + (S*T + T*K) * W) + g * (T + T*K) + 4 * (3*T*K + E + 1) bytes" in ops.moe_ffn.__doc__


def test_without_recording_nothing_is_saved():
    """Neither under no_grad, nor where no input requires a gradient."""
    arguments = moe_inputs(9, 5, 4, 3, 2, 1)
    frozen = {n: v.detach() for n, v in arguments.items()}
    for inputs, recording in ((arguments, False), (frozen, True)):
        with torch.set_grad_enabled(recording), torch.profiler.profile() as profile:
            out = ops.moe_ffn(**inputs)
        assert out.grad_fn is None
        assert "ummrm::moe_ffn_forward" not in called(profile)  # the variant that returns what backward needs


def called(profile):
    names = {}
    for event in profile.events():
        if event.name.startswith("ummrm::"):
            names[event.name] = names.get(event.name, 0) + 1
    return names


def backward_calls(trained):
    arguments = moe_inputs(9, 5, 4, 3, 2, 1, requires_grad=False)
    for name in trained:
        arguments[name].requires_grad_()
    with composed_on_the_cpu():
        out = ops.moe_ffn(**arguments).sum()
        with torch.profiler.profile() as profile:
            out.backward()
    assert {n for n in NEED if arguments[n].grad is not None} == set(trained)
    return called(profile)


@pytest.mark.skipif(
    backends.backend_for("cpu") == "triton",
    reason="Triton's composition launches kernels and calls no operators: triton_interpreted.py counts those",
)
def test_frozen_experts_skip_their_weight_gradients():
    """Every subset that training really uses, by counting the operators that its backward calls."""
    everything = backward_calls(NEED)
    assert everything["ummrm::expert_gemm_wgrad"] == 2 and everything["ummrm::expert_bias_grad"] == 2
    router_only = backward_calls(["x", "shared_weight", "routed_weights"])
    assert "ummrm::expert_gemm_wgrad" not in router_only and "ummrm::expert_bias_grad" not in router_only
    assert router_only["ummrm::expert_gemm"] == 2  # through down, through up
    gates_only = backward_calls(["shared_weight", "routed_weights"])
    assert gates_only["ummrm::expert_gemm"] == 1 and "ummrm::expert_gemm_wgrad" not in gates_only
    down_only = backward_calls(["shared_down", "routed_down"])
    assert down_only["ummrm::expert_gemm_wgrad"] == 1
    biases = backward_calls(["routed_down_bias"])
    assert "ummrm::expert_gemm_wgrad" not in biases and biases["ummrm::expert_bias_grad"] == 1


@pytest.mark.parametrize("frozen", ["shared", "routed"])
def test_one_frozen_kind_of_expert(frozen):
    """Gradients of the other kind are unchanged by it, bit for bit."""
    arguments = moe_inputs(12, 5, 4, 3, 2, 2)
    want = torch.autograd.grad(ops.moe_ffn(**arguments).sum(), [arguments[n] for n in NEED])
    want = dict(zip(NEED, want, strict=True))
    partly = {n: v.detach() if n.startswith(f"{frozen}_") else v for n, v in arguments.items()}
    names = [n for n in NEED if partly[n].requires_grad]
    for name, grad in zip(
        names, torch.autograd.grad(ops.moe_ffn(**partly).sum(), [partly[n] for n in names]), strict=True
    ):
        assert torch.equal(grad, want[name]), name


@poisoned
def test_inputs_are_not_changed():
    arguments = moe_inputs(12, 5, 4, 3, 2, 2, kind="some_dead")
    before = {n: v.detach().clone() for n, v in arguments.items()}
    ops.moe_ffn(**arguments).sum().backward()
    for name, value in before.items():
        assert torch.equal(arguments[name], value), name


def test_under_checkpointing():
    arguments = moe_inputs(12, 5, 4, 3, 2, 1)
    leaves = [arguments[n] for n in NEED]
    want = torch.autograd.grad(ops.moe_ffn(**arguments).square().sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(lambda: ops.moe_ffn(**arguments), use_reentrant=False)
    for a, b in zip(want, torch.autograd.grad(out.square().sum(), leaves), strict=True):
        assert torch.equal(a, b)


GOOD = moe_inputs(5, 4, 3, 3, 2, 2, requires_grad=False)


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"x": torch.randn(5)}, ValueError, "x"),
        ({"x": torch.randn(5, 4, 1)}, ValueError, "x"),
        ({"x": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "x"),
        ({"x": torch.randn(5, 4, device="meta")}, ValueError, "x"),
        ({"shared_weight": torch.rand(4)}, ValueError, "shared_weight"),
        ({"shared_weight": torch.rand(5, 1)}, ValueError, "shared_weight"),
        ({"shared_weight": torch.rand(5).bfloat16()}, TypeError, "shared_weight"),
        ({"routed_weights": torch.rand(5, 3)}, ValueError, "routed_weights"),
        ({"routed_weights": torch.rand(5, 2).double()}, TypeError, "routed_weights"),
        ({"expert_indices": GOOD["expert_indices"].long()}, TypeError, "expert_indices"),
        ({"expert_indices": GOOD["expert_indices"][:4]}, ValueError, "expert_indices"),
        ({"expert_indices": GOOD["expert_indices"].flatten()}, ValueError, "expert_indices"),
        ({"expert_indices": torch.full((5, 2), 3, dtype=torch.int32)}, IndexError, "expert_indices"),
        ({"expert_indices": torch.full((5, 2), -2, dtype=torch.int32)}, IndexError, "expert_indices"),
        ({"shared_up": torch.randn(2, 6, 5)}, ValueError, "shared_up"),
        ({"shared_up": torch.randn(6, 4)}, ValueError, "shared_up"),
        ({"shared_up": torch.randn(2, 6, 4).bfloat16()}, TypeError, "shared_up"),
        ({"routed_up": torch.randn(3, 5, 4)}, ValueError, "shared_up"),
        ({"routed_up": torch.randn(3, 6, 4).double()}, TypeError, "routed_up"),
        ({"shared_down": torch.randn(2, 4, 4)}, ValueError, "shared_down"),
        ({"shared_down": torch.randn(3, 4, 3)}, ValueError, "shared_down"),
        ({"routed_down": torch.randn(3, 5, 3)}, ValueError, "routed_down"),
        ({"routed_down": torch.randn(2, 4, 3)}, ValueError, "routed_down"),
        ({"shared_up_bias": torch.randn(2, 3)}, ValueError, "shared_up_bias"),
        ({"routed_up_bias": torch.randn(2, 6)}, ValueError, "routed_up_bias"),
        ({"shared_down_bias": torch.randn(2, 3)}, ValueError, "shared_down_bias"),
        ({"routed_down_bias": torch.randn(3, 4).half()}, TypeError, "routed_down_bias"),
        ({"activation": "swish"}, ValueError, "activation"),
    ],
)
def test_refuses(override, error, argument):
    assert_refused("moe_ffn", GOOD, override, error, argument)


@poisoned
@pytest.mark.parametrize("biases", [True, False])
def test_opcheck(biases):
    arguments = moe_inputs(6, 4, 3, 3, 2, 2, biases=biases, kind="some_dead")
    torch.library.opcheck(raw.moe_ffn.default, in_order(arguments))
    detached = in_order({n: v.detach() for n, v in arguments.items()})
    torch.library.opcheck(raw.moe_ffn_forward.default, detached)
    out, *saved = raw.moe_ffn_forward(*detached)
    grad = torch.randn_like(out)
    present = [arguments.get(n) is not None for n in NEED]
    for need in (present, [n and i < 3 for i, n in enumerate(present)]):
        backward = (grad, *detached[:12], *saved, "silu", True, need)
        torch.library.opcheck(raw.moe_ffn_backward.default, backward)
        grads = raw.moe_ffn_backward(*backward)
        assert [g.numel() > 0 for g in grads] == need


@poisoned
def test_compiled(compiled):
    arguments = moe_inputs(6, 4, 3, 3, 2, 2, kind="some_dead")
    want, got = ops.moe_ffn(**arguments), compiled(ops.moe_ffn)(**arguments)
    assert torch.equal(want, got)
    leaves = [arguments[n] for n in NEED]
    for a, b in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (want, got)), strict=True):
        assert torch.equal(a, b)


def test_compiled_once_for_all_token_counts(compiled):
    """With dynamic shapes a second token count does not recompile; row counts depend on no data."""
    sizes = 5, 4, 3, 2, 2  # no two alike that could be taken for one another, nor for a token count
    arguments = moe_inputs(11, *sizes, requires_grad=False)
    function = compiled(ops.moe_ffn, dynamic=True)
    function(**arguments)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (9, 17):
            other = moe_inputs(t, *sizes, requires_grad=False)
            assert torch.equal(function(**other), ops.moe_ffn(**other))
