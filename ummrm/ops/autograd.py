"""Autograd of the operators: one autograd node each, on the Autograd key.

The key is registered directly because `torch.library.register_autograd` fails under `torch.func.grad` and is silently
wrong under jvp. Where a `torch.func` transform or forward-mode AD is active, the plain-torch reference serves instead.
Nodes save what their kernels need and compute only the gradients that are needed; without recording nothing is saved.
A gradient that is itself recorded is the reference's, so that it can be differentiated again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import composed_reference, grad_sums, reference
from .fakes import FAKES
from .reference import accumulator

ops = torch.ops.ummrm


def _own(argument: Any, needed: bool) -> Any:
    if isinstance(argument, Tensor) and argument.requires_grad:
        return argument.view_as(argument)
    if needed:  # frozen since the forward, as a critic is for a penalty: the gradient is not one of it
        return argument.detach().requires_grad_()
    return argument


def _by_reference(function: Callable, args: Sequence, grads: Sequence, need: Sequence[bool]) -> tuple:
    """The gradients of `function(*args)`, plain torch, where `need` says so: differentiable again if recording is on.

    Each argument becomes a view of its own: a gradient then does not run on through what one argument owes to another
    (x to the gate weights that a router made of it), and neither does it mix two arguments that are one tensor.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        args = [_own(a, n) for a, n in zip(args, need, strict=True)]
        out = function(*args)
        all_pairs = zip(out if isinstance(out, (list, tuple)) else (out,), grads, strict=True)
        pairs = [(o, g) for o, g in all_pairs if o.requires_grad]  # none, where the only expert that learns has no rows
        inputs = [a for a, n in zip(args, need, strict=True) if n]
        found: Sequence[Tensor] = [torch.zeros_like(a) for a in inputs]
        if pairs:
            outputs, grads = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, inputs, grads, create_graph=again, allow_unused=True, materialize_grads=True
            )
    left = iter(found)
    return tuple(next(left) if n else None for n in need)


def _batched(grads: Sequence) -> bool:
    """Whether `is_grads_batched` or vmap has put a batch into the gradients: their fallback knows no tensor lists."""
    return _transforming() or any(
        isinstance(g, Tensor) and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads
    )


def _backward_of(reference_of: Callable):
    """Decorates a Function's backward, which calls kernels: they run without autocast, and are not differentiable.

    Where a gradient is to be differentiated again (`create_graph=True`: recording is on in backward) or is batched, it
    is plain torch's instead: `reference_of(saved tensors, settings)` is the forward and its arguments. That makes it a
    function of the inputs and of the incoming gradient, and no path of the second derivative is lost.
    """

    def decorate(function):
        @functools.wraps(function)
        def backward(ctx: Any, *grads):
            # Autocast may be on where the user calls backward(), and the forward has settled the dtypes.
            with torch._C._DisableAutocast():
                if torch.is_grad_enabled() or _batched(grads):
                    plain, args = reference_of(ctx.saved_tensors, ctx.settings)
                    return _by_reference(plain, args, grads, ctx.needs_input_grad)
                return function(ctx, *grads)

        return staticmethod(backward)

    return decorate


