"""The fused CUDA kernels, all that there are, against the reference and against the kernels that they replace. They are
off by default until they have been timed, so other tests do not meet them.
"""

import pytest
import torch
from op_inputs import expert_indices, floats, moe_inputs
from test_expert_glu import backward_inputs, glu_inputs
from test_gpu_ops import compare_raw
from test_grad_sums import wgrad_inputs
from tolerances import assert_close_to_truth, compare, to_double

from ummrm import ops
from ummrm.ops import composed_reference, library, reference

pytestmark = pytest.mark.usefixtures("poisoned", "fused")
raw = torch.ops.ummrm
KINDS = ("random", "hole", "some_dead", "all_dead")
# T, H, I, E, K, S: one tile, several, what tiles and their halves do not divide, many groups, no shared expert
SIZES = ((9, 16, 24, 3, 2, 1), (200, 72, 136, 4, 2, 1), (150, 136, 200, 7, 3, 2), (300, 64, 96, 5, 1, 0))


@pytest.fixture
def fused():
    library.use_fusions("all")
    yield
    library.use_fusions("measured")


def on(device, arguments):
    return [a.to(device) if torch.is_tensor(a) else a for a in arguments]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gated_activation_at_the_end_of_products(device, sizes):
    for kind in KINDS:
        for bias in (True, False):
            forward = *glu_inputs(*sizes, kind, torch.bfloat16, bias), "silu"
            got = compare_raw(device, "expert_glu", forward, torch.bfloat16)
            library.use_fusions("none")
            for ours, unfused in zip(got, raw.expert_glu(*on(device, forward)), strict=True):
                assert_close_to_truth(ours, unfused.cpu(), ours.double(), "fused and not", torch.bfloat16)
            library.use_fusions("all")
        compare_raw(
            device, "expert_glu_backward", (*backward_inputs(*sizes, kind, torch.bfloat16), "silu"), torch.bfloat16
        )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_layer(device, sizes):
    for kind in KINDS:
        for biases in (True, False):
            arguments = moe_inputs(*sizes, biases=biases, kind=kind, dtype=torch.bfloat16)

            def on_device(**arguments):
                return ops.moe_ffn(**{n: v if v is None else v.to(device) for n, v in arguments.items()}).cpu()

            compare(on_device, composed_reference.moe_ffn, arguments, roundings=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_weight_gradients_added_in_place(device, dtype, sizes):
    t, h, i, e, k, s = sizes
    for kind in KINDS:
        inputs = wgrad_inputs(t, h, i, e, k, s, kind, dtype, copies=t % 2 == 0)
        unused = inputs[4].diff() == 0
        for wanted in {dtype, torch.float32}:
            before = floats(s, i, h, dtype=wanted), floats(e, i, h, dtype=wanted)
            sums, plain, truth = on(device, before), [b.clone() for b in before], to_double(before)
            raw.expert_gemm_wgrad_add(*on(device, inputs), *sums)
            reference.expert_gemm_wgrad_add(*inputs, *plain)
            reference.expert_gemm_wgrad_add(*to_double(inputs), *truth)
            for triple in zip(sums, plain, truth, strict=True):
                if triple[2].numel():
                    assert_close_to_truth(triple[0].cpu(), *triple[1:], "sum", dtype, roundings=2)
            assert torch.equal(sums[1].cpu()[unused], before[1][unused])


def test_gradient_accumulation(device):
    """Two micro-batches: `.grad` is added to in place, and is what the reference sums."""
    inputs = moe_inputs(120, 64, 80, 4, 2, 1, dtype=torch.bfloat16)
    mine = {n: v.detach().to(device).requires_grad_(v.requires_grad) for n, v in inputs.items()}
    for each, function in ((mine, ops.moe_ffn), (inputs, composed_reference.moe_ffn)):
        with ops.accumulate_in_place():
            for step in range(2):
                torch.manual_seed(step)
                grad = floats(120, 64, dtype=torch.bfloat16)
                function(**each).backward(grad.to(each["x"].device))
    for name in ("shared_up", "routed_up", "shared_down", "routed_down"):
        want, got = inputs[name].grad.float(), mine[name].grad.float().cpu()
        assert (got - want).norm() <= 0.02 * want.norm(), name


def test_indices_are_not_needed_on_the_host(device):
    """Fused products read their groups on the device alone, as the others do."""
    offsets = ops.sort_slots(expert_indices(40, 3, 2, "hole").to(device), 3)[2]
    rows = floats(40, 16, dtype=torch.bfloat16).to(device), floats(80, 16, dtype=torch.bfloat16).to(device)
    projections = floats(1, 32, 16, dtype=torch.bfloat16).to(device), floats(3, 32, 16, dtype=torch.bfloat16).to(device)
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else None
    if before is not None:
        torch.cuda.set_sync_debug_mode("error")
    try:
        raw.expert_glu(*rows, *projections, offsets, 40, None, None, "silu")
    finally:
        if before is not None:
            torch.cuda.set_sync_debug_mode(before)
