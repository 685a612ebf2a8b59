"""The operators in Triton, for GPUs without nvcc and for AMD: one file an operator.

KERNELS has the functions that `ummrm.ops.backends` registers behind the extension's argument checks; they take the
arguments of the operators' schemas, allocate and launch. Nothing here knows the dispatcher, autograd or the extension.
"""

from .activation import activation, activation_backward
from .bias_grad import expert_bias_grad
from .expert_gemm import expert_gemm, expert_gemm_wgrad, expert_gemm_wgrad_add
from .expert_glu import expert_glu, expert_glu_backward
from .launch import INTERPRETED
from .merge_experts import merge_experts, merge_experts_dots, merge_experts_grads
from .moe_ffn import moe_ffn, moe_ffn_backward, moe_ffn_backward_add, moe_ffn_forward
from .permute import permute, unpermute, unpermute_backward
from .routing import route, route_backward, sort_slots

KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        route,
        route_backward,
        sort_slots,
        permute,
        unpermute,
        unpermute_backward,
        expert_gemm,
        expert_gemm_wgrad,
        expert_gemm_wgrad_add,
        expert_bias_grad,
        activation,
        activation_backward,
        expert_glu,
        expert_glu_backward,
        merge_experts,
        merge_experts_dots,
        merge_experts_grads,
        moe_ffn,
        moe_ffn_forward,
        moe_ffn_backward,
        moe_ffn_backward_add,
    )
}

if INTERPRETED:
    from .interpreter import install

    install()
