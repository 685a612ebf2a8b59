"""Random inputs for the operators' tests, and the checks that every operator must pass alike."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad

from ummrm import ops
from ummrm.ops import library


def floats(*shape, dtype=torch.float32, requires_grad=False, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_(requires_grad)


def expert_indices(num_tokens, num_experts, top_k, kind="random"):
    """int32 [T, K], distinct in each row. Kinds: random; first (experts 0..K-1 only); hole (none to expert 0 if K < E);
    some_dead and all_dead (rows of -1); any (of -1 and every expert, not distinct)."""
    if num_experts == 0:
        return torch.full((num_tokens, top_k), -1, dtype=torch.int32)
    if kind == "any":
        return torch.randint(-1, num_experts, (num_tokens, top_k), dtype=torch.int32)
    scores = torch.rand(num_tokens, num_experts)
    if kind == "first":
        scores = -torch.arange(num_experts, dtype=torch.float32).expand(num_tokens, -1)
    if kind == "hole":
        scores[:, 0] = -1
    indices = scores.argsort(-1, descending=True)[:, :top_k].to(torch.int32).contiguous()
    if kind == "some_dead":
        indices[torch.rand(num_tokens) < 0.4] = -1
    if kind == "all_dead":
        indices.fill_(-1)
    return indices


def gate_weights(indices, dtype=torch.float32, requires_grad=False):
    """shared_weight [T] and routed_weights [T, K] that sum to one; masked tokens as `route` gives them."""
    weights = torch.rand(indices.shape[0], indices.shape[1] + 1, dtype=torch.float64) + 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    dead = indices[:, 0] < 0
    weights[dead] = 0
    weights[dead, 0] = 1
    shared, routed = weights[:, 0].to(dtype).contiguous(), weights[:, 1:].to(dtype).contiguous()
    return shared.requires_grad_(requires_grad), routed.requires_grad_(requires_grad)


def gate_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def expert_parameters(h, i, e, s, glu=True, biases=True, dtype=torch.float32, requires_grad=True):
    """The eight parameter arguments of `moe_ffn` and `merged_ffn`; all experts distinct."""
    up = 2 * i if glu else i
    up_scale, down_scale = max(h, 1) ** -0.5, max(i, 1) ** -0.5
    make = {"dtype": dtype, "requires_grad": requires_grad}
    parameters = {
        "shared_up": floats(s, up, h, scale=up_scale, **make),
        "routed_up": floats(e, up, h, scale=up_scale, **make),
        "shared_down": floats(s, h, i, scale=down_scale, **make),
        "routed_down": floats(e, h, i, scale=down_scale, **make),
    }
    if biases:
        parameters |= {
            "shared_up_bias": floats(s, up, **make),
            "routed_up_bias": floats(e, up, **make),
            "shared_down_bias": floats(s, h, **make),
            "routed_down_bias": floats(e, h, **make),
        }
    return parameters


def moe_inputs(t, h, i, e, k, s, glu=True, biases=True, kind="random", dtype=torch.float32, requires_grad=True):
    """Every tensor argument of `moe_ffn`."""
    indices = expert_indices(t, e, k, kind)
    shared, routed = gate_weights(indices, gate_dtype(dtype), requires_grad)
    return {
        "x": floats(t, h, dtype=dtype, requires_grad=requires_grad),
        "shared_weight": shared,
        "routed_weights": routed,
        "expert_indices": indices,
        **expert_parameters(h, i, e, s, glu, biases, dtype, requires_grad),
    }


def strided(tensor):
    """The same values, every other column of a wider tensor: not contiguous in any dimension that matters."""
    wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    view = wide[..., ::2]
    view.copy_(tensor.detach())
    return view.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_deterministic(function):
    """Same input, same bits: twice in a row, and with one thread or two. `function` returns tensors."""
    with threads(2):
        results = [function(), function()]
    with threads(1):
        results.append(function())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def on_meta(value):
    """Tensors, also in lists, on the meta device; everything else as it is."""
    if isinstance(value, (list, tuple)):
        return [on_meta(v) for v in value]
    return value.detach().to("meta") if isinstance(value, torch.Tensor) else value


def recorded(value):
    """A tensor, or a list of them, as a leaf that requires a gradient, where it can."""
    if isinstance(value, list):
        return [recorded(v) for v in value]
    return value.detach().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value


def assert_refused(name, good, override, error, *arguments):
    """`ops.<name>` with `override` over good arguments raises `error`, naming an argument, expectation and value.

    Where two arguments disagree either may be named: give both. Refused alike, but for what is wrong in an index's
    value, are meta tensors, tensors that autograd records, and all of them under a transform.
    """
    op = getattr(ops, name)
    op(**good)
    with pytest.raises(error) as caught:
        op(**(good | override))
    messages = [str(caught.value)]
    if error is not IndexError:
        with pytest.raises(error) as caught:
            op(**{n: recorded(v) for n, v in (good | override).items()})
        messages.append(str(caught.value))
    if error is not IndexError and name != "sort_slots":
        with forward_ad.dual_level(), pytest.raises(error) as caught:
            op(**(good | override))
        messages.append(str(caught.value))
    if error is not IndexError and not any(getattr(v, "is_meta", False) for v in override.values()):
        op(**{n: on_meta(v) for n, v in good.items()})
        with pytest.raises(error) as caught:
            op(**{n: on_meta(v) for n, v in (good | override).items()})
        messages.append(str(caught.value))
    for message in messages:
        _assert_helpful(message, arguments)


def _assert_helpful(message, arguments):
    assert any(f"`{argument}`" in message for argument in arguments), message
    assert message.startswith("ummrm.") and "must" in message and "got" in message and "; " in message, message


@contextlib.contextmanager
def composed_on_the_cpu():
    """`moe_ffn` of CPU tensors in fp32 as the operators that it is made of, as it is everywhere else."""
    library.use_host_layer(False)
    try:
        yield
    finally:
        library.use_host_layer(True)
