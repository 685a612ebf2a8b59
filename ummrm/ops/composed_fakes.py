"""The fakes of the composed operators `moe_ffn`, `merge_ffn` and `merged_ffn`: as `fakes.py`, for all that takes
experts whole.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .fakes import check_result, fake
from .reference import accumulator
from .symbolic_checks import Checker, Size

_PARAMETERS = ("shared_up", "routed_up", "shared_down", "routed_down")


def _check_experts(check: Checker, experts, glu: bool, hidden, like, like_name: str, dtype, remedy: str, paired: bool):
    """Of the eight parameters, beside `like`, each pair of biases given together if `paired`; (S, E, 2I or I)."""
    shared_up, routed_up = experts[:2]
    fit = "the experts must take rows of x's width"
    check.shape("routed_up", routed_up, (None, None, hidden), "[E, 2*I or I, H]", fit)
    num_experts, pre_width, hidden = routed_up.shape

    def even() -> None:
        expected = "have an even number of rows with glu=True (gate | up)"
        remedy = "concatenate gate and up, or pass glu=False"
        check.value(not glu or pre_width % 2 == 0, "routed_up", expected, pre_width, remedy)

    def alike() -> None:
        remedy = "shared and routed experts share a shape"
        check.shape("shared_up", shared_up, (None, pre_width, hidden), "[S, 2*I or I, H]", remedy)

    for step in (even, alike) if paired else (alike, even):
        step()
    num_shared, width = shared_up.shape[0], pre_width // 2 if glu else pre_width
    check.count("shared_up.shape[0]", num_shared, 0)
    up_words, down_words = ("width", "width") if paired else ("2*I or I", "H")
    fit = "up is [n, 2*I, H] with glu=True (gate rows first) and [n, I, H] without, down [n, H, I]"
    for i, (size, words) in enumerate(
        (
            ((pre_width, hidden), "2*I or I, H"),
            ((hidden, width), "H, I"),
            ((pre_width,), up_words),
            ((hidden,), down_words),
        )
    ):
        names = _PARAMETERS[2 * i : 2 * i + 2] if i < 2 else [f"{n}_bias" for n in _PARAMETERS[2 * i - 4 : 2 * i - 2]]
        pair = experts[2 * i : 2 * i + 2]
        given = [t is not None for t in pair]
        expected, came = "both be given or both be None", "only one"
        one = "pass the other, zeros if it has none"
        check.value(not paired or given[0] == given[1], "` and `".join(names), expected, came, one)
        for name, tensor, letter, count in zip(names, pair, "SE", (num_shared, num_experts), strict=True):
            if tensor is not None:
                check.device(name, tensor, like, like_name)
                check.dtype(name, tensor, dtype, remedy)
                check.shape(name, tensor, (count, *size), f"[{letter}, {words}]", fit)
    return num_shared, num_experts, pre_width


def _check_x(check: Checker, x, activation: str) -> None:
    check.shape("x", x, (None, None), "[T, H]", "flatten batch and sequence into tokens first")
    check.floating("x", x)
    check.activation("activation", activation)


def _check_moe(check: Checker, x, shared_weight, routed_weights, indices, *rest) -> tuple[Size, Size, Size]:
    *experts, activation, glu = rest
    _check_x(check, x, activation)
    (tokens, hidden), source = x.shape, "take it from ummrm.ops.route"
    check.shape("expert_indices", indices, (tokens, None), "[T, K]", source)
    check.dtype("expert_indices", indices, torch.int32, source)
    check.device("expert_indices", indices, x, "x")
    top_k = indices.shape[1]
    check.count("expert_indices.shape[1]", top_k, 1)
    check.slots("x", tokens, top_k)
    remedy = "give input and experts one dtype, or run under torch.autocast"
    sizes = _check_experts(check, experts, glu, hidden, x, "x", x.dtype, remedy, paired=False)
    remedies, acc = (source, "gate weights stay in fp32 (fp64 for fp64 input)"), accumulator(x)
    check.beside("shared_weight", shared_weight, x, "x", (tokens,), "[T]", acc, remedies)
    check.beside("routed_weights", routed_weights, x, "x", (tokens, top_k), "[T, K]", acc, remedies)
    return sizes


@fake
def _moe_ffn(x, *rest):
    _check_moe(Checker("moe_ffn"), x, *rest)
    return x.new_empty(x.shape)


@fake
def _moe_ffn_forward(x, shared_weight, routed_weights, expert_indices, *rest):
    sizes = _check_moe(Checker("moe_ffn"), x, shared_weight, routed_weights, expert_indices, *rest)
    (num_shared, num_experts, width), slots = sizes, expert_indices.numel()
    index = functools.partial(x.new_empty, dtype=torch.int32)
    pre_activation = x.new_empty(num_shared * x.shape[0] + slots, width)
    return x.new_empty(x.shape), pre_activation, index(slots), index(slots), index(num_experts + 1)


def _grads(tensors, need) -> list[Tensor]:
    like = next(t for t in tensors if t is not None)
    return [
        t.new_empty(t.shape) if t is not None and n else like.new_empty(0) for t, n in zip(tensors, need, strict=True)
    ]


def _check_saved(check: Checker, forward: str, grad_out, x, pre_activation, rows, width, words: str) -> None:
    remedies = (f"pass the gradient of {forward}'s result",) * 2
    check.beside("grad_out", grad_out, x, "x", x.shape, "[T, H]", x.dtype, remedies)
    remedies = (f"pass what {forward}_forward returned",) * 2
    check.beside("pre_activation", pre_activation, x, "x", (rows, width), words, x.dtype, remedies)


@fake
def _moe_ffn_backward(*arguments):
    return _backward(Checker("moe_ffn_backward"), *arguments)


def _backward(check: Checker, grad_out, x, shared_weight, routed_weights, indices, *rest) -> list[Tensor]:
    *experts, pre_activation, slot_to_sorted, sorted_to_slot, offsets, activation, glu, need = rest
    sizes = _check_moe(check, x, shared_weight, routed_weights, indices, *experts, activation, glu)
    (num_shared, num_experts, width), slots = sizes, x.shape[0] * indices.shape[1]
    rows = num_shared * x.shape[0] + slots
    _check_saved(check, "moe_ffn", grad_out, x, pre_activation, rows, width, "[S*T + T*K, 2*I or I]")
    check.index("slot_to_sorted", slot_to_sorted, slots, "[T*K]", x, "x")
    check.index("sorted_to_slot", sorted_to_slot, slots, "[T*K]", x, "x")
    check.index("expert_offsets", offsets, num_experts + 1, "[E + 1]", x, "x")
    return _grads([x, shared_weight, routed_weights, *experts], need)


@fake
def _moe_ffn_backward_add(*arguments_and_sums):
    arguments, sums = arguments_and_sums[:-4], arguments_and_sums[-4:]
    check, x, need = Checker("moe_ffn_backward_add"), arguments[1], list(arguments[-1])
    grads = _backward(check, *arguments)
    for i, (parameter, name, total) in enumerate(zip(arguments[5:9], _PARAMETERS, sums, strict=True)):
        if total is not None:
            check.device(f"{name}_sum", total, x, "x")
            check_result(check, f"{name}_sum", total.dtype, x)
            words, remedy = "the projection's shape", "pass a buffer like the projection"
            check.shape(f"{name}_sum", total, parameter.shape, words, remedy)
            grads[3 + i] = grads[3 + i].new_empty(0) if need[3 + i] else grads[3 + i]
    return grads


def _check_merged(check: Checker, coefficients, experts, glu: bool, hidden, like, like_name: str) -> Size:
    """2I or I."""
    check.floating("routed_up", experts[1])
    dtype, remedy = experts[1].dtype, "give the experts' parameters one dtype"
    sizes = _check_experts(check, experts, glu, hidden, like, like_name, dtype, remedy, paired=True)
    num_shared, num_experts, pre_width = sizes
    remedies = (
        "one row for each of gate, up and down (up and down without glu), shared experts first",
        "coefficients stay in fp32 (fp64 for fp64 experts)",
    )
    shape, words = (3 if glu else 2, num_shared + num_experts), f"[{3 if glu else 2}, S + E]"
    acc = accumulator(experts[1])
    check.beside("coefficients", coefficients, like, like_name, shape, words, acc, remedies)
    return pre_width


def _check_merged_ffn(check: Checker, x, coefficients, *rest) -> Size:
    *experts, activation, glu = rest
    _check_x(check, x, activation)
    return _check_merged(check, coefficients, experts, glu, x.shape[1], x, "x")


@fake
def _merge_ffn(coefficients, *rest):
    *experts, glu = rest
    _check_merged(Checker("merge_ffn"), coefficients, experts, glu, None, coefficients, "coefficients")
    return [t.new_empty(t.shape[1:]) for t in experts[1::2] if t is not None]


@fake
def _merged_ffn(x, *rest):
    _check_merged_ffn(Checker("merged_ffn"), x, *rest)
    return x.new_empty(x.shape)


@fake
def _merged_ffn_forward(x, *rest):
    width = _check_merged_ffn(Checker("merged_ffn"), x, *rest)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], width)


@fake
def _merged_ffn_backward(grad_out, x, coefficients, *rest):
    *experts, pre_activation, activation, glu, need = rest
    check = Checker("merged_ffn_backward")
    width = _check_merged_ffn(check, x, coefficients, *experts, activation, glu)
    _check_saved(check, "merged_ffn", grad_out, x, pre_activation, x.shape[0], width, "[T, 2*I or I]")
    return _grads([x, coefficients, *experts], need)