def _recording(*args: Any) -> bool:
    """Whether autograd will want a node: some tensor among `args`, or in a list among them, requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    tensors = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)))
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _transforming() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _below(op: Any, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _needed(grads: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor | None]:
    return [g if n else None for g, n in zip(grads, need, strict=True)]


class _Route(Function):
    @staticmethod
    def forward(ctx: Any, logits, mask, clean_logits, top_k, gate, fixed_shared_weight):
        out = _below(ops.route, logits, mask, clean_logits, top_k, gate, fixed_shared_weight)
        expert_indices, tokens_per_expert = out[2:4]
        ctx.mark_non_differentiable(expert_indices, tokens_per_expert)
        ctx.save_for_backward(logits, mask, clean_logits, expert_indices, tokens_per_expert)
        ctx.settings = top_k, gate, fixed_shared_weight
        return tuple(out)

    @_backward_of(lambda saved, settings: (composite_route, (*saved[:3], *settings)))
    def backward(ctx: Any, grad_shared, grad_routed, _indices, _counts, grad_prob, grad_z):
        grads = [g.contiguous() for g in (grad_shared, grad_routed, grad_prob, grad_z)]
        logits, clean = ops.route_backward(*grads, *ctx.saved_tensors, *ctx.settings[1:])
        need = ctx.needs_input_grad
        return logits if need[0] else None, None, clean if need[2] else None, None, None, None


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x, sorted_to_slot, expert_offsets, top_k):
        ctx.save_for_backward(sorted_to_slot, expert_offsets)
        ctx.top_k = top_k
        return _below(ops.permute, x, sorted_to_slot, expert_offsets, top_k)

    @staticmethod
    def backward(ctx: Any, grad):  # made of an operator that is differentiable itself, and needs no autocast
        sorted_to_slot, expert_offsets = ctx.saved_tensors
        rows = torch.arange(sorted_to_slot.numel(), dtype=torch.int32, device=grad.device)
        slot_to_sorted = torch.empty_like(rows).scatter_(0, sorted_to_slot.long(), rows)
        grad_x = ops.unpermute(grad.contiguous(), slot_to_sorted, expert_offsets, None, None, 0, ctx.top_k)
        return grad_x, None, None, None


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights, *sizes):
        ctx.save_for_backward(rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights)
        ctx.settings = sizes
        return _below(ops.unpermute, rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights, *sizes)

    @_backward_of(lambda saved, settings: (reference.unpermute, (*saved, *settings)))
    def backward(ctx: Any, grad):
        rows, shared, routed = ops.unpermute_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
        need = ctx.needs_input_grad
        return *_needed([rows], need[:1]), None, None, *_needed([shared, routed], need[3:5]), None, None


class _ExpertGemm(Function):
    @staticmethod
    def forward(ctx: Any, shared_rows, routed_rows, shared_proj, routed_proj, offsets, num_tokens, sb, rb, transpose):
        ctx.save_for_backward(shared_rows, routed_rows, shared_proj, routed_proj, offsets, sb, rb)
        ctx.leaves = grad_sums.leaves_of(shared_proj, routed_proj)
        ctx.settings = num_tokens, transpose
        args = (shared_rows, routed_rows, shared_proj, routed_proj, offsets, num_tokens, sb, rb, transpose)
        return _below(ops.expert_gemm, *args)

    @_backward_of(lambda saved, settings: (reference.expert_gemm, (*saved[:5], settings[0], *saved[5:], settings[1])))
    def backward(ctx: Any, grad):
        shared_rows, routed_rows, shared_proj, routed_proj, offsets = ctx.saved_tensors[:5]
        (num_tokens, transpose), need = ctx.settings, ctx.needs_input_grad
        num_shared = shared_proj.shape[0]
        grads = grad.contiguous().tensor_split([num_shared * num_tokens])
        out: list[Tensor | None] = [None] * 9
        if need[0] or need[1]:
            rows = ops.expert_gemm(*grads, shared_proj, routed_proj, offsets, num_tokens, None, None, not transpose)
            shared, out[1] = rows.tensor_split([num_shared * num_tokens])
            if shared.shape[0] != shared_rows.shape[0]:  # every shared expert read the same rows
                shared = shared.view(num_shared, *shared_rows.shape).sum(0, dtype=accumulator(rows)).to(rows.dtype)
            out[0] = shared
        if need[2] or need[3]:
            inputs = (shared_rows, routed_rows)
            pair = (*inputs, *grads) if transpose else (*grads, *inputs)
            sizes, totals = (offsets, num_tokens, num_shared), grad_sums.totals_of(ctx.leaves, need[2:4])
            for i, total in enumerate(totals):
                if total is not None:
                    ops.expert_gemm_wgrad_add(*pair, *sizes, *(total if i == j else None for j in range(2)))
            left = [n and total is None for n, total in zip(need[2:4], totals, strict=True)]
            if any(left):
                out[2:4] = _needed(ops.expert_gemm_wgrad(*pair, *sizes, *left), left)
        if need[6] or need[7]:
            out[6:8] = ops.expert_bias_grad(*grads, None, offsets, num_tokens, num_shared, need[6], need[7])
        return (*_needed(out, need),)


class _Activation(Function):
    @staticmethod
    def forward(ctx: Any, pre_activation, kind, glu):
        ctx.save_for_backward(pre_activation)
        ctx.settings = kind, glu
        return _below(ops.activation, pre_activation, kind, glu)

    @_backward_of(lambda saved, settings: (reference.activation, (*saved, *settings)))
    def backward(ctx: Any, grad):
        (pre_activation,) = ctx.saved_tensors
        return ops.activation_backward(grad.contiguous(), pre_activation, None, *ctx.settings)[0], None, None


class _MergeExperts(Function):
    @staticmethod
    def forward(ctx: Any, coefficients, n, *tensors):
        ctx.save_for_backward(coefficients, *tensors)
        ctx.settings = n
        return tuple(_below(ops.merge_experts, list(tensors[:n]), list(tensors[n:]), coefficients))

    @_backward_of(lambda saved, n: (_merge_experts_flat, (saved[0], n, *saved[1:])))
    def backward(ctx: Any, *grads):
        coefficients, *tensors = ctx.saved_tensors
        n, need = ctx.settings, ctx.needs_input_grad
        shared, routed, of_merged = tensors[:n], tensors[n:], [g.contiguous() for g in grads]
        dots = ops.merge_experts_dots(of_merged, shared, routed) if need[0] else None
        of_experts: list[Tensor | None] = [None] * (2 * n)
        for i in range(n):
            needs = need[2 + i], need[2 + n + i]
            if any(needs):
                of_part = of_merged[i].reshape(1, -1), coefficients[i : i + 1], shared[i].shape[0]
                both = ops.merge_experts_grads(*of_part, *needs)
                for at, wanted, tensor in zip((i, n + i), needs, both, strict=True):
                    of_experts[at] = tensor.view(tensors[at].shape) if wanted else None
        return dots, None, *of_experts


class _MoeFfn(Function):
    @staticmethod
    def forward(ctx: Any, *args):
        *tensors, activation, glu = args
        out, *saved = _below(ops.moe_ffn_forward, *args)
        ctx.save_for_backward(*tensors, *saved)
        ctx.leaves = grad_sums.leaves_of(*tensors[4:8])
        ctx.settings = activation, glu
        return out

    @_backward_of(lambda saved, settings: (composed_reference.moe_ffn, (*saved[:12], *settings)))
    def backward(ctx: Any, grad):
        need = [n for i, n in enumerate(ctx.needs_input_grad[:12]) if i != 3]  # expert_indices has no gradient
        totals, args = grad_sums.totals_of(ctx.leaves, need[3:7]), (*ctx.saved_tensors, *ctx.settings, need)
        if all(total is None for total in totals):
            grads = _needed(ops.moe_ffn_backward(grad.contiguous(), *args), need)
        else:
            left = [*need[:3], *(n and t is None for n, t in zip(need[3:7], totals, strict=True)), *need[7:]]
            grads = _needed(ops.moe_ffn_backward_add(grad.contiguous(), *args, *totals), left)
        return *grads[:3], None, *grads[3:], None, None


class _MergedFfn(Function):
    @staticmethod
    def forward(ctx: Any, *args):
        *tensors, activation, glu = args
        out, pre_activation = _below(ops.merged_ffn_forward, *args)
        ctx.save_for_backward(*tensors, pre_activation)
        ctx.settings = activation, glu
        return out

    @_backward_of(lambda saved, settings: (composed_reference.merged_ffn, (*saved[:10], *settings)))
    def backward(ctx: Any, grad):
        need = list(ctx.needs_input_grad[:10])
        return (
            *_needed(ops.merged_ffn_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings, need), need),
            None,
            None,
        )


def _recorded_merge_ffn(_, coefficients, *experts_and_glu):
    """Made of merge_experts, whose node it records: with the bits of the operator, which is made of it too."""
    FAKES["merge_ffn"](coefficients, *experts_and_glu)  # for its checks
    return composed_reference.merge_ffn_by(ops.merge_experts, coefficients, experts_and_glu[:-1])


def _register(
    library: torch.library.Library,
    name: str,
    function: type[Function],
    composite,
    apply=lambda function, *args: function.apply(*args),
) -> None:
    """Puts `name` on the Autograd key: `composite` under a transform, `function` when recording, else the kernel alone.

    vmap meets an operator before autograd does, and its own fallback knows no tensor lists: it gets `composite` too.
    Kernels check their arguments; before a composite the operator's fake does.
    """
    op = getattr(ops, name)

    def composed(*args):
        FAKES[name](*args)
        return composite(*args)

    def kernel(*args):
        if _transforming():
            return composed(*args)
        if _recording(*args):
            return apply(function, *args)
        return _below(op, *args)

    library.impl(name, kernel, "Autograd")
    library.impl(name, composed, "FuncTorchBatched")


def composite_route(logits, mask, clean_logits, top_k, gate, fixed_shared_weight):
    """`reference.route` with the schema's arguments and results."""
    settings = {"top_k": top_k, "gate": gate, "fixed_shared_weight": fixed_shared_weight}
    return tuple(reference.route(logits, mask, clean_logits, **settings))


