"""Each operator's fake: its argument checks and its results' shapes, for meta tensors, torch.compile and export.

The checks are csrc's, in the same order and words, as far as they need no values: index values are the kernels' to
check. The composed operators' fakes are in `composed_fakes.py`; autograd is `autograd.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import accumulator
from .symbolic_checks import BELOW, GATES, Checker, Size, name_of

FAKES: dict[str, Callable] = {}


def fake(function: Callable) -> Callable:
    """Decorates the fake `_<op>` of operator `op`."""
    FAKES[function.__name__[1:]] = function
    return function


def register(library: torch.library.Library) -> None:
    """Registers every fake in `library`, which other modules have added to those below."""
    for op, function in FAKES.items():
        torch.library.register_fake(f"ummrm::{op}", function, lib=library)


def _check_logits(check: Checker, logits, mask, clean_logits, top_k, gate: str, fixed_shared_weight: float) -> None:
    check.shape("logits", logits, (None, None), "[T, E]", "flatten batch and sequence into tokens first")
    check.floating("logits", logits)
    tokens, experts = logits.shape
    expected, remedy = f"be between 1 and the number of experts ({experts})", "choose fewer experts per token"
    check.value(top_k >= 1, "top_k", expected, top_k, remedy)
    check.value(top_k <= experts, "top_k", expected, top_k, remedy)
    check.slots("logits", tokens, top_k)
    if mask is not None:
        remedies = "give one entry a token", "pass mask=mask.bool()"
        check.beside("mask", mask, logits, "logits", (tokens,), "[T]", torch.bool, remedies)
    if clean_logits is not None:
        remedies = "give it the shape of `logits`", "give it the dtype of `logits`"
        shape = tokens, experts
        check.beside("clean_logits", clean_logits, logits, "logits", shape, "[T, E]", logits.dtype, remedies)
    check.choice("gate", gate, GATES)
    good, remedy = gate != "fixed" or 0 <= fixed_shared_weight <= 1, "it is the shared experts' share of the output"
    check.value(good, "fixed_shared_weight", "lie in [0, 1]", f"{fixed_shared_weight:g}", remedy)


@fake
def _route(logits, mask, clean_logits, top_k, gate, fixed_shared_weight):
    _check_logits(Checker("route"), logits, mask, clean_logits, top_k, gate, fixed_shared_weight)
    tokens, experts = logits.shape
    acc = accumulator(logits)
    return (
        logits.new_empty(tokens, dtype=acc),
        logits.new_empty((tokens, top_k), dtype=acc),
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty(experts, dtype=torch.int32),
        logits.new_empty(experts, dtype=acc),
        logits.new_empty((), dtype=acc),
    )


@fake
def _route_backward(grad_sw, grad_rw, grad_prob, grad_z, logits, mask, clean, indices, counts, gate, fixed):
    check, of_result = Checker("route_backward"), "pass what route returned"
    check.shape("logits", logits, (None, None), "[T, E]", "flatten batch and sequence into tokens first")
    (tokens, experts), acc = logits.shape, accumulator(logits)
    check.shape("expert_indices", indices, (tokens, None), "[T, K]", of_result)
    top_k = indices.shape[1]
    _check_logits(check, logits, mask, clean, top_k, gate, fixed)
    of_grad = "pass the gradient of what route returned"
    for name, tensor, shape, words, dtype, remedy in (
        ("grad_shared_weight", grad_sw, (tokens,), "[T]", acc, of_grad),
        ("grad_routed_weights", grad_rw, (tokens, top_k), "[T, K]", acc, of_grad),
        ("grad_mean_prob", grad_prob, (experts,), "[E]", acc, of_grad),
        ("grad_mean_z", grad_z, (), "[]", acc, of_grad),
        ("expert_indices", indices, (tokens, top_k), "[T, K]", torch.int32, of_result),
        ("tokens_per_expert", counts, (experts,), "[E]", torch.int32, of_result),
    ):
        check.beside(name, tensor, logits, "logits", shape, words, dtype, (remedy, remedy))
    return logits.new_empty(logits.shape), logits.new_empty(0) if clean is None else clean.new_empty(clean.shape)


@fake
def _sort_slots(expert_indices, num_experts):
    check, slots = Checker("sort_slots"), expert_indices.numel()
    check.count("num_experts", num_experts, 0)
    check.dtype("expert_indices", expert_indices, torch.int32, "take it from ummrm.ops.route")
    few = not isinstance(slots, int) or slots < BELOW
    check.value(few, "expert_indices", "have fewer than 2^31 entries", slots, "split the batch")
    return tuple(expert_indices.new_empty(n, dtype=torch.int32) for n in (slots, slots, num_experts + 1))


@fake
def _permute(x, sorted_to_slot, expert_offsets, top_k):
    check = Checker("permute")
    check.floating("x", x)
    check.shape("x", x, (None, None), "[T, H]", "flatten batch and sequence into tokens first")
    check.slots("x", x.shape[0], top_k)
    check.index("sorted_to_slot", sorted_to_slot, x.shape[0] * top_k, "[T*K]", x, "x")
    check.offsets(expert_offsets, x, "x")
    return x.new_empty(sorted_to_slot.shape[0], x.shape[1])


def _check_unpermute(check: Checker, rows, slot_to_sorted, offsets, shared, routed, num_shared, top_k) -> Size:
    """The number of tokens."""
    check.floating("rows", rows)
    check.count("top_k", top_k, 1)
    check.count("num_shared_experts", num_shared, 0)
    check.index("slot_to_sorted", slot_to_sorted, None, "[T*K]", rows, "rows")
    slots = slot_to_sorted.shape[0]
    check.count("slot_to_sorted.numel()", slots, 0)
    expected = f"have T * top_k entries, a multiple of {top_k}"
    check.value(slots % top_k == 0, "slot_to_sorted", expected, slots, "pass the top_k that route used")
    tokens, remedy = slots // top_k, "put the shared experts' rows before the sorted rows"
    check.shape("rows", rows, (num_shared * tokens + slots, None), "[S*T + T*K, H]", remedy)
    from_route = "take it from ummrm.ops.route"
    check.row_weights("shared_weight", shared, rows, "rows", (tokens,), "[T]", from_route)
    check.row_weights("routed_weights", routed, rows, "rows", (tokens, top_k), "[T, K]", from_route)
    check.offsets(offsets, rows, "rows")
    return tokens


@fake
def _unpermute(rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights, num_shared_experts, top_k):
    arguments = rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights, num_shared_experts, top_k
    return rows.new_empty(_check_unpermute(Checker("unpermute"), *arguments), rows.shape[1])


@fake
def _unpermute_backward(grad_out, rows, slot_to_sorted, expert_offsets, sw, rw, num_shared_experts, top_k):
    check = Checker("unpermute_backward")
    tokens = _check_unpermute(check, rows, slot_to_sorted, expert_offsets, sw, rw, num_shared_experts, top_k)
    remedies, shape = ("pass the gradient of unpermute's result",) * 2, (tokens, rows.shape[1])
    check.beside("grad_out", grad_out, rows, "rows", shape, "[T, H]", rows.dtype, remedies)
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(0 if sw is None else sw.shape, dtype=accumulator(rows)),
        rows.new_empty(0 if rw is None else rw.shape, dtype=accumulator(rows)),
    )


def _check_rows(check: Checker, prefix: str, shared, routed, num_tokens, num_shared, slots, width=None) -> None:
    routed_name, shared_name = f"{prefix}routed_rows", f"{prefix}shared_rows"
    check.floating(routed_name, routed)
    check.shape(routed_name, routed, (slots, width), "[T*K, width]", "pass the rows that permute returned")
    check.device(shared_name, shared, routed, routed_name)
    check.dtype(shared_name, shared, routed.dtype, "rows and projections share a dtype")
    repeated = shared.dim() == 2 and shared.shape[0] == num_shared * num_tokens  # `num_tokens` is a number by schema
    shape = num_shared * num_tokens if repeated else num_tokens, routed.shape[1]
    words, remedy = "[T, width] or [S*T, width]", "pass one row a token, or one a token and shared expert"
    check.shape(shared_name, shared, shape, words, remedy)


def _slots_of(routed: Tensor) -> Size | None:
    return routed.shape[0] if routed.dim() == 2 else None


@fake
def _expert_gemm(*arguments):
    return _product(Checker("expert_gemm"), *arguments)


def _product(
    check: Checker,
    shared_rows,
    routed_rows,
    shared_proj,
    routed_proj,
    offsets,
    num_tokens,
    sb=None,
    rb=None,
    transpose=False,
) -> Tensor:
    check.shape("shared_proj", shared_proj, (None,) * 3, "[S, N, D]", "stack the experts' projections")
    num_shared, n, d = shared_proj.shape
    width, out_width = (n, d) if transpose else (d, n)
    check.count("num_tokens", num_tokens, 0)
    check.count("shared_proj.shape[0]", num_shared, 0)
    _check_rows(check, "", shared_rows, routed_rows, num_tokens, num_shared, _slots_of(routed_rows), width)
    check.offsets(offsets, routed_rows, "routed_rows")
    experts = offsets.shape[0] - 1
    for name, tensor, shape, words in (
        ("shared_proj", shared_proj, (None,) * 3, "[S, N, D]"),
        ("routed_proj", routed_proj, (experts, n, d), "[E, N, D]"),
        ("shared_bias", sb, (num_shared, out_width), "[S, N]"),
        ("routed_bias", rb, (experts, out_width), "[E, N]"),
    ):
        if tensor is not None:
            check.device(name, tensor, routed_rows, "routed_rows")
            check.dtype(name, tensor, routed_rows.dtype, "rows and projections share a dtype")
            check.shape(name, tensor, shape, words, "the experts' parameters must fit the rows")
    name, remedy = "shared_bias" if sb is not None else "routed_bias", "an input gradient has no bias"
    check.value(not transpose or sb is rb is None, name, "be None with transpose=True", "a tensor", remedy)
    return routed_rows.new_empty(num_shared * num_tokens + routed_rows.shape[0], out_width)


def _check_wgrad(check: Checker, grad_s, grad_r, rows_s, rows_r, offsets, num_tokens, num_shared) -> None:
    slots = _slots_of(rows_r)
    check.count("num_tokens", num_tokens, 0)
    check.count("num_shared_experts", num_shared, 0)
    _check_rows(check, "", rows_s, rows_r, num_tokens, num_shared, slots)
    _check_rows(check, "grad_", grad_s, grad_r, num_tokens, num_shared, slots)
    check.dtype("grad_routed_rows", grad_r, rows_r.dtype, "rows and their gradients share a dtype")
    check.device("grad_routed_rows", grad_r, rows_r, "routed_rows")
    check.offsets(offsets, rows_r, "routed_rows")


def check_result(check: Checker, name: str, asked: torch.dtype | None, like: Tensor) -> None:
    """That a result's dtype is that of `like` or of its sums."""
    own, wide = like.dtype, accumulator(like)
    expected = " or ".join(dict.fromkeys((name_of(own), name_of(wide))))
    check.type(asked in (None, own, wide), name, expected, name_of(asked or own), "leave it out for the inputs' own")


