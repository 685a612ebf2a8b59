"""The argument checks that all backends share: sizes that overflow, indices that would write out of bounds, tensors
without memory. What is asked here ends a process that does not check, so each asks in a child.
"""

import subprocess
import sys

import pytest
import torch
from checkout import ROOT
from op_inputs import floats, moe_inputs
from test_moe_ffn import in_order as moe_in_order

from ummrm import ops
from ummrm.ops import library, reference

PREAMBLE = """
import resource, sys, torch, ummrm
used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
resource.setrlimit(resource.RLIMIT_CPU, (used + 20, used + 20))
if sys.platform == "linux":
    most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
raw, HUGE, T, K, E, H = torch.ops.ummrm, 1 << 62, 4, 2, 3, 5
index = lambda *values: torch.tensor(values, dtype=torch.int32)
rows, slots, offsets = torch.randn(T * K, H), torch.arange(T * K, dtype=torch.int32), index(0, 3, 5, 8)
def zeros(*shape):
    return torch.zeros(shape)
def refused(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
"""
LIVE = "torch.tensor([True, False, True, True])"
CALLS = {
    # S * T is 0 in 64 bits
    "unpermute": (
        "raw.unpermute(rows, slots, offsets, None, None, HUGE, K)",
        "ValueError ummrm.unpermute: `num_shared_experts` must be below 2^31, got 4611686018427387904; pass",
    ),
    "unpermute_backward": (
        "raw.unpermute_backward(torch.randn(T, H), rows, slots, offsets, None, None, HUGE, K)",
        "ValueError ummrm.unpermute_backward: `num_shared_experts` must be below 2^31, got",
    ),
    "expert_bias_grad": (
        "raw.expert_bias_grad(torch.randn(T, H), rows, None, offsets, T, HUGE, False, True)",
        "ValueError ummrm.expert_bias_grad: `num_shared_experts` must be below 2^31, got",
    ),
    "expert_gemm_wgrad": (
        "raw.expert_gemm_wgrad(rows[:T], rows, rows[:T], rows, offsets, T, HUGE, False, True)",
        "ValueError ummrm.expert_gemm_wgrad: `num_shared_experts` must be below 2^31, got",
    ),
    "expert_gemm": (
        "raw.expert_gemm(rows[:T], rows, zeros(HUGE, 0, H), zeros(E, 0, H), offsets, T)",
        "ValueError ummrm.expert_gemm: `shared_proj.shape[0]` must be below 2^31, got",
    ),
    "expert_gemm's tokens": (
        "raw.expert_gemm(rows[:0], rows, zeros(4, 2, H), zeros(E, 2, H), offsets, HUGE)",
        "ValueError ummrm.expert_gemm: `num_tokens` must be below 2^31, got",
    ),
    "permute": (
        "raw.permute(torch.randn(T, H), slots[:0], index(0, 0), HUGE)",
        "ValueError ummrm.permute: `top_k` must be below 2^31, got",
    ),
    "permute's slots": (
        "raw.permute(zeros(1, H).expand(1 << 40, H), slots[:0], index(0, 0), 1 << 24)",
        "ValueError ummrm.permute: `x` must have T * top_k below 2^31, got T = 1099511627776 and top_k = 16777216;",
    ),
    "sort_slots": (
        "raw.sort_slots(slots, 2**63 - 1)",
        "ValueError ummrm.sort_slots: `num_experts` must be below 2^31, got 9223372036854775807;",
    ),
    "moe_ffn": (
        "raw.moe_ffn(zeros(T, 1), zeros(T), zeros(T, K), slots.view(T, K) % E, zeros(HUGE, 0, 1), zeros(E, 0, 1),"
        " zeros(HUGE, 1, 0), zeros(E, 1, 0), None, None, None, None, 'relu', False)",
        "ValueError ummrm.moe_ffn: `shared_up.shape[0]` must be below 2^31, got",
    ),
    # -1 is what route gives a masked token, and no other
    "route_backward": (
        f"raw.route_backward(zeros(T), zeros(T, K), zeros(E), zeros(), torch.randn(T, E), {LIVE}, None,"
        " index(0, 1, -1, -1, 2, 1, 1, -1).view(T, K), index(2, 2, 2), 'fixed', 0.5)",
        "IndexError ummrm.route_backward: `expert_indices` must lie in [0, 2] where `mask` is True, got -1 at",
    ),
    # meta tensors have shapes and no memory
    "activation of meta": (
        "raw.activation.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),"
        " zeros(2, 4).to('meta'), 'silu', True)",
        "ValueError ummrm.activation: `device` must be of a type that this build has kernels for, got 'meta'; move",
    ),
    "sort_slots of meta": (
        "raw.sort_slots.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), slots.to('meta'), T * K)",
        "ValueError ummrm.sort_slots: `device` must be of a type that this build has kernels for, got 'meta'; move",
    ),
    "permute of meta": (
        "raw.permute.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),"
        " *(t.to('meta') for t in (rows[:T], slots, offsets)), K)",
        "ValueError ummrm.permute: `device` must be of a type that this build has kernels for, got 'meta'; move",
    ),
}


