"""The compiled extension as torch operators: loads `_C`, then registers a fake for each operator, and autograd.

The only importer of `_C`. Schemas stand in csrc/module.cpp and kernels in csrc/; a fake is an operator's shape
function, for torch.compile, export and meta tensors; autograd is `autograd.py`'s.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from . import autograd
from .reference import accumulator

_RECORD = "_build_record.json"  # written by setup.py beside the extension
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps <the ummrm source folder>"


def check_build(folder: Path, running: str) -> dict:
    """The build's record, as setup.py wrote it beside the extension in `folder`.

    Raises ImportError unless that was built against torch version `running`, up to the patch.

    torch's C++ ABI changes with every minor version; loading a mismatched library ends in an undefined symbol or worse.
    """
    path = folder / _RECORD
    if not path.is_file():
        raise ImportError(f"ummrm: the compiled extension `ummrm._C` is missing in {folder}; build it: {_REBUILD}")
    record = json.loads(path.read_text())
    built = record["torch_version"]
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"ummrm: `ummrm._C` was built against torch {built} and must run with the same minor version, "
            f"but torch {running} is installed. Rebuild it: {_REBUILD}"
        )
    return record


_record = check_build(Path(__file__).parent.parent, torch.__version__)
from .. import _C  # noqa: E402  (only after the check)

build_info, tile_table, launch = _C.build_info, _C.tile_table, _C.launch

_checking = False


def check(enabled: bool) -> None:
    """Whether index values are checked on devices where reading them waits for the device. CPU tensors always are."""
    global _checking
    _C.check(enabled)
    _checking = bool(enabled)


def checking() -> bool:
    """What `check` last said; for kernels outside the extension."""
    return _checking


no_cuda_kernels: str | None = _record["no_cuda_kernels"]  # why the extension has none; None if it has

_library = torch.library.Library("ummrm", "IMPL")


# Shape functions. The kernels check shapes and dtypes later; devices are checked here too, because one meta tensor
# among others sends a call here for good.


def _check_devices(op: str, args: tuple) -> None:
    named = zip(getattr(torch.ops.ummrm, op).default._schema.arguments, args, strict=False)
    tensors = [(a.name, t) for a, v in named for t in (v if isinstance(v, (list, tuple)) else (v,))]
    tensors = [(name, t) for name, t in tensors if isinstance(t, Tensor)]
    for name, tensor in tensors[1:]:
        if tensor.device != tensors[0][1].device:
            raise ValueError(
                f"ummrm.{op}: `{name}` must be on the device of `{tensors[0][0]}`, {tensors[0][1].device}, "
                f"got {tensor.device}; move it there."
            )


def _fake(function):
    op = function.__name__[1:]

    @functools.wraps(function)
    def checked(*args):
        _check_devices(op, args)
        return function(*args)

    torch.library.register_fake(f"ummrm::{op}", checked, lib=_library)
    return function


@_fake
def _route(logits, mask, clean_logits, top_k, gate, fixed_shared_weight):
    num_tokens, num_experts = logits.shape
    acc = accumulator(logits)
    return (
        logits.new_empty(num_tokens, dtype=acc),
        logits.new_empty((num_tokens, top_k), dtype=acc),
        logits.new_empty((num_tokens, top_k), dtype=torch.int32),
        logits.new_empty(num_experts, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=acc),
        logits.new_empty((), dtype=acc),
    )


@_fake
def _route_backward(grad_sw, grad_rw, grad_prob, grad_z, logits, mask, clean, indices, counts, gate, fixed):
    return logits.new_empty(logits.shape), logits.new_empty(0) if clean is None else clean.new_empty(clean.shape)


@_fake
def _sort_slots(expert_indices, num_experts):
    slots = expert_indices.numel()
    return tuple(expert_indices.new_empty(n, dtype=torch.int32) for n in (slots, slots, num_experts + 1))


@_fake
def _permute(x, sorted_to_slot, expert_offsets, top_k):
    return x.new_empty(sorted_to_slot.shape[0], x.shape[1])


@_fake
def _unpermute(rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights, num_shared_experts, top_k):
    return rows.new_empty(slot_to_sorted.shape[0] // top_k, rows.shape[1])


@_fake
def _unpermute_backward(grad_out, rows, slot_to_sorted, expert_offsets, sw, rw, num_shared_experts, top_k):
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(0 if sw is None else sw.shape, dtype=accumulator(rows)),
        rows.new_empty(0 if rw is None else rw.shape, dtype=accumulator(rows)),
    )


@_fake
def _expert_gemm(
    shared_rows, routed_rows, shared_proj, routed_proj, offsets, num_tokens, sb=None, rb=None, transpose=False
):
    rows = shared_proj.shape[0] * num_tokens + routed_rows.shape[0]
    return routed_rows.new_empty(rows, routed_proj.shape[2 if transpose else 1])


@_fake
def _expert_gemm_wgrad(
    grad_s, grad_r, rows_s, rows_r, offsets, num_tokens, num_shared, need_shared, need_routed, out_dtype=None
):
    n, d = grad_r.shape[1], rows_r.shape[1]
    return (
        rows_r.new_empty((num_shared, n, d) if need_shared else 0, dtype=out_dtype),
        rows_r.new_empty((offsets.shape[0] - 1, n, d) if need_routed else 0, dtype=out_dtype),
    )


@_fake
def _expert_bias_grad(rows_s, rows_r, row_weights, offsets, num_tokens, num_shared, need_shared, need_routed):
    return (
        rows_r.new_empty((num_shared, rows_r.shape[1]) if need_shared else 0),
        rows_r.new_empty((offsets.shape[0] - 1, rows_r.shape[1]) if need_routed else 0),
    )


@_fake
def _activation(pre_activation, kind, glu):
    rows, width = pre_activation.shape
    return pre_activation.new_empty(rows, width // 2 if glu else width)


@_fake
def _activation_backward(grad, pre_activation, row_weights, kind, glu):
    z = pre_activation
    return (
        z.new_empty(z.shape),
        z.new_empty(0 if row_weights is None else grad.shape),
        z.new_empty(0 if row_weights is None else grad.shape[0], dtype=accumulator(z)),
    )


@_fake
def _merge_experts(shared, routed, coefficients):
    return [r.new_empty(r.shape[1:]) for r in routed]


@_fake
def _merge_experts_dots(grads, shared, routed):
    return routed[0].new_empty(len(routed), shared[0].shape[0] + routed[0].shape[0], dtype=accumulator(routed[0]))


@_fake
def _moe_ffn(x, shared_weight, *rest):
    return x.new_empty(x.shape)


@_fake
def _moe_ffn_forward(x, shared_weight, routed_weights, expert_indices, shared_up, routed_up, *rest):
    slots, (num_experts, width, _) = expert_indices.numel(), routed_up.shape
    index = functools.partial(x.new_empty, dtype=torch.int32)
    pre_activation = x.new_empty(shared_up.shape[0] * x.shape[0] + slots, width)
    return x.new_empty(x.shape), pre_activation, index(slots), index(slots), index(num_experts + 1)


def _fake_grads(tensors, need) -> list[Tensor]:
    like = next(t for t in tensors if t is not None)
    return [
        t.new_empty(t.shape) if t is not None and n else like.new_empty(0) for t, n in zip(tensors, need, strict=True)
    ]


@_fake
def _moe_ffn_backward(grad_out, x, shared_weight, routed_weights, expert_indices, *rest):
    experts, need = rest[:8], rest[-1]
    return _fake_grads([x, shared_weight, routed_weights, *experts], need)


@_fake
def _merged_ffn(x, coefficients, *rest):
    return x.new_empty(x.shape)


@_fake
def _merged_ffn_forward(x, coefficients, shared_up, routed_up, *rest):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], routed_up.shape[1])


@_fake
def _merged_ffn_backward(grad_out, x, coefficients, *rest):
    return _fake_grads([x, coefficients, *rest[:8]], rest[-1])


autograd.register(_library)