@fake
def _expert_gemm_wgrad(
    grad_s, grad_r, rows_s, rows_r, offsets, num_tokens, num_shared, need_shared, need_routed, out_dtype=None
):
    check = Checker("expert_gemm_wgrad")
    _check_wgrad(check, grad_s, grad_r, rows_s, rows_r, offsets, num_tokens, num_shared)
    check_result(check, "out_dtype", out_dtype, rows_r)
    n, d = grad_r.shape[1], rows_r.shape[1]
    return (
        rows_r.new_empty((num_shared, n, d) if need_shared else 0, dtype=out_dtype),
        rows_r.new_empty((offsets.shape[0] - 1, n, d) if need_routed else 0, dtype=out_dtype),
    )


@fake
def _expert_gemm_wgrad_add(
    grad_s, grad_r, rows_s, rows_r, offsets, num_tokens, num_shared, shared_sum, routed_sum
) -> None:
    check = Checker("expert_gemm_wgrad_add")
    _check_wgrad(check, grad_s, grad_r, rows_s, rows_r, offsets, num_tokens, num_shared)
    for name, total, experts, letter in (
        ("shared_sum", shared_sum, num_shared, "S"),
        ("routed_sum", routed_sum, offsets.shape[0] - 1, "E"),
    ):
        if total is not None:
            check.device(name, total, rows_r, "routed_rows")
            check_result(check, name, total.dtype, rows_r)
            shape, remedy = (experts, grad_r.shape[1], rows_r.shape[1]), "pass a buffer of the projection's shape"
            check.shape(name, total, shape, f"[{letter}, grad_width, width]", remedy)
            strides = f"strides {list(total.stride())}"
            check.value(total.is_contiguous(), name, "be contiguous", strides, "pass a contiguous buffer")
    if shared_sum is not None and routed_sum is not None:
        check.dtype("routed_sum", routed_sum, shared_sum.dtype, "give both sums one dtype, or call once for each")


