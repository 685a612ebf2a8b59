"""The fakes: meta tensors are refused like real ones, and symbolic sizes are checked without becoming numbers."""

import functools

import pytest
import torch
from op_inputs import expert_indices, expert_parameters, floats, gate_weights, moe_inputs, on_meta
from test_merged_ffn import in_order, merged_inputs

from ummrm import ops

raw = torch.ops.ummrm
T, H, INTERMEDIATE, E, K, S = 6, 4, 3, 3, 2, 2


@functools.cache
def good_arguments():
    """Name of every operator: arguments that it takes, in the schema's order."""
    torch.manual_seed(0)
    indices = expert_indices(T, E, K, "some_dead")
    to_sorted, to_slot, offsets = ops.sort_slots(indices, E)
    shared, routed = gate_weights(indices)
    logits, mask = floats(T, E), torch.rand(T) < 0.7
    routing = ops.route(logits, mask, logits, top_k=K)
    x, slots, rows, out = floats(T, H), floats(T * K, H), floats(S * T + T * K, H), floats(T, H)
    proj = floats(S, 5, H), floats(E, 5, H)
    wide = floats(T, 5), floats(T * K, 5)
    down, weights = (floats(S, H, 3), floats(E, H, 3)), torch.rand(S * T + T * K)
    lists = [floats(S, 3), floats(S, 2, 2)], [floats(E, 3), floats(E, 2, 2)]
    moe = tuple(moe_inputs(T, H, INTERMEDIATE, E, K, S, kind="some_dead", requires_grad=False).values())
    merged = in_order(merged_inputs(T, H, INTERMEDIATE, E, S, requires_grad=False))[:-2]
    kind = "silu", True
    saved = raw.moe_ffn_forward(*moe, *kind)[1:]
    return {
        "route": (logits, mask, logits, K, "fixed", 0.5),
        "route_backward": (*(routing[i] for i in (0, 1, 4, 5)), logits, mask, logits, *routing[2:4], "fixed", 0.5),
        "sort_slots": (indices, E),
        "permute": (x, to_slot, offsets, K),
        "unpermute": (rows, to_sorted, offsets, shared, routed, S, K),
        "unpermute_backward": (out, rows, to_sorted, offsets, shared, routed, S, K),
        "expert_gemm": (x, slots, *proj, offsets, T, floats(S, 5), floats(E, 5), False),
        "expert_gemm_wgrad": (*wide, x, slots, offsets, T, S, True, True, None),
        "expert_gemm_wgrad_add": (*wide, x, slots, offsets, T, S, *proj),
        "expert_bias_grad": (x, slots, torch.rand(S * T + T * K), offsets, T, S, True, True),
        "activation": (floats(T, 8), *kind),
        "activation_backward": (floats(T, 4), floats(T, 8), torch.rand(T), *kind),
        "expert_glu": (x, slots, floats(S, 6, H), floats(E, 6, H), offsets, T, floats(S, 6), floats(E, 6), "silu"),
        "expert_glu_backward": (x, slots, *down, offsets, T, floats(S * T + T * K, 2 * 3), weights, "silu"),
        "merge_experts": (*lists, torch.rand(2, S + E)),
        "merge_experts_dots": ([floats(3), floats(2, 2)], *lists),
        "merge_experts_grads": (floats(4, 3), torch.rand(2, S + E), S, True, True),
        "moe_ffn": (*moe, *kind),
        "moe_ffn_forward": (*moe, *kind),
        "moe_ffn_backward": (out, *moe, *saved, *kind, [True] * 11),
        "moe_ffn_backward_add": (out, *moe, *saved, *kind, [True] * 11, *(p.clone() for p in moe[4:8])),
        "merge_ffn": (*merged[1:], True),
        "merged_ffn": (*merged, *kind),
        "merged_ffn_forward": (*merged, *kind),
        "merged_ffn_backward": (out, *merged, floats(T, 2 * INTERMEDIATE), *kind, [True] * 10),
    }


def test_every_operator_is_here():
    assert {f"ummrm::{n}" for n in good_arguments()} == {
        n for n in torch._C._dispatch_get_all_op_names() if n.startswith("ummrm::")
    }


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool)
OTHERS = {bool: (), int: range(-2, 10), float: (-0.5, 0.0, 1.0, 1.5, float("nan")), str: ("gelu", "fixed", "swish", "")}


def other_values(value, optional):
    """Everything that stands for what a caller may get wrong about one argument: (what, the value)."""
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        yield "no list", []
        for i, tensor in enumerate(value):
            yield from ((f"[{i}] {what}", [*value[:i], v, *value[i + 1 :]]) for what, v in other_values(tensor, False))
    elif isinstance(value, torch.Tensor):
        yield from ((str(dtype), value.to(dtype)) for dtype in DTYPES)
        yield from ((f"unsqueezed {d}", value.unsqueeze(d)) for d in range(value.dim() + 1))
        for d in range(value.dim()):
            yield f"without dimension {d}", value.sum(d).to(value.dtype)
            yield f"one less in {d}", value.narrow(d, 0, value.shape[d] - 1)
            yield f"one more in {d}", torch.cat([value, value.narrow(d, 0, 1)], d)
        if optional:
            yield "none", None
    elif not isinstance(value, (list, type(None))):
        yield from ((repr(v), v) for v in OTHERS[type(value)])


