"""expert_glu and its backward: the products with the gated activation at their end, against the reference. Where one
kernel computes them it is a GPU's, or the PTX machine's; here they are the operators that they replace.
"""

import pytest
import torch
from op_inputs import expert_indices, floats, gate_dtype
from tolerances import DTYPES, assert_close_to_truth, to_double

from ummrm import ops
from ummrm.ops import library, reference

poisoned = pytest.mark.usefixtures("poisoned")
raw = torch.ops.ummrm
SIZES = [(1, 1, 1, 1, 1, 1), (9, 4, 3, 4, 4, 1), (17, 13, 6, 7, 3, 3), (33, 32, 24, 5, 2, 0), (40, 72, 40, 3, 2, 1)]
KINDS = ("first", "hole", "some_dead", "all_dead", "random")


def glu_inputs(t, h, i, e, k, s, kind, dtype, bias):
    make, offsets = {"dtype": dtype}, ops.sort_slots(expert_indices(t, e, k, kind), e)[2]
    biases = (floats(s, 2 * i, **make), floats(e, 2 * i, **make)) if bias else (None, None)
    rows = floats(t if s else 0, h, **make), floats(t * k, h, **make)
    return (*rows, floats(s, 2 * i, h, **make), floats(e, 2 * i, h, **make), offsets, t, *biases)


def backward_inputs(t, h, i, e, k, s, kind, dtype):
    make, offsets, rows = {"dtype": dtype}, ops.sort_slots(expert_indices(t, e, k, kind), e)[2], s * t + t * k
    grads, live = (floats(t if s else 0, h, **make), floats(t * k, h, **make)), s * t + int(offsets[-1])
    pre, weights = floats(rows, 2 * i, **make), torch.rand(rows, dtype=gate_dtype(dtype))
    pre[live:], weights[live:] = 0, 0
    return (*grads, floats(s, h, i, **make), floats(e, h, i, **make), offsets, t, pre, weights)


@poisoned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_reference(backend, dtype):
    for kind, activation, size in zip(KINDS, ("silu", "gelu", "relu2", "gelu_tanh", "silu"), SIZES, strict=True):
        inputs = backward_inputs(*size, kind, dtype), *(glu_inputs(*size, kind, dtype, bias) for bias in (True, False))
        for name, given in zip(("expert_glu_backward", "expert_glu", "expert_glu"), inputs, strict=True):
            arguments = *given, activation
            actual, plain = getattr(raw, name)(*arguments), getattr(reference, name)(*arguments)
            truth = getattr(reference, name)(*to_double(arguments))
            for i, triple in enumerate(zip(actual, plain, truth, strict=True)):
                assert_close_to_truth(*triple, f"{name} {i}", dtype, roundings=2)


def test_opcheck():
    torch.library.opcheck(raw.expert_glu.default, (*glu_inputs(5, 3, 4, 3, 2, 2, "hole", torch.float32, True), "silu"))
    backward = backward_inputs(5, 3, 4, 3, 2, 2, "some_dead", torch.bfloat16)
    torch.library.opcheck(raw.expert_glu_backward.default, (*backward, "gelu"))


def test_which_fusions_may_be_asked_for():
    with pytest.raises(ValueError, match="`choice` must be 'measured', 'all' or 'none', got 'some'"):
        library.use_fusions("some")
    for choice in ("all", "none", "measured"):
        library.use_fusions(choice)
