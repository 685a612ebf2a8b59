"""grouped_linear and grouped_ffn: rows that stand grouped by expert, against a loop over the experts."""

import pytest
import torch
import torch.nn.functional as F
from op_inputs import floats
from tolerances import DTYPES, compare

from ummrm import ops
from ummrm.ops import reference
from ummrm.ops.reference import ACTIVATIONS

poisoned = pytest.mark.usefixtures("poisoned")
# rows of each expert; D, N (or H, I): experts without rows at the ends and between, one row, one expert, none at all; a
# reward head
CASES = [
    ((3, 0, 4), 5, 7),
    ((0, 1), 4, 3),
    ((9,), 6, 5),
    ((0, 0, 0), 3, 2),
    ((0, 17, 0, 30, 1, 0), 33, 24),
    ((4, 0, 2), 24, 1),
]


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def by_loop(function, x, expert_offsets, *stacks):
    """`function(rows, ...)` on each expert's rows with its slices of `stacks`, put together."""
    ends = expert_offsets.tolist()
    slices = [[None if s is None else s[e] for s in stacks] for e in range(len(ends) - 1)]
    return torch.cat([function(x[a:b], *own) for a, b, own in zip(ends, ends[1:], slices, strict=False)])


def plain_linear(x, proj, expert_offsets, bias):
    return by_loop(F.linear, x, expert_offsets, proj, bias)


def plain_ffn(x, expert_offsets, up, down, up_bias, down_bias, activation="silu", glu=True):
    def ffn(rows, up, down, up_bias, down_bias):
        return F.linear(reference.activation(F.linear(rows, up, up_bias), activation, glu), down, down_bias)

    return by_loop(ffn, x, expert_offsets, up, down, up_bias, down_bias)


def ffn_inputs(counts, hidden, intermediate, dtype, bias=True, glu=True):
    make, experts = {"dtype": dtype, "requires_grad": True}, len(counts)
    rows = intermediate * (1 + glu)
    return {
        "x": floats(sum(counts), hidden, **make),
        "expert_offsets": offsets_of(counts),
        "up": floats(experts, rows, hidden, **make),
        "down": floats(experts, hidden, intermediate, **make),
        "up_bias": floats(experts, rows, **make) if bias else None,
        "down_bias": floats(experts, hidden, **make) if bias else None,
    }


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_against_a_loop(backend, dtype):
    for counts, d, n in CASES:
        x = floats(sum(counts), d, dtype=dtype, requires_grad=True)
        proj = floats(len(counts), n, d, dtype=dtype, requires_grad=True)
        for bias in (floats(len(counts), n, dtype=dtype, requires_grad=True), None):
            arguments = {"x": x, "proj": proj, "expert_offsets": offsets_of(counts), "bias": bias}
            compare(ops.grouped_linear, plain_linear, arguments)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu", [True, False], ids=["gated", "plain"])
def test_ffn_against_a_loop(backend, dtype, glu):
    for index, (counts, hidden, intermediate) in enumerate(CASES):
        kind = list(ACTIVATIONS)[index % len(ACTIVATIONS)]
        arguments = ffn_inputs(counts, hidden, intermediate, dtype, bias=index % 2 == 0, glu=glu)
        arguments |= {"activation": kind, "glu": glu}
        compare(ops.grouped_ffn, plain_ffn, arguments)


def test_gradcheck_and_second_derivatives():
    arguments = ffn_inputs((2, 0, 3), 3, 2, torch.float64)
    names = [name for name, value in arguments.items() if value.is_floating_point()]

    def function(*tensors):
        return ops.grouped_ffn(**arguments | dict(zip(names, tensors, strict=True)))

    inputs = [arguments[name] for name in names]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_compiled_and_under_autocast():
    arguments = ffn_inputs((4, 3), 8, 6, torch.float32)
    expected = ops.grouped_ffn(**arguments)
    compiled = torch.compile(ops.grouped_ffn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = ops.grouped_ffn(**arguments)
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).norm() <= 0.05 * expected.norm()


def test_saves_no_more_than_a_dense_ffn():
    """Bytes that autograd keeps beside the parameters: x, the pre-activation and the activation."""
    counts, hidden, intermediate = (16, 16), 8, 12
    arguments = ffn_inputs(counts, hidden, intermediate, torch.float32, bias=False)
    parameters = {arguments[name].data_ptr() for name in ("up", "down")}

    def kept(function):
        seen = {}

        def pack(tensor):
            if tensor.data_ptr() not in parameters and tensor.numel():
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function()
        assert out.requires_grad
        return sum(seen.values())

    x = arguments["x"]
    up, down = (arguments[name][0].detach().requires_grad_() for name in ("up", "down"))
    parameters |= {up.data_ptr(), down.data_ptr()}

    def dense():
        gate, value = F.linear(x, up).chunk(2, -1)
        return F.linear(F.silu(gate) * value, down)

    rows = sum(counts)
    offsets = 2 * arguments["expert_offsets"].nbytes
    assert kept(lambda: ops.grouped_ffn(**arguments)) <= 4 * rows * (hidden + 3 * intermediate) + offsets
    assert kept(lambda: ops.grouped_ffn(**arguments)) <= kept(dense) + offsets


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"proj": torch.randn(2, 3, 5)}, ValueError, "5"),
        ({"bias": torch.randn(3, 3)}, ValueError, "bias"),
        ({"expert_offsets": torch.tensor([0, 2, 9], dtype=torch.int32)}, IndexError, "offsets"),
        ({"expert_offsets": torch.tensor([0, 2, 6])}, TypeError, "int32"),
        ({"x": torch.randn(6, 4).double()}, TypeError, "float64|dtype"),
    ],
    ids=["width", "bias", "past the end", "int64", "dtypes"],
)
def test_bad_arguments(changes, error, message):
    arguments = {"x": torch.randn(6, 4), "proj": torch.randn(2, 3, 4), "expert_offsets": offsets_of((2, 4))}
    with pytest.raises(error, match=message):
        ops.grouped_linear(**arguments | changes)
