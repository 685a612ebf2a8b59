"""How operators run on the device: the same bits every time, no waiting for the device, on any stream, in CUDA graphs,
under torch.compile and autocast, and without touching their inputs."""

import pytest
import torch
from on_device import Capture, Step, assert_same_bits, late_stream, no_synchronisation, overwrite, own, tensors_in
from op_cases import EVEN, NAMES, ODD, SHAPES, case
from op_inputs import floats, moe_inputs

from ummrm import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
names = pytest.mark.parametrize("name", NAMES)
raw = torch.ops.ummrm


def step_of(name, shape, device, dtype=torch.float32, grads=None):
    op, arguments = case(name, shape, dtype)
    return Step(op, own(arguments, device), grads)


@names
@pytest.mark.parametrize("shape", SHAPES)
@dtypes
def test_deterministic(device, name, shape, dtype):
    step = step_of(name, SHAPES[shape], device, dtype)
    first = [t.clone() for t in step()]
    for _ in range(3):
        assert_same_bits(first, step())


@names
def test_inputs_are_not_changed(device, name):
    step = step_of(name, ODD, device)
    before = [t.detach().clone() for t in tensors_in(step.arguments)]
    step()
    assert_same_bits(before, [t.detach() for t in tensors_in(step.arguments)])


@names
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_waits_for_the_device(device, name, shape):
    step = step_of(name, SHAPES[shape], device, torch.bfloat16)
    step()
    with no_synchronisation(device):
        step()


@pytest.mark.cuda_only
def test_waiting_would_be_noticed(device):
    with no_synchronisation(device), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=device).item()


@names
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_late_stream(device, name, shape):
    """Inputs arrive on the current stream late: an operator on another stream would read what was there before."""
    step = step_of(name, SHAPES[shape], device)
    want = [t.clone() for t in step()]
    arrived = own(step.arguments, device)
    others = own(case(name, SHAPES[shape])[1], device)
    overwrite(step.arguments, others)
    with late_stream(device):
        overwrite(step.arguments, arrived)
        got = step()
    assert_same_bits(want, got)


@names
@pytest.mark.parametrize("shape", SHAPES)
@dtypes
def test_graph_replay_with_other_data(device, name, shape, dtype):
    """Captured once, forward and backward; replayed on other values and another routing, it computes those."""
    step = step_of(name, SHAPES[shape], device, dtype)
    graph = Capture(step, device)
    for kind in ("random", "hole", "all_dead", "some_dead"):
        op, arguments = case(name, SHAPES[shape], dtype, kind)
        others = own(arguments, device)
        want = [t.clone() for t in Step(op, others, step.grads)()]
        overwrite(step.arguments, others)
        graph.replay()
        assert_same_bits(want, graph.out)


@pytest.mark.parametrize("shape", SHAPES)
def test_graph_of_a_whole_layer(device, shape):
    """Router, routing, experts and statistics, forward and backward, in one graph."""
    t, h, i, e, k, s = SHAPES[shape]

    def layer(x, router, **experts):
        routing = ops.route(x.float() @ router.T, top_k=k)
        return [ops.moe_ffn(x, *routing[:3], **experts), routing.mean_prob, routing.mean_z]

    def arguments():
        inputs = moe_inputs(t, h, i, e, k, s, dtype=torch.bfloat16)
        experts = {n: v for n, v in inputs.items() if n.endswith(("_up", "_down", "_bias"))}
        return own({"x": inputs["x"], "router": floats(e, h, requires_grad=True), **experts}, device)

    step = Step(layer, arguments())
    graph = Capture(step, device)
    for _ in range(3):
        others = arguments()
        want = [t.clone() for t in Step(layer, others, step.grads)()]
        overwrite(step.arguments, others)
        graph.replay()
        assert_same_bits(want, graph.out)


@names
def test_compiled(device, compiled, name):
    op, arguments = case(name, EVEN)
    arguments = own(arguments, device)
    step = Step(op, arguments)
    assert_same_bits(step(), Step(compiled(op), arguments, step.grads)())


@names
def test_opcheck(device, name):
    op, arguments = case(name, ODD)
    overload = getattr(raw, name.split()[0]).default
    given = own(arguments, device)
    values = [given.get(a.name, _default(a)) for a in overload._schema.arguments]
    torch.library.opcheck(overload, tuple(values))


def _default(argument):
    """What ops.py passes where a caller gives nothing."""
    if argument.has_default_value():
        return argument.default_value
    own_defaults = {"gate": "shared_complement", "fixed_shared_weight": 0.5, "kind": "silu", "activation": "silu"}
    return own_defaults.get(argument.name, True if argument.name == "glu" else None)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(device, dtype):
    """fp32 parameters: the result and its bits are those of 16-bit ones, gradients arrive in fp32."""
    arguments = own(moe_inputs(*EVEN), device)
    with torch.autocast(device.type, dtype):
        out = ops.moe_ffn(**arguments)
    gates = ("shared_weight", "routed_weights", "expert_indices")
    low = {n: v.detach() if n in gates else v.detach().to(dtype) for n, v in arguments.items()}
    assert out.dtype == dtype and torch.equal(out, ops.moe_ffn(**low))
    leaves = [v for v in arguments.values() if v.requires_grad]
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@names
def test_frozen_inputs(device, name):
    """Without anything to differentiate the output is the same, and nothing is recorded."""
    op, arguments = case(name, ODD)
    step = Step(op, own(arguments, device))
    for t in tensors_in(arguments):
        t.requires_grad_(False)
    frozen = Step(op, own(arguments, device))
    results = frozen()
    assert all(not t.requires_grad for t in results)
    assert_same_bits(step()[: len(results)], results)