@fake
def _expert_bias_grad(rows_s, rows_r, row_weights, offsets, num_tokens, num_shared, need_shared, need_routed):
    check, slots = Checker("expert_bias_grad"), _slots_of(rows_r)
    check.count("num_tokens", num_tokens, 0)
    check.count("num_shared_experts", num_shared, 0)
    _check_rows(check, "", rows_s, rows_r, num_tokens, num_shared, slots)
    check.offsets(offsets, rows_r, "routed_rows")
    shape = (num_shared * num_tokens + rows_r.shape[0],)
    check.row_weights("row_weights", row_weights, rows_r, "routed_rows", shape, "[S*T + T*K]", "give one weight a row")
    return (
        rows_r.new_empty((num_shared, rows_r.shape[1]) if need_shared else 0),
        rows_r.new_empty((offsets.shape[0] - 1, rows_r.shape[1]) if need_routed else 0),
    )


def _check_pre_activation(check: Checker, z, kind: str, glu: bool) -> tuple[Size, Size]:
    """The activation's shape."""
    check.floating("pre_activation", z)
    words, remedy = "[rows, 2*I]" if glu else "[rows, I]", "flatten the leading dimensions first"
    check.shape("pre_activation", z, (None, None), words, remedy)
    (rows, width), remedy = z.shape, "concatenate gate and up, or pass glu=False"
    if glu:
        expected = "have an even width with glu=True (gate | up)"
        check.value(width % 2 == 0, "pre_activation", expected, width, remedy)
    check.activation("kind", kind)
    return rows, width // 2 if glu else width


