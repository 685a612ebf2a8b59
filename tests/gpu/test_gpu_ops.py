"""Every operator on the device against reference.py in fp64 on the CPU, by the tolerance rule, forward and backward.

The reference runs on the CPU in the same dtype as well: that is the plain torch that the rule compares with.
"""

import pytest
import torch
from on_device import by_columns, interleaved, on
from op_cases import EVEN, NAMES, ODD, case, plain_of
from op_inputs import expert_indices, floats, gate_dtype, gate_weights, moe_inputs
from test_expert_gemm import gemm_inputs
from test_merge_experts import merge_inputs
from test_merged_ffn import merged_inputs
from tolerances import assert_close_to_truth, compare, to_double

from ummrm import ops
from ummrm.ops import composed_reference, library, reference

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "first", "hole", "some_dead", "all_dead")
ACTIVATIONS = tuple(reference.ACTIVATIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
raw = torch.ops.ummrm


def on_cuda(*values):
    """A parameter that takes a CPU too long to rehearse."""
    return pytest.param(*values, marks=pytest.mark.cuda_only)


def call_raw(device, name, arguments):
    """The results of an operator by itself, on positional arguments."""

    def call(**by_position):
        return getattr(raw, name)(*by_position.values())

    return on(device, call)(**{f"a{i}": value for i, value in enumerate(arguments)})


def compare_raw(device, name, arguments, floor_dtype=None):
    """One of the backward operators by itself."""
    got = call_raw(device, name, arguments)
    plain, truth = (getattr(reference, name)(*a) for a in (arguments, to_double(arguments)))
    if isinstance(plain, torch.Tensor):
        plain, truth = [plain], [truth]
    for i, triple in enumerate(zip(got, plain, truth, strict=True)):
        if triple[2].numel():
            assert_close_to_truth(*triple, f"{name} {i}", floor_dtype)
        else:
            assert triple[0].shape == triple[1].shape
    return got


@dtypes
@pytest.mark.parametrize("gate", ["shared_complement", "fixed"])
@pytest.mark.parametrize(
    ("t", "e", "k", "mask"),
    [
        (1, 1, 1, None),
        (7, 3, 3, 0.6),
        (33, 7, 5, 0.0),
        (130, 16, 2, 0.6),
        (70, 67, 9, None),
        (41, 256, 16, 0.9),
        (2500, 6, 2, 0.8),
        on_cuda(20_000, 8, 2, 0.8),
        on_cuda(20_000, 12, 12, None),
    ],
)
def test_route(device, dtype, gate, t, e, k, mask):
    arguments = {
        "logits": floats(t, e, dtype=dtype, requires_grad=True, scale=2),
        "top_k": k,
        "mask": None if mask is None else torch.rand(t) < mask,
        "gate": gate,
        "fixed_shared_weight": 0.3,
    }
    compare(on(device, ops.route), reference.route, arguments)
    clean = {"clean_logits": floats(t, e, dtype=dtype, requires_grad=True, scale=2)}
    compare(on(device, ops.route), reference.route, arguments | clean)


@pytest.mark.sanitize
def test_route_ties_and_nan(device):
    """Ties go to the lower index; NaN logits give NaN weights and valid, distinct indices, and do not spread."""
    ties = torch.randint(0, 3, (200, 9)).float()
    want = [sorted(range(9), key=lambda e: (-row[e], e))[:6] for row in ties.tolist()]
    assert ops.route(ties.to(device), top_k=6).expert_indices.tolist() == want
    logits = floats(50, 5)
    logits[7, 3], logits[9] = float("nan"), -float("inf")
    out = [o.cpu() for o in ops.route(logits.to(device), top_k=3)]
    bad = torch.zeros(50, dtype=torch.bool)
    bad[7] = bad[9] = True
    assert torch.equal(out[0].isnan(), bad) and torch.equal(out[1].isnan().any(-1), bad)
    assert out[2][bad].tolist() == [[0, 1, 2]] * 2 and out[3].sum() == 150
    masked = [o.cpu() for o in ops.route(logits.to(device), (~bad).to(device), top_k=3)]
    assert all(o.isfinite().all() for o in masked) and masked[2][bad].eq(-1).all() and masked[3].sum() == 144


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("t", "e", "k"),
    [(1, 1, 1), (33, 7, 5), (4000, 5, 3), (30, 256, 16), on_cuda(30_000, 16, 16), on_cuda(200_001, 7, 5)],
)
def test_sort_slots(device, kind, t, e, k):
    indices = expert_indices(t, e, k, kind)
    got = ops.sort_slots(indices.to(device), e)
    for a, b in zip(got, reference.sort_slots(indices, e), strict=True):
        assert a.dtype == torch.int32 and torch.equal(a.cpu(), b)


