"""Second derivatives: right under every entry of autograd, whichever path leads back to an input.

Where a backward is itself recorded the reference computes the gradient; values are held to finite differences, to plain
torch, and for a whole model to the dense one that it equals.
"""

import functools

import pytest
import torch
from op_cases import case
from op_inputs import floats, moe_inputs
from test_library import NAMES, cases

from ummrm import ops
from ummrm.ops import composed_reference, reference

T, H, INTERMEDIATE, E, K, S = 4, 3, 2, 3, 2, 2
WIDE = {"dtype": torch.float64, "requires_grad": True}


def flat(function, arguments):
    """`function` of its differentiable tensors alone, to its differentiable outputs; and those tensors."""
    leaves, structure = torch.utils._pytree.tree_flatten(arguments)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def of_tensors(*tensors):
        given = dict(zip(at, tensors, strict=True))
        mixed = [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        out = function(**torch.utils._pytree.tree_unflatten(mixed, structure))
        return tuple(o for o in (out if isinstance(out, (tuple, list)) else (out,)) if o.is_floating_point())

    return of_tensors, [leaves[i] for i in at]


def test_what_was_frozen_since_the_forward_is_no_part_of_the_penalty():
    """As plain torch has it: the usual way to hold a critic still."""
    arguments = moe_inputs(T, H, INTERMEDIATE, E, K, S, dtype=torch.float64)
    x, out = arguments["x"], ops.moe_ffn(**arguments).square().sum()
    (wanted,) = torch.autograd.grad(out, x, retain_graph=True)
    for argument in arguments.values():
        if argument is not x:
            argument.requires_grad_(False)
    (found,) = torch.autograd.grad(out, x, create_graph=True)
    torch.testing.assert_close(found, wanted)
    (again,) = torch.autograd.grad(found.square().sum(), x)
    assert again.isfinite().all() and again.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradgradcheck(backend, name):
    """Every second derivative, in fp64: each input with each other, and with the incoming gradient."""
    op, arguments = case(name, (T, H, INTERMEDIATE, E, K, S), torch.float64)
    if name == "route":
        arguments["clean_logits"] = floats(T, E, **WIDE)
    function, tensors = flat(op, arguments)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@functools.cache
def _one_input(name):
    torch.manual_seed(0)
    return cases()[name]


def loss(name):
    return lambda x: _one_input(name)[0](x).square().sum()


def by_backward(f, x, v):
    leaf = x.clone().requires_grad_()
    f(leaf).backward(create_graph=True)
    gradient, leaf.grad = leaf.grad, None
    (gradient * v).sum().backward()
    return leaf.grad


def by_grad(f, x, v, **options):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True, **options)
    return torch.autograd.grad((gradient * v).sum(), leaf, **options)[0]


def by_batched_grad(f, x, v):
    leaf = x.clone().requires_grad_()
    batch = torch.ones(1, dtype=x.dtype)
    (gradient,) = torch.autograd.grad(f(leaf), leaf, batch, create_graph=True, is_grads_batched=True)
    return torch.autograd.grad(gradient, leaf, v.expand(2, *gradient.shape), is_grads_batched=True)[0][1]


def by_hessian(f, x, v, **options):
    return torch.einsum("ij,j->i", torch.autograd.functional.hessian(f, x, **options).reshape(x.numel(), -1), v.ravel())