@fake
def _activation(pre_activation, kind, glu):
    return pre_activation.new_empty(_check_pre_activation(Checker("activation"), pre_activation, kind, glu))


@fake
def _activation_backward(grad, pre_activation, row_weights, kind, glu):
    check, z = Checker("activation_backward"), pre_activation
    shape, names = _check_pre_activation(check, z, kind, glu), ("pre_activation", (z.shape[0],))
    remedies = "pass the gradient of activation's result", "give it the dtype of `pre_activation`"
    check.beside("grad", grad, z, "pre_activation", shape, "[rows, I]", z.dtype, remedies)
    check.row_weights("row_weights", row_weights, z, *names, "[rows]", "give one weight a row")
    return (
        z.new_empty(z.shape),
        z.new_empty(0 if row_weights is None else grad.shape),
        z.new_empty(0 if row_weights is None else grad.shape[0], dtype=accumulator(z)),
    )


def _check_lists(check: Checker, shared: list[Tensor], routed: list[Tensor]) -> Size:
    """The number of experts."""
    n = len(routed)
    check.value(n > 0, "routed", "hold at least one tensor", 0, "pass the FFN's tensors")
    remedy = "pass each FFN tensor of both kinds of expert, in the same order"
    check.value(len(shared) == n, "shared", f"have as many tensors as `routed` ({n})", len(shared), remedy)
    check.floating("routed", routed[0])
    for name, letter, tensors in (("shared", "S", shared), ("routed", "E", routed)):
        for t in tensors:
            check.value(t.dim() > 0, name, f"hold tensors [{letter}, ...]", "a scalar", "stack the experts")
    num_shared, num_routed = shared[0].shape[0], routed[0].shape[0]
    check.value(num_shared + num_routed > 0, "routed` and `shared", "hold at least one expert", 0, "stack the experts")
    for s, r in zip(shared, routed, strict=True):
        for name, t in (("shared", s), ("routed", r)):
            check.device(name, t, routed[0], "routed[0]")
            check.dtype(name, t, routed[0].dtype, "all tensors of one call share a dtype")
        check.shape("routed", r, (num_routed, *r.shape[1:]), "[E, ...]", "every tensor holds the same experts")
        shape, remedy = (num_shared, *r.shape[1:]), "a shared expert has the shape of a routed one"
        check.shape("shared", s, shape, "[S, ...]", remedy)
    return num_shared + num_routed