@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("t", "h", "e", "k"), [(1, 1, 1, 1), (9, 3, 4, 4), (33, 13, 7, 5), (65, 136, 3, 2), on_cuda(1000, 1032, 8, 3)]
)
def test_permute(device, dtype, kind, t, h, e, k):
    _, sorted_to_slot, offsets = reference.sort_slots(expert_indices(t, e, k, kind), e)
    x = floats(t, h, dtype=dtype, requires_grad=True)
    arguments = {"x": x, "sorted_to_slot": sorted_to_slot, "expert_offsets": offsets, "top_k": k}
    compare(on(device, ops.permute), reference.permute, arguments)


@dtypes
@pytest.mark.parametrize("weights", ["both", "shared", "routed", "none"])
@pytest.mark.parametrize("s", [0, 1, 3])
def test_unpermute(device, dtype, weights, s):
    sizes = [(1, 1, 1, 1), (9, 3, 4, 4), (33, 13, 7, 5), (65, 136, 3, 2), (21, 64, 16, 16)]
    for kind, (t, h, e, k) in zip(KINDS, sizes, strict=True):
        indices = expert_indices(t, e, k, kind)
        slot_to_sorted, _, offsets = reference.sort_slots(indices, e)
        shared, routed = gate_weights(indices, requires_grad=True)
        arguments = {
            "rows": floats(s * t + t * k, h, dtype=dtype, requires_grad=True),
            "slot_to_sorted": slot_to_sorted,
            "expert_offsets": offsets,
            "shared_weight": shared if weights in ("both", "shared") and s else None,
            "routed_weights": routed if weights in ("both", "routed") else None,
            "num_shared_experts": s,
            "top_k": k,
        }
        compare(on(device, ops.unpermute), reference.unpermute, arguments, floor_dtype=dtype)


@dtypes
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("glu", [True, False])
def test_activation(device, dtype, kind, glu):
    for rows, i in [(1, 1), (3, 5), (17, 31), (65, 96), (2, 1030)]:
        width = 2 * i if glu else i
        z = floats(rows, width, dtype=dtype, requires_grad=True, scale=3)
        arguments = {"pre_activation": z, "kind": kind, "glu": glu}
        compare(on(device, ops.activation), reference.activation, arguments)
        grad, z = floats(rows, i, dtype=dtype), floats(rows, width, dtype=dtype)
        for weights in (floats(rows), None):
            compare_raw(device, "activation_backward", (grad, z, weights, kind, glu))


@dtypes
@pytest.mark.parametrize(("s", "e"), [(1, 1), (2, 7), (1, 40)])
def test_merge_experts(device, dtype, s, e):
    inputs = merge_inputs(s, e, [(1,), (5,), (3, 7), (33, 65), (64, 72)], dtype)
    compare(on(device, ops.merge_experts), reference.merge_experts, inputs, floor_dtype=dtype)
    shapes = [(3,), (4099,), (130, 136)]
    inputs = merge_inputs(s, e, shapes, dtype, grad=False)
    grads = [floats(*shape, dtype=dtype) for shape in shapes]
    compare_raw(device, "merge_experts_dots", (grads, inputs["shared"], inputs["routed"]))


@dtypes
def test_merge_experts_of_views(device, dtype):
    """Gate and up rows of one fused parameter, as merged_ffn passes them."""
    inputs = merge_inputs(2, 3, [(8, 24)], dtype)
    arguments = {n: inputs[n][0] for n in ("shared", "routed")} | {"coefficients": inputs["coefficients"].expand(2, -1)}

    def split(function):
        def merged(shared, routed, coefficients):
            return function(list(shared.chunk(2, 1)), list(routed.chunk(2, 1)), coefficients)

        return merged

    compare(on(device, split(ops.merge_experts)), split(reference.merge_experts), arguments, floor_dtype=dtype)