ENTRIES = {
    "backward": by_backward,
    "grad": by_grad,
    "allow_unused": functools.partial(by_grad, allow_unused=True),
    "is_grads_batched": by_batched_grad,
    "hessian": by_hessian,
    "vectorized hessian": functools.partial(by_hessian, vectorize=True),
    "vhp": lambda f, x, v: torch.autograd.functional.vhp(f, x, v)[1],
    "hvp": lambda f, x, v: torch.autograd.functional.hvp(f, x, v)[1],
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", NAMES)
def test_every_entry_gives_the_second_derivative(name, entry):
    x = _one_input(name)[1].detach()
    v = torch.randn_like(x)
    want = torch.func.jvp(torch.func.grad(loss(name)), (x,), (v,))[1]  # plain torch all the way
    got = ENTRIES[entry](loss(name), x, v)
    torch.testing.assert_close(got.reshape(x.shape), want)
    assert want.abs().max() > 0


def test_no_path_is_counted_twice():
    """The gate weights are a function of x: x's gradient must hold that path once, and so must its derivative."""
    experts = moe_inputs(T, H, INTERMEDIATE, E, K, S, dtype=torch.float64)
    router = floats(E, H, **WIDE)

    def penalty(package, x, moe_ffn):
        routing = package.route(x @ router.T, top_k=K)
        parameters = {n: v for n, v in experts.items() if n.endswith(("up", "down", "bias"))}
        out = moe_ffn(x, *routing[:3], **parameters)
        (gradient,) = torch.autograd.grad(out.square().sum() + routing.mean_z, x, create_graph=True)
        return gradient.square().sum()

    leaves = [experts["x"], router, experts["routed_up"], experts["shared_down_bias"]]
    got = penalty(ops, experts["x"], ops.moe_ffn)
    want = penalty(reference, experts["x"], composed_reference.moe_ffn)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_one_tensor_as_two_arguments():
    x = floats(T, H, **WIDE)
    proj = floats(1, 3, H, **WIDE)
    offsets = torch.tensor([0, T], dtype=torch.int32)

    def penalty(package):
        out = package.expert_gemm(x, x, proj, proj, offsets, T)
        gradient = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), (x, proj))

    for a, b in zip(penalty(ops), penalty(reference), strict=True):
        torch.testing.assert_close(a, b)


def test_batched_gradients_of_the_first_order(backend):
    """`is_grads_batched` alone and vmap over backward: no operator's backward falls to a loop that knows no lists."""
    for name in NAMES:
        function, x = _one_input(name)
        out = function(x.requires_grad_())
        batch = torch.randn(3, *out.shape, dtype=out.dtype)
        want = torch.stack([torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in batch])
        got = torch.autograd.grad(out, x, batch, is_grads_batched=True, retain_graph=True)[0]
        torch.testing.assert_close(got, want)
        vmapped = torch.func.vmap(lambda g, x=x, out=out: torch.autograd.grad(out, x, g, retain_graph=True)[0])(batch)
        torch.testing.assert_close(vmapped, want)
        x.requires_grad_(False)


def test_an_input_without_influence_has_a_zero_gradient():
    """No shared expert, and only the shared rows learn: nothing to differentiate, and no error either."""
    x = floats(T, H, **WIDE)
    offsets = torch.tensor([0, T], dtype=torch.int32)
    out = ops.expert_gemm(
        x, floats(T, H, dtype=torch.float64), x.new_empty(0, 3, H), floats(1, 3, H).double(), offsets, T
    )
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_through_checkpointing_and_inside_autocast():
    """Saved tensors are read once, as checkpointing demands; autocast around the recorded backward changes nothing."""
    arguments = moe_inputs(T, H, INTERMEDIATE, E, K, S)
    x = arguments.pop("x")
    leaves = [x, arguments["routed_up"], arguments["routed_weights"]]

    def penalty(layer, autocast=False):
        out = layer(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves)

    def plain(x):
        return ops.moe_ffn(x=x.sin(), **arguments)

    want = penalty(plain)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, plain, use_reentrant=False)
    for got in (penalty(checkpointed), penalty(plain, autocast=True)):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_gradients_to_be_differentiated_keep_to_the_kernels():
    """What `create_graph=True` costs in accuracy: nothing beyond the order of sums."""
    arguments = moe_inputs(33, 16, 12, 5, 2, 1)
    leaves = [v for v in arguments.values() if v.requires_grad]
    out = ops.moe_ffn(**arguments).square().sum()
    pairs = (torch.autograd.grad(out, leaves, retain_graph=True), torch.autograd.grad(out, leaves, create_graph=True))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-4)
        assert b.requires_grad