@fake
def _merge_experts(shared, routed, coefficients):
    check = Checker("merge_experts")
    shape, like = (len(routed), _check_lists(check, shared, routed)), ("routed[0]", "[len(routed), S + E]")
    remedies = "one row a tensor, shared experts first", "coefficients stay in fp32 (fp64 for fp64 experts)"
    acc = accumulator(routed[0])
    check.beside("coefficients", coefficients, routed[0], like[0], shape, like[1], acc, remedies)
    return [r.new_empty(r.shape[1:]) for r in routed]


@fake
def _merge_experts_dots(grads, shared, routed):
    check, n = Checker("merge_experts_dots"), len(routed)
    experts = _check_lists(check, shared, routed)
    remedies = "pass one gradient a merged tensor", "all tensors of one call share a dtype"
    check.value(len(grads) == n, "grads", f"have as many tensors as `routed` ({n})", len(grads), remedies[0])
    for g, r in zip(grads, routed, strict=True):
        check.beside("grads", g, routed[0], "routed[0]", r.shape[1:], "a merged tensor's", routed[0].dtype, remedies)
    return routed[0].new_empty(n, experts, dtype=accumulator(routed[0]))


@fake
def _merge_experts_grads(grad, coefficients, num_shared, need_shared, need_routed):
    check = Checker("merge_experts_grads")
    check.floating("grad", grad)
    remedies = (
        "one row an equal part of the tensor, shared experts first",
        "coefficients stay in fp32 (fp64 for fp64 experts)",
    )
    acc = accumulator(grad)
    check.beside("coefficients", coefficients, grad, "grad", (None, None), "[parts, S + E]", acc, remedies)
    parts, experts = coefficients.shape
    fits = parts > 0 and grad.dim() > 0 and grad.shape[0] % parts == 0
    expectation = "have a number of rows that divides grad's leading size"
    check.value(fits, "coefficients", expectation, parts, "pass two for a fused gate-and-up projection, else one")
    expectation, remedy = (
        f"be from 0 to the number of experts ({experts})",
        "the other coefficients are the routed experts'",
    )
    check.value(0 <= num_shared <= experts, "num_shared", expectation, num_shared, remedy)
    sizes = (num_shared, need_shared), (experts - num_shared, need_routed)
    return tuple(grad.new_empty((count, *grad.shape) if need else (0,)) for count, need in sizes)


@fake
def _expert_glu(rows_s, rows_r, shared_proj, routed_proj, offsets, num_tokens, sb, rb, activation):
    check = Checker("expert_glu")
    check.activation("activation", activation)
    pre = _product(check, rows_s, rows_r, shared_proj, routed_proj, offsets, num_tokens, sb, rb)
    width, expected = shared_proj.shape[1], "have an even number of rows (gate | up)"
    check.value(width % 2 == 0, "shared_proj", expected, width, "concatenate gate and up")
    return pre, pre.new_empty(pre.shape[0], width // 2)


@fake
def _expert_glu_backward(rows_s, rows_r, shared_proj, routed_proj, offsets, num_tokens, pre, weights, activation):
    check = Checker("expert_glu_backward")
    check.activation("activation", activation)
    act = _product(check, rows_s, rows_r, shared_proj, routed_proj, offsets, num_tokens, None, None, True)
    (rows, width), remedies = act.shape, ("pass what expert_glu returned",) * 2
    words = "[S*T + T*K, 2*I]"
    check.beside("pre_activation", pre, rows_r, "routed_rows", (rows, 2 * width), words, rows_r.dtype, remedies)
    shape, words, remedy = (rows,), "[S*T + T*K]", "give one weight a row"
    check.row_weights("row_weights", weights, rows_r, "routed_rows", shape, words, remedy)
    return pre.new_empty(pre.shape), act, weights.new_empty(rows)
