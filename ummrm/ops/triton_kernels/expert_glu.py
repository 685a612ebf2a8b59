"""The up-projection with its gated activation, and the down-projection's input gradient with that's backward.

Two kernels each; the fused ones are `up_activation.py`'s, which `moe_ffn.py` is made of.
"""

from __future__ import annotations

from torch import Tensor

from .activation import activation, activation_backward
from .expert_gemm import expert_gemm


def expert_glu(*arguments) -> tuple[Tensor, Tensor]:
    *product, kind = arguments
    pre_activation = expert_gemm(*product)
    return pre_activation, activation(pre_activation, kind, True)


def expert_glu_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    *product, pre_activation, row_weights, kind = arguments
    grad = expert_gemm(*product, transpose=True)
    return activation_backward(grad, pre_activation, row_weights, kind, True)
