"""expert_gemm, its weight gradient and the bias sums: ragged groups, shared experts included."""

import pytest
import torch
from op_inputs import assert_deterministic, assert_refused, expert_indices, floats, gate_dtype, strided
from tolerances import DTYPES, assert_close_to_truth, compare, to_double

from ummrm import ops
from ummrm.ops import reference

poisoned = pytest.mark.usefixtures("poisoned")
KINDS = ("random", "first", "hole", "some_dead", "all_dead")
SIZES = [(1, 1, 1, 1, 1, 1), (3, 5, 7, 1, 1, 2), (9, 4, 3, 4, 4, 1), (17, 13, 6, 7, 3, 3), (33, 32, 24, 5, 2, 0)]
raw = torch.ops.ummrm


def gemm_inputs(t, d, n, e, k, s, kind="random", dtype=torch.float32, transpose=False, copies=False, grad=True):
    """Arguments of expert_gemm; `copies`: a block of shared rows for each shared expert."""
    offsets = ops.sort_slots(expert_indices(t, e, k, kind), e)[2]
    width, make = (n if transpose else d), {"dtype": dtype, "requires_grad": grad}
    arguments = {
        "shared_rows": floats((s if copies or s == 0 else 1) * t, width, **make),
        "routed_rows": floats(t * k, width, **make),
        "shared_proj": floats(s, n, d, **make),
        "routed_proj": floats(e, n, d, **make),
        "expert_offsets": offsets,
        "num_tokens": t,
        "transpose": transpose,
    }
    if not transpose:
        arguments |= {"shared_bias": floats(s, n, **make), "routed_bias": floats(e, n, **make)}
    return arguments


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_against_reference(backend, dtype, transpose, copies):
    for kind, size in zip(KINDS, SIZES, strict=True):
        arguments = gemm_inputs(*size, kind, dtype, transpose, copies)
        compare(ops.expert_gemm, reference.expert_gemm, arguments)
        if not transpose:
            no_bias = arguments | {"shared_bias": None, "routed_bias": None}
            compare(ops.expert_gemm, reference.expert_gemm, no_bias)


@poisoned
@pytest.mark.parametrize("transpose", [False, True])
def test_gradcheck(backend, transpose):
    arguments = gemm_inputs(3, 2, 3, 3, 2, 2, "some_dead", torch.float64, transpose)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.requires_grad]

    def function(*tensors):
        return ops.expert_gemm(**arguments | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [arguments[name] for name in names])


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_weight_and_bias_gradients(backend, dtype, needs):
    """The two backward operators themselves, with and without row weights; an expert without rows gets zeros."""
    for kind, (t, d, n, e, k, s) in zip(KINDS, SIZES, strict=True):
        offsets = ops.sort_slots(expert_indices(t, e, k, kind), e)[2]
        for copies in (False, True):
            blocks = s if copies or s == 0 else 1
            grads = floats(s * t, n, dtype=dtype), floats(t * k, n, dtype=dtype)
            rows = floats(blocks * t, d, dtype=dtype), floats(t * k, d, dtype=dtype)
            check_op("expert_gemm_wgrad", (*grads, *rows, offsets, t, s, *needs), dtype, offsets, needs)
            wide = (*grads, *rows, offsets, t, s, *needs, gate_dtype(dtype))
            check_op("expert_gemm_wgrad", wide, gate_dtype(dtype), offsets, needs)
            for weights in (None, floats(s * t + t * k, dtype=gate_dtype(dtype))):
                check_op("expert_bias_grad", (*rows, weights, offsets, t, s, *needs), dtype, offsets, needs)


def check_op(name, arguments, dtype, offsets, needs):
    actual, plain = getattr(raw, name)(*arguments), getattr(reference, name)(*arguments)
    truth = getattr(reference, name)(*to_double(arguments))
    for i, need in enumerate(needs):
        if not need:
            assert actual[i].shape == (0,)
        elif truth[i].numel():
            assert_close_to_truth(actual[i], plain[i], truth[i], f"{name} {i}", dtype)
    if needs[1]:
        assert actual[1][offsets.diff() == 0].eq(0).all()


