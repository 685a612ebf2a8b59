"""Products of rows that stand grouped by expert already: no routing, no permutation, no gate weights.

What assignment by sequence runs on: whole sequences go to one expert, and the batch is ordered by expert once. Made of
`expert_gemm` and `activation`, whose kernels, autograd and checks they use.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.ummrm


def grouped_linear(x: Tensor, proj: Tensor, expert_offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiplies each expert's rows by its projection: `x[o_e : o_(e+1)] @ proj[e].T + bias[e]`, o the offsets.

    Each row is multiplied once, so that it costs a dense product's FLOPs; the gradient of `proj` is E matrices. An
    expert without rows is free. Saves x for backward and nothing else.

    Args:
        x: float [R, D], rows grouped by expert.
        proj: [E, N, D]; x's dtype (under autocast any).
        expert_offsets: int32 [E + 1], ascending from 0 to R: expert e owns the rows from offsets[e] to offsets[e + 1].
            Rows from `expert_offsets[E]` on come out zero.
        bias: [E, N], or None.

    Returns:
        [R, N] in x's dtype (under autocast its dtype).

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: dtypes that do not.
        IndexError: offsets that do not ascend from 0 to at most R (on CUDA under `ummrm.check(True)`).
    """
    # made anew: a slice would bring a gradient of zeros to add
    no_rows, no_proj, no_bias = (None if t is None else t.new_empty(0, *t.shape[1:]) for t in (x, proj, bias))
    return _ops.expert_gemm(no_rows, x, no_proj, proj, expert_offsets, 0, no_bias, bias, False)


def grouped_ffn(
    x: Tensor,
    expert_offsets: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    glu: bool = True,
) -> Tensor:
    """Runs each expert's FFN on its own rows: `down_e(act(up_e(x)))`, at a dense FFN's FLOPs and activation memory.

    Saves x, the pre-activation and the activation for backward, as a dense FFN does.

    Args:
        x: float [R, H], rows grouped by expert.
        expert_offsets: int32 [E + 1], as in `grouped_linear`.
        up: [E, 2I, H] if `glu` (gate rows first), else [E, I, H].
        down: [E, H, I].
        up_bias: [E, 2I or I], or None.
        down_bias: [E, H], or None.
        activation: `"silu"`, `"gelu"` (erf), `"gelu_tanh"`, `"relu"` or `"relu2"`.
        glu: `act(gate) * up` (arXiv 2002.05202) or `act(up)`.

    Returns:
        [R, H] in x's dtype (under autocast its dtype). Errors as in `grouped_linear`.
    """
    hidden = grouped_linear(x, up, expert_offsets, up_bias)
    return grouped_linear(_ops.activation(hidden, activation, glu), down, expert_offsets, down_bias)