# T, D, N, E, K, S: one of everything, odd widths (the slower path), widths of the matrix units
GEMMS = [
    (1, 1, 1, 1, 1, 1),
    (3, 5, 7, 1, 1, 2),
    (9, 8, 16, 4, 4, 1),
    (17, 13, 6, 7, 3, 3),
    (70, 64, 72, 5, 2, 2),
]
# whole tiles and ragged ones of the matrix units, several of each
TILES = [on_cuda(300, 512, 384, 5, 2, 1), on_cuda(400, 264, 1032, 4, 2, 1), on_cuda(257, 127, 255, 4, 2, 2)]


def check_gemm(device, sizes, kind, dtype, transpose, copies):
    arguments = gemm_inputs(*sizes, kind, dtype, transpose, copies)
    compare(on(device, ops.expert_gemm), reference.expert_gemm, arguments)
    if not transpose:
        bare = arguments | {"shared_bias": None, "routed_bias": None}
        compare(on(device, ops.expert_gemm), reference.expert_gemm, bare)


@dtypes
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("sizes", GEMMS, ids=str)
def test_expert_gemm(device, dtype, transpose, copies, sizes):
    for kind in KINDS:
        check_gemm(device, sizes, kind, dtype, transpose, copies)


@dtypes
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("t", "d", "n", "e", "k", "s"), TILES)
def test_expert_gemm_of_many_tiles(device, dtype, transpose, t, d, n, e, k, s):
    check_gemm(device, (t, d, n, e, k, s), "hole", dtype, transpose, copies=transpose)


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("sizes", [(70, 64, 72, 5, 2, 2), (300, 512, 384, 5, 2, 1)], ids=str)
def test_fp32_products_follow_torchs_setting(device, tf32, sizes):
    """Operands rounded to 10 bits of fraction, as torch's own products then are; sums in fp32 all the same."""
    t, d, n, e, k, s = sizes
    offsets = reference.sort_slots(expert_indices(t, e, k, "hole"), e)[2]
    rows, grads = (floats(t, d), floats(t * k, d)), (floats(s * t, n), floats(t * k, n))
    products = {
        "expert_gemm": (*rows, floats(s, n, d), floats(e, n, d), offsets, t),
        "expert_gemm_wgrad": (*grads, *rows, offsets, t, s, True, True),
    }
    rounds = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    rounds = rounds and any(row["arch"] == "sm80" for row in library.tile_table())
    for name, arguments in products.items():
        wide = to_double(arguments)
        sizes_of = [a.abs() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in wide]
        found = (
            tuple(call_raw(device, name, arguments)),
            getattr(reference, name)(*wide),
            getattr(reference, name)(*sizes_of),
        )
        for got, truth, size in zip(*(x if isinstance(x, tuple) else (x,) for x in found), strict=True):
            error = (got.cpu().double() - truth).abs()
            assert error.le(2**-9 * size).all()
            assert bool(error.gt(2**-16 * size).any()) == rounds, "whether products were rounded"


def check_gradients(device, sizes, kind, dtype):
    t, d, n, e, k, s = sizes
    offsets = reference.sort_slots(expert_indices(t, e, k, kind), e)[2]
    grads = floats(s * t, n, dtype=dtype), floats(t * k, n, dtype=dtype)
    for blocks in {1, s}:
        rows = floats(blocks * t, d, dtype=dtype), floats(t * k, d, dtype=dtype)
        for needs in ((True, True), (False, True)):
            got = compare_raw(device, "expert_gemm_wgrad", (*grads, *rows, offsets, t, s, *needs), dtype)
            assert got[1][offsets.diff() == 0].eq(0).all()
            wide = (*grads, *rows, offsets, t, s, *needs, gate_dtype(dtype))
            compare_raw(device, "expert_gemm_wgrad", wide, torch.float32)
    for weights in (None, floats(s * t + t * k, dtype=gate_dtype(dtype))):
        got = compare_raw(device, "expert_bias_grad", (*grads, weights, offsets, t, s, True, True), dtype)
        assert got[1][offsets.diff() == 0].eq(0).all()


@dtypes
@pytest.mark.parametrize("sizes", GEMMS, ids=str)
def test_weight_and_bias_gradients(device, dtype, sizes):
    """Ragged inner dimensions; an expert without tokens gets zeros, whatever lay in memory."""
    for kind in KINDS:
        check_gradients(device, sizes, kind, dtype)