@poisoned
def test_rows_past_the_live_ones_are_ignored(backend):
    """NaN in dead rows reaches neither outputs nor weight gradients; dead outputs and gradients are zero."""
    arguments = gemm_inputs(20, 6, 5, 4, 2, 1, "some_dead")
    live = int(arguments["expert_offsets"][-1])
    with torch.no_grad():
        arguments["routed_rows"][live:] = float("nan")
    out = ops.expert_gemm(**arguments)
    assert out.isfinite().all() and out[20 + live :].eq(0).all()
    grad_out = torch.randn_like(out)
    grad_out[20 + live :] = float("nan")
    leaves = [arguments[n] for n in ("routed_rows", "routed_proj", "routed_bias", "shared_rows", "shared_proj")]
    grads = torch.autograd.grad(out, leaves, grad_out)
    assert all(g.isfinite().all() for g in grads) and grads[0][live:].eq(0).all()


@poisoned
def test_nan_stays_with_its_row_and_expert(backend):
    arguments = gemm_inputs(12, 6, 5, 3, 1, 1, "random", grad=False)
    offsets = arguments["expert_offsets"].tolist()
    arguments["routed_rows"][0, 2] = float("nan")
    arguments["routed_proj"][2, 1, 1] = float("nan")
    out = ops.expert_gemm(**arguments)[12:]
    want = torch.zeros_like(out, dtype=torch.bool)
    want[0] = offsets[0] == 0
    want[offsets[2] : offsets[3], 1] = True
    assert torch.equal(out.isnan(), want)


@poisoned
@pytest.mark.parametrize("transpose", [False, True])
def test_strided_inputs(backend, transpose):
    arguments = gemm_inputs(9, 6, 8, 3, 2, 2, "some_dead", torch.float32, transpose)
    views = {n: strided(v) if isinstance(v, torch.Tensor) and v.dim() > 1 else v for n, v in arguments.items()}
    compare(ops.expert_gemm, reference.expert_gemm, views)
    transposed = {
        n: v.transpose(-1, -2).contiguous().transpose(-1, -2) if "_proj" in n else v for n, v in views.items()
    }
    compare(
        ops.expert_gemm,
        reference.expert_gemm,
        {n: v.detach().requires_grad_() if "_proj" in n else v for n, v in transposed.items()},
    )


@poisoned
def test_no_tokens(backend):
    arguments = gemm_inputs(0, 4, 3, 3, 2, 2)
    out = ops.expert_gemm(**arguments)
    assert out.shape == (0, 3)
    grads = torch.autograd.grad(out.sum(), [arguments[n] for n in ("shared_rows", "shared_proj", "routed_bias")])
    assert grads[0].shape == (0, 4) and grads[1].eq(0).all() and grads[2].eq(0).all()


@poisoned
def test_frozen_inputs_need_no_work():
    """Only the operators that a needed gradient asks for run in backward."""
    for trained, expected in (
        ("routed_rows", {"expert_gemm"}),
        ("routed_proj", {"expert_gemm_wgrad"}),
        ("shared_bias", {"expert_bias_grad"}),
    ):
        arguments = gemm_inputs(9, 6, 5, 3, 2, 1, grad=False)
        arguments[trained].requires_grad_()
        out = ops.expert_gemm(**arguments).sum()
        with torch.profiler.profile() as profile:
            out.backward()
        called = {event.name for event in profile.events() if event.name.startswith("ummrm::")}
        assert called == {f"ummrm::{name}" for name in expected}


@poisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic(dtype):
    arguments = gemm_inputs(150, 96, 80, 4, 2, 2, "random", dtype)
    leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]

    def both():
        out = ops.expert_gemm(**arguments)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    assert_deterministic(both)


GOOD = gemm_inputs(5, 4, 3, 3, 2, 2, grad=False)
TRANSPOSED = gemm_inputs(5, 4, 3, 3, 2, 2, transpose=True, grad=False)