@pytest.fixture(scope="module")
def answers():
    """What the calls printed, all from one child if none ends it."""
    left, answers = list(CALLS), {}
    while left:
        calls = (f"print('# ', end='', flush=True)\nrefused(lambda: {CALLS[name][0]})\n" for name in left)
        program = PREAMBLE + "".join(calls)
        done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd=ROOT)
        parts = done.stdout.split("# ")[1:]
        answered = dict(zip(left, parts, strict=False))
        if done.returncode != 0:
            answered[left[len(parts) - 1]] = f"ended with {done.returncode}: {done.stderr[-300:]}"
        answers |= answered
        left = left[len(parts) :] if parts else []
    return answers


@pytest.mark.parametrize("name", CALLS)
def test_what_would_end_the_process_is_refused(answers, name):
    assert CALLS[name][1] in answers[name], answers[name]


def test_every_operator_has_its_checks():
    names = {n.removeprefix("ummrm::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("ummrm::")}
    assert {name for name in dir(library.checks) if not name.startswith("_")} == names


def test_checks_compute_nothing_and_take_tensors_without_memory():
    """They refuse in the operator's own words, and need no more than shapes."""
    meta = {n: v.detach().to("meta") for n, v in moe_inputs(5, 4, 3, 3, 2, 2).items()}
    assert library.checks.moe_ffn(*moe_in_order(meta)) is None
    z = floats(2, 4)
    assert library.checks.activation(z, "silu", True) is None
    shape, kind, dtype = (z[0], "silu", True), (z, "swish", True), (z.int(), "silu", True)
    for bad, error in ((shape, ValueError), (kind, ValueError), (dtype, TypeError)):
        with pytest.raises(error) as of_check:
            library.checks.activation(*bad)
        with pytest.raises(error) as of_operator:
            torch.ops.ummrm.activation(*bad)
        assert str(of_check.value) == str(of_operator.value) and str(of_check.value).startswith("ummrm.activation: `")


def test_every_backend_refuses_in_the_same_words(backend):
    """Indices too, which lie on the CPU here and are always read."""
    indices = torch.tensor([[0, 3]], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"^ummrm.sort_slots: `expert_indices` must lie in \[-1, 2\], got 3 at pos"):
        ops.sort_slots(indices, 3)
    with pytest.raises(ValueError, match=r"^ummrm.activation: `kind` must be 'silu', .* or 'relu2', got 'swish'; pass"):
        ops.activation(floats(2, 4), "swish")
    with pytest.raises(
        ValueError, match=r"^ummrm.permute: `sorted_to_slot` must have shape \[T\*K\] = \[4\], got int3"
    ):
        ops.permute(floats(2, 3), indices[0], torch.tensor([0, 2], dtype=torch.int32), 2)
    with pytest.raises(TypeError, match=r"^ummrm.merge_experts: `coefficients` must be float32, got float64 \[1, 3\];"):
        ops.merge_experts([floats(1, 2)], [floats(2, 2)], torch.rand(1, 3).double())


def test_the_native_names_of_activations_are_pythons():
    assert library.activation_names() == list(reference.ACTIVATIONS)