@dtypes
@pytest.mark.parametrize(("t", "d", "n", "e", "k", "s"), TILES)
def test_weight_gradients_of_many_tiles(device, dtype, t, d, n, e, k, s):
    check_gradients(device, (t, d, n, e, k, s), "hole", dtype)


@dtypes
def test_dead_rows_are_ignored(device, dtype):
    """NaN behind the live rows reaches nothing, and what is written there is zero."""
    for t, d, n in ((20, 6, 5), (40, 64, 72)):
        arguments = gemm_inputs(t, d, n, 4, 2, 1, "some_dead", dtype)
        live = int(arguments["expert_offsets"][-1])
        with torch.no_grad():
            arguments["routed_rows"][live:] = float("nan")
        (out,) = on(device, ops.expert_gemm)(**arguments)
        assert out.isfinite().all() and out[t + live :].eq(0).all()
        grad = torch.randn_like(out)
        grad[t + live :] = float("nan")
        leaves = [arguments[n] for n in ("routed_rows", "routed_proj", "routed_bias", "shared_rows", "shared_proj")]
        grads = torch.autograd.grad(out, leaves, grad)
        assert all(g.isfinite().all() for g in grads) and grads[0][live:].eq(0).all()


@dtypes
@pytest.mark.parametrize("glu", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "bare"])
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((1, 1, 1, 1, 1, 1), "random"),
        ((9, 7, 5, 4, 4, 1), "first"),
        ((13, 6, 9, 7, 5, 1), "some_dead"),
        ((33, 17, 11, 5, 2, 3), "hole"),
        ((8, 8, 4, 3, 2, 2), "all_dead"),
        ((64, 32, 48, 8, 3, 1), "random"),
        on_cuda((300, 256, 384, 5, 2, 1), "hole"),
        on_cuda((400, 128, 264, 4, 3, 2), "some_dead"),
        on_cuda((130, 896, 608, 3, 2, 1), "random"),
    ],
    ids=str,
)
def test_moe_ffn(device, dtype, glu, biases, sizes, kind):
    arguments = moe_inputs(*sizes, glu, biases, kind, dtype) | {"glu": glu}
    compare(on(device, ops.moe_ffn), composed_reference.moe_ffn, arguments, dtype, roundings=4)


@dtypes
@pytest.mark.parametrize("kind", ACTIVATIONS[1:])
@pytest.mark.parametrize("glu", [True, False])
def test_moe_ffn_activations(device, dtype, kind, glu):
    arguments = moe_inputs(19, 16, 24, 4, 2, 1, glu, dtype=dtype) | {"glu": glu, "activation": kind}
    compare(on(device, ops.moe_ffn), composed_reference.moe_ffn, arguments, dtype, roundings=4)


@dtypes
@pytest.mark.parametrize("glu", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "bare"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (33, 17, 11, 7, 3), (64, 32, 48, 3, 1)], ids=str)
def test_merged_ffn(device, dtype, glu, biases, sizes):
    arguments = merged_inputs(*sizes, glu, biases, dtype) | {"glu": glu}
    compare(on(device, ops.merged_ffn), composed_reference.merged_ffn, arguments, dtype, roundings=4)


@pytest.mark.parametrize("narrow", DTYPES[1:], ids=str)
def test_merged_ffn_of_wider_parameters(device, narrow):
    arguments = merged_inputs(20, 16, 24, 3, 1, dtype=narrow, wide=torch.float32)
    compare(on(device, ops.merged_ffn), composed_reference.merged_ffn, arguments, narrow, roundings=4)


@pytest.mark.parametrize("layout", [interleaved, by_columns])
@pytest.mark.parametrize("shape", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs(device, name, shape, layout):
    op, arguments = case(name, shape)
    plain = plain_of(name)
    compare(on(device, op, layout), plain, arguments, roundings=4)


@dtypes
@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(device, dtype, name):
    """Empty inputs give empty outputs, zero gradients, and leave the device well."""
    op, arguments = case(name, (0, 8, 8, 3, 2, 2), dtype)
    compare(on(device, op), plain_of(name), arguments, dtype)


@pytest.mark.sanitize
@dtypes
@pytest.mark.parametrize("shape", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("name", NAMES)
def test_small(device, dtype, shape, name):
    """One small case of every operator, forward and backward: what compute-sanitizer looks at."""
    op, arguments = case(name, shape, dtype, "hole")
    compare(on(device, op), plain_of(name), arguments, dtype, roundings=4)