def refusal(name, arguments):
    """(kind of error, how its message begins, up to what was wrong) or None where the operator takes the arguments."""
    try:
        getattr(raw, name)(*arguments)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return type(error), str(error).partition(" must ")[0]


@pytest.mark.parametrize("name", sorted(good_arguments()))
def test_meta_tensors_are_refused_like_real_ones(name):
    """Every argument of every operator spoilt in every way, one at a time: the same error, about the same argument."""
    arguments, own = good_arguments()[name], f"ummrm.{name.removesuffix('_forward')}:"
    different, refused = [], 0
    for i, argument in enumerate(getattr(raw, name).default._schema.arguments):
        for what, value in other_values(arguments[i], "Optional" in str(argument.type)):
            spoilt = [*arguments[:i], value, *arguments[i + 1 :]]
            real = refusal(name, spoilt)
            if real is not None and real[0] is IndexError:
                continue  # of an index's value, which a fake does not have
            fake = refusal(name, on_meta(spoilt))
            refused += fake is not None
            # what is refused by an operator within, or by torch, a fake refuses at the entrance
            if fake != real and (fake is None or real is None or real[1].startswith(own)):
                different.append((argument.name, what, real, fake))
    assert different == []
    assert refused > 5 or name == "sort_slots"


@pytest.mark.parametrize("name", sorted(good_arguments()))
def test_one_meta_tensor_among_others_is_refused(name):
    arguments = good_arguments()[name]
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    for i in tensors if len(tensors) > 1 else ():
        mixed = [*arguments[:i], on_meta(arguments[i]), *arguments[i + 1 :]]
        with pytest.raises(ValueError, match=rf"ummrm.{name.removesuffix('_forward')}: .*must be on the device of"):
            getattr(raw, name)(*mixed)


class Layer(torch.nn.Module):
    """Everything with a size that a batch decides, but for `expert_gemm`, whose number of tokens is no symbol."""

    def __init__(self):
        super().__init__()
        self.names = list(expert_parameters(H, INTERMEDIATE, E, S))
        for name, value in expert_parameters(H, INTERMEDIATE, E, S).items():
            self.register_parameter(name, torch.nn.Parameter(value.detach()))
        self.coefficients = torch.nn.Parameter(torch.rand(3, S + E))

    def forward(self, x, logits, mask):
        routing = ops.route(logits, mask, top_k=K)
        experts = {name: getattr(self, name) for name in self.names}
        out = ops.moe_ffn(x, *routing[:3], **experts) + ops.merged_ffn(x, self.coefficients, **experts)
        slot_to_sorted, sorted_to_slot, offsets = ops.sort_slots(routing.expert_indices, E)
        rows = ops.activation(ops.permute(x, sorted_to_slot, offsets, K), "gelu", False)
        out = out + ops.unpermute(rows, slot_to_sorted, offsets, None, routing.routed_weights, 0, K)
        return out, routing.mean_prob


def batch(tokens):
    return floats(tokens, H, requires_grad=True), floats(tokens, E, requires_grad=True), torch.rand(tokens) < 0.8


def test_dynamic_sizes_stay_dynamic(compiled):
    """One graph for every number of tokens, forward and backward: no check turns a size into a number."""
    layer = Layer()
    function = compiled(layer)
    for tokens in (7, 11, 300, 2):
        inputs = batch(tokens)
        for tensor in inputs if tokens == 7 else ():
            torch._dynamo.mark_dynamic(tensor, 0)  # an error if it becomes a number
        leaves, results = [*inputs[:2], *layer.parameters()], []
        for f in (function, layer):
            with torch.compiler.set_stance("default" if tokens == 7 else "fail_on_recompile"):
                out, mean_prob = f(*inputs)
            results.append([out, *torch.autograd.grad(out.square().sum() + mean_prob.max(), leaves)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_export_with_any_number_of_tokens():
    """No check bounds the dimension either."""
    layer, tokens = Layer().requires_grad_(False), torch.export.Dim("tokens", min=2)
    exported = torch.export.export(layer, tuple(t.detach() for t in batch(7)), dynamic_shapes=({0: tokens},) * 3)
    (bound,) = exported.range_constraints.values()
    assert bound.lower <= 2 and bound.upper > 2**60
    for count in (7, 11):
        inputs = batch(count)
        for a, b in zip(exported.module()(*inputs), layer(*inputs), strict=True):
            assert torch.equal(a, b)


def test_sizes_that_the_data_decide(compiled):
    """Live rows alone: a number of tokens that no one knows before the graph runs."""
    layer = Layer().requires_grad_(False)

    def packed(x, logits, mask):
        rows = mask.nonzero().squeeze(1)
        return layer(x[rows], logits[rows], mask[rows])[0]

    inputs = [t.detach() for t in batch(9)]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(compiled(packed)(*inputs), packed(*inputs))


def test_a_symbolic_size_that_cannot_fit_is_refused(compiled):
    """What is known to fail while tracing is an error then, in the operator's words."""
    layer = Layer()
    x, logits, mask = batch(8)
    with pytest.raises(Exception, match=r"ummrm.route: `mask` must have shape \[T\]"):
        compiled(layer, dynamic=True)(x, logits, torch.cat([mask, mask[:1]]))
    with pytest.raises(Exception, match=r"`top_k` must be between 1 and the number of experts .*, got 4"):
        compiled(lambda x: ops.route(x, top_k=4), dynamic=True)(logits)
