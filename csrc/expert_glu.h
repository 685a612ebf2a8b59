// What the operators of expert_glu.cpp share with others. Compositions ask before they call them whether one kernel
// would serve: if not, they call the two that it replaces themselves, and let go of what is between them.
#pragma once

#include "check.h"
#include "ops.h"
#include "ummrm/activation.h"

namespace ummrm {

// For rows like x's and a layer's experts, of `pre_width` = 2I rows.
bool glu_is_fused(const Tensor& x, int64_t num_shared, int64_t num_experts, int64_t slots, int64_t pre_width,
                  ActivationKind kind);
bool glu_backward_is_fused(const Tensor& x, int64_t num_shared, int64_t num_experts, int64_t slots, int64_t pre_width,
                           ActivationKind kind);

// The checks of expert_gemm, in the name of another operator.
void check_product(const Checker& check, const Tensor& shared_rows, const Tensor& routed_rows,
                   const Tensor& shared_proj, const Tensor& routed_proj, const Tensor& expert_offsets,
                   int64_t num_tokens, const OptionalTensor& shared_bias, const OptionalTensor& routed_bias,
                   bool transpose);

// Multiprocessors to leave to others: torch's own setting, torch._C._set_sm_carveout_experimental, which its matrix
// products follow as well.
int spare_multiprocessors();

}  // namespace ummrm
