"""One case an operator, for everything that all operators must pass alike: name to (operator, CPU arguments)."""

import torch
from op_inputs import expert_indices, floats, gate_dtype, gate_weights, moe_inputs
from test_expert_gemm import gemm_inputs
from test_merge_experts import merge_inputs
from test_merged_ffn import merged_inputs, without_x

from ummrm import ops
from ummrm.ops import composed_reference, reference

# T, H, I, E, K, S: sizes that divide nothing, sizes that vectors and matrix units take, and more than one block of each
ODD = (37, 21, 13, 5, 3, 2)
EVEN = (64, 32, 48, 4, 2, 1)
SEVERAL_BLOCKS = (1500, 72, 40, 7, 5, 1)
SHAPES = {"odd": ODD, "even": EVEN, "several blocks": SEVERAL_BLOCKS}

NAMES = (
    "route",
    "sort_slots",
    "permute",
    "unpermute",
    "expert_gemm",
    "expert_gemm transposed",
    "activation",
    "merge_experts",
    "moe_ffn",
    "merge_ffn",
    "merged_ffn",
)


def plain_of(name):
    """What an operator of NAMES computes, in plain torch."""
    stem = name.removesuffix(" transposed")
    return getattr(composed_reference if stem.endswith("ffn") else reference, stem)


def case(name, shape, dtype=torch.float32, kind="some_dead"):
    """(operator, arguments on the CPU, all floats requiring gradients). Random at every call."""
    t, h, i, e, k, s = shape
    if name in ("permute", "unpermute"):
        indices = expert_indices(t, e, k, kind)
        slot_to_sorted, sorted_to_slot, offsets = reference.sort_slots(indices, e)
    if name == "route":
        logits = floats(t, e, dtype=dtype, requires_grad=True, scale=2)
        return ops.route, {"logits": logits, "top_k": k, "mask": torch.rand(t) < 0.7}
    if name == "sort_slots":
        return ops.sort_slots, {"expert_indices": expert_indices(t, e, k, kind), "num_experts": e}
    if name == "permute":
        x = floats(t, h, dtype=dtype, requires_grad=True)
        return ops.permute, {"x": x, "sorted_to_slot": sorted_to_slot, "expert_offsets": offsets, "top_k": k}
    if name == "unpermute":
        shared, routed = gate_weights(indices, gate_dtype(dtype), requires_grad=True)
        return ops.unpermute, {
            "rows": floats(s * t + t * k, h, dtype=dtype, requires_grad=True),
            "slot_to_sorted": slot_to_sorted,
            "expert_offsets": offsets,
            "shared_weight": shared,
            "routed_weights": routed,
            "num_shared_experts": s,
            "top_k": k,
        }
    if name.startswith("expert_gemm"):
        return ops.expert_gemm, gemm_inputs(t, h, i, e, k, s, kind, dtype, transpose=name.endswith("transposed"))
    if name == "activation":
        return ops.activation, {"pre_activation": floats(t, 2 * i, dtype=dtype, requires_grad=True)}
    if name == "merge_experts":
        return ops.merge_experts, merge_inputs(s, e, [(2 * i, h), (h, i), (h,)], dtype)
    if name == "moe_ffn":
        return ops.moe_ffn, moe_inputs(*shape, kind=kind, dtype=dtype)
    if name == "merge_ffn":
        return ops.merge_ffn, without_x(merged_inputs(t, h, i, e, s, dtype=dtype))
    return ops.merged_ffn, merged_inputs(t, h, i, e, s, dtype=dtype)