def _merge_experts_flat(coefficients, n, *tensors):
    return reference.merge_experts(list(tensors[:n]), list(tensors[n:]), coefficients)


def _apply_merge_experts(function, shared, routed, coefficients):
    return list(function.apply(coefficients, len(routed), *shared, *routed))


def _apply_expert_gemm(function, *args):
    return function.apply(*args, *(None, None, False)[len(args) - 6 :])  # the dispatcher drops trailing defaults


def register(library: torch.library.Library) -> None:
    """Registers every differentiable operator's autograd in `library`."""
    _register(library, "route", _Route, composite_route)
    _register(library, "permute", _Permute, reference.permute)
    _register(library, "unpermute", _Unpermute, reference.unpermute)
    _register(library, "expert_gemm", _ExpertGemm, reference.expert_gemm, _apply_expert_gemm)
    _register(library, "activation", _Activation, reference.activation)
    _register(library, "merge_experts", _MergeExperts, reference.merge_experts, _apply_merge_experts)
    _register(library, "merge_ffn", _MergeExperts, composed_reference.merge_ffn, _recorded_merge_ffn)
    _register(library, "moe_ffn", _MoeFfn, composed_reference.moe_ffn)
    _register(library, "merged_ffn", _MergedFfn, composed_reference.merged_ffn)