@pytest.mark.parametrize(
    ("override", "error", "argument"),
    [
        ({"shared_rows": torch.randn(6, 4)}, ValueError, "shared_rows"),
        ({"shared_rows": torch.randn(5, 3)}, ValueError, "shared_rows"),
        ({"shared_rows": torch.randn(5, 4).double()}, TypeError, "shared_rows"),
        ({"routed_rows": torch.randn(10, 3)}, ValueError, "routed_rows"),
        ({"routed_rows": torch.randn(10)}, ValueError, "routed_rows"),
        ({"routed_rows": torch.ones(10, 4, dtype=torch.int32)}, TypeError, "routed_rows"),
        ({"shared_proj": torch.randn(2, 3)}, ValueError, "shared_proj"),
        ({"shared_proj": torch.randn(2, 2, 4)}, ValueError, "routed_proj"),
        ({"shared_proj": torch.randn(2, 3, 4).bfloat16()}, TypeError, "shared_proj"),
        ({"routed_proj": torch.randn(3, 3, 5)}, ValueError, "routed_proj"),
        ({"routed_proj": torch.randn(4, 3, 4)}, ValueError, "routed_proj"),
        ({"routed_proj": torch.randn(3, 3, 4).half()}, TypeError, "routed_proj"),
        ({"expert_offsets": GOOD["expert_offsets"].long()}, TypeError, "expert_offsets"),
        ({"expert_offsets": torch.tensor([0, 5, 3, 10], dtype=torch.int32)}, IndexError, "expert_offsets"),
        ({"expert_offsets": torch.tensor([0, 5, 9, 11], dtype=torch.int32)}, IndexError, "expert_offsets"),
        ({"expert_offsets": torch.tensor([-1, 5, 9, 10], dtype=torch.int32)}, IndexError, "expert_offsets"),
        ({"num_tokens": -1}, ValueError, "num_tokens"),
        ({"shared_bias": torch.randn(2, 4)}, ValueError, "shared_bias"),
        ({"shared_bias": torch.randn(2, 3).double()}, TypeError, "shared_bias"),
        ({"routed_bias": torch.randn(2, 3)}, ValueError, "routed_bias"),
        ({"routed_bias": torch.randn(3, 3).half()}, TypeError, "routed_bias"),
        ({"routed_rows": torch.randn(10, 4, device="meta")}, ValueError, "routed_rows"),
    ],
)
def test_refuses(override, error, argument):
    assert_refused("expert_gemm", GOOD, override, error, argument)


@pytest.mark.parametrize("bias", ["shared_bias", "routed_bias"])
def test_transpose_takes_no_bias(bias):
    assert_refused("expert_gemm", TRANSPOSED, {bias: torch.randn(2 if "s" in bias[:1] else 3, 4)}, ValueError, bias)


@pytest.mark.parametrize(("own", "asked"), [(torch.bfloat16, torch.float16), (torch.float32, torch.float64)], ids=str)
def test_weight_gradients_come_in_the_rows_dtype_or_their_accumulators(own, asked):
    rows, offsets = floats(4, 3, dtype=own), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(TypeError, match=f"`out_dtype` must be .*float32, got {str(asked)[6:]}; leave it out"):
        raw.expert_gemm_wgrad(rows, rows, rows, rows, offsets, 4, 1, True, True, asked)


@poisoned
def test_opcheck():
    for transpose in (False, True):
        a = gemm_inputs(5, 4, 3, 3, 2, 2, "some_dead", transpose=transpose)
        order = ("shared_rows", "routed_rows", "shared_proj", "routed_proj", "expert_offsets", "num_tokens")
        arguments = (*(a[n] for n in order), a.get("shared_bias"), a.get("routed_bias"), transpose)
        torch.library.opcheck(raw.expert_gemm.default, arguments)
    offsets = a["expert_offsets"]
    grads, rows = (floats(10, 3), floats(10, 3)), (floats(5, 4), floats(10, 4))
    for needs in ((True, True), (False, False)):
        torch.library.opcheck(raw.expert_gemm_wgrad.default, (*grads, *rows, offsets, 5, 2, *needs))
        narrow = [tensor.bfloat16() for tensor in (*grads, *rows)]
        torch.library.opcheck(raw.expert_gemm_wgrad.default, (*narrow, offsets, 5, 2, *needs, torch.float32))
        torch.library.opcheck(raw.expert_bias_grad.default, (*grads, None, offsets, 5, 2, *needs))


@poisoned
def test_compiled(compiled):
    arguments = gemm_inputs(7, 4, 3, 3, 2, 2, "some_dead")
    leaves = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    want, got = ops.expert_gemm(**arguments), compiled(ops.expert_gemm)(**arguments)
    assert torch.equal(want, got)
    grad = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(out, leaves, grad) for out in (want, got)), strict=True):
        assert torch.equal(a, b)


def test_expert_stride_beyond_two_to_the_31_elements():
    """Experts more than 2^31 elements apart, in memory that is reserved and, but for a few pages, never touched."""
    apart = 2**31 + 8
    storage = torch.empty(2 * apart + 64, dtype=torch.bfloat16)
    proj = storage.as_strided((3, 8, 8), (apart, 8, 1))
    proj.copy_(floats(3, 8, 8))
    arguments = gemm_inputs(6, 8, 8, 3, 2, 1, dtype=torch.bfloat16, grad=False)
    want = ops.expert_gemm(**arguments | {"routed_proj": proj.contiguous()})
    assert torch.equal(ops.expert_gemm(**arguments | {"routed_proj": proj}), want)
