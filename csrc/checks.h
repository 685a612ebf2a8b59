// The argument checks of every operator, one function each, defined beside the operator that calls it. Python sees them
// as `ummrm._C.checks`: backends that are not compiled call them before their kernels, so that an argument is refused
// in the same words everywhere. They compute nothing, take the arguments of the schema, and know no device's limits.
#pragma once

#include "ops.h"

namespace ummrm {

// A function that takes what `Function` takes and returns nothing.
template <class Function>
struct CheckOf;
template <class Result, class... Arguments>
struct CheckOf<Result(Arguments...)> {
  using type = void(Arguments...);
};

namespace checks {

CheckOf<decltype(ummrm::route)>::type route;
CheckOf<decltype(ummrm::route_backward)>::type route_backward;
CheckOf<decltype(ummrm::sort_slots)>::type sort_slots;
CheckOf<decltype(ummrm::permute)>::type permute;
CheckOf<decltype(ummrm::unpermute)>::type unpermute;
CheckOf<decltype(ummrm::unpermute_backward)>::type unpermute_backward;
CheckOf<decltype(ummrm::expert_gemm)>::type expert_gemm;
CheckOf<decltype(ummrm::expert_gemm_wgrad)>::type expert_gemm_wgrad;
CheckOf<decltype(ummrm::expert_gemm_wgrad_add)>::type expert_gemm_wgrad_add;
CheckOf<decltype(ummrm::expert_bias_grad)>::type expert_bias_grad;
CheckOf<decltype(ummrm::expert_glu)>::type expert_glu;
CheckOf<decltype(ummrm::expert_glu_backward)>::type expert_glu_backward;
CheckOf<decltype(ummrm::activation)>::type activation;
CheckOf<decltype(ummrm::activation_backward)>::type activation_backward;
CheckOf<decltype(ummrm::merge_experts)>::type merge_experts;
CheckOf<decltype(ummrm::merge_experts_dots)>::type merge_experts_dots;
CheckOf<decltype(ummrm::merge_experts_grads)>::type merge_experts_grads;
CheckOf<decltype(ummrm::moe_ffn)>::type moe_ffn;
CheckOf<decltype(ummrm::moe_ffn_backward)>::type moe_ffn_backward;
CheckOf<decltype(ummrm::moe_ffn_backward_add)>::type moe_ffn_backward_add;
CheckOf<decltype(ummrm::merge_ffn)>::type merge_ffn;
CheckOf<decltype(ummrm::merged_ffn)>::type merged_ffn;
CheckOf<decltype(ummrm::merged_ffn_backward)>::type merged_ffn_backward;

}  // namespace checks
}  // namespace ummrm
