"""`moe_ffn` of fp32 tensors on a CPU runs as one piece of work, not as its operators: held to their composition."""

import pytest
import torch
from op_inputs import composed_on_the_cpu, moe_inputs, threads

from ummrm import ops
from ummrm.ops import backends, library

pytestmark = pytest.mark.skipif(
    backends.backend_for("cpu") != "compiled" or not library.build_info()["host_layer"],
    reason="runs where the compiled kernels have products for the processor",
)

GRADS = ("x", "shared_weight", "routed_weights", "shared_up", "routed_up", "shared_down", "routed_down")
BIASES = ("shared_up_bias", "routed_up_bias", "shared_down_bias", "routed_down_bias")

# T, H, I, E, K, S: depths beyond one panel (512), groups beyond one piece (192 rows), sizes that divide nothing
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (40, 530, 33, 3, 2, 1),
    (450, 21, 70, 2, 1, 2),
    (37, 19, 517, 7, 5, 0),
    (9, 5, 4, 5, 2, 1),
]


def results(arguments, names):
    out = ops.moe_ffn(**arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return [out.detach(), *torch.autograd.grad(out, [arguments[n] for n in names], grad, allow_unused=True)]


def assert_same(got, want, names):
    for name, a, b in zip(("out", *names), got, want, strict=True):
        scale = b.abs().max() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=float(2e-5 * scale), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["some_dead", "all_dead", "first"])
@pytest.mark.parametrize(("glu", "biases"), [(True, True), (False, False)], ids=["gated-biases", "plain-bare"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_composition(sizes, glu, biases, kind, poisoned):
    arguments = moe_inputs(*sizes, glu=glu, biases=biases, kind=kind)
    names = GRADS + (BIASES if biases else ())
    got = results(arguments | {"glu": glu}, names)
    with composed_on_the_cpu():
        want = results(arguments | {"glu": glu}, names)
    assert_same(got, want, names)


@pytest.mark.parametrize(
    "needed", [("x",), ("shared_weight",), ("routed_down",), ("shared_up", "x"), ("routed_down_bias",)]
)
def test_each_gradient_alone(needed):
    arguments = moe_inputs(33, 17, 11, 5, 2, 1)
    want = dict(zip(GRADS + BIASES, results(arguments, GRADS + BIASES)[1:], strict=True))
    partly = {n: v.detach() if torch.is_tensor(v) and n not in needed else v for n, v in arguments.items()}
    for name, grad in zip(needed, results(partly, needed)[1:], strict=True):
        assert torch.equal(grad, want[name]), name


def test_bits_do_not_depend_on_threads_or_on_what_memory_held():
    """Large enough for pages of 2 MB and for kept workspaces, which hold what the call before left there. Without
    biases, whose part in a gate's gradient is a product of torch's."""
    arguments = moe_inputs(1100, 300, 520, 4, 2, 1, biases=False, kind="some_dead")
    first = results(arguments, GRADS)
    results(moe_inputs(1100, 300, 520, 4, 2, 1, biases=False), GRADS)
    for count in (1, 2, 3):
        with threads(count):
            again = results(arguments, GRADS)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True)), count
    with torch.no_grad():
        assert torch.equal(ops.moe_ffn(**arguments), first[0])
    with composed_on_the_cpu():
        assert_same(first, results(arguments, GRADS), GRADS)


def test_sums_are_added_to_in_place():
    arguments = moe_inputs(21, 17, 11, 3, 2, 1)
    projections = GRADS[3:]
    for name in projections:
        arguments[name].grad = torch.randn_like(arguments[name])
    before = {name: arguments[name].grad.clone() for name in projections}
    memory = {name: arguments[name].grad.data_ptr() for name in projections}
    with ops.accumulate_in_place():
        ops.moe_ffn(**arguments).sum().backward()
    plain = {n: v.detach().requires_grad_(v.requires_grad) for n, v in arguments.items()}
    ops.moe_ffn(**plain).sum().backward()
    for name in projections:
        assert arguments[name].grad.data_ptr() == memory[name]
        torch.testing.assert_close(arguments[name].grad, before[name] + plain[name].grad, msg=name)


def test_tensors_that_are_not_contiguous():
    arguments = moe_inputs(13, 6, 9, 4, 2, 1, requires_grad=False)
    strided = {
        n: v.repeat_interleave(2, -1)[..., ::2] if torch.is_tensor(v) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    assert torch.equal(ops.moe_ffn(**strided), ops.moe_ffn(**arguments))
