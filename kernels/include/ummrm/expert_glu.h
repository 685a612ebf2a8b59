// Products of expert_gemm.h with the gated activation at their end, where sums are still in registers: the
// up-projection that also writes A = act(gate) * up, and the down-projection's input gradient that goes on to that of
// the pre-activation. They save a pass over the pre-activation, and the writing and reading of A's gradient. On tensor
// cores alone, for 16-bit types and whole vectors; whoever calls asks first, and else takes the two kernels that they
// replace.
#pragma once

#include "ummrm/activation.h"
#include "ummrm/expert_gemm.h"

namespace ummrm::cuda {

struct ExpertGlu {
  ExpertGemm product;  // the up-projection: gate rows first; `out` is the pre-activation
  ActivationKind kind;
  void* activation;  // out, [S*tokens + slots, out_width / 2], of the rounded pre-activation; rows of no group become
                     // zero
};

struct ExpertGluBackward {
  ExpertGemm product;  // the down-projection with `transpose`, out_width I; `out` is null: the product is not kept
  ActivationKind kind;
  const void* pre_activation;  // [S*tokens + slots, 2 * I]
  const float* row_weights;    // [S*tokens + slots]
  void* grad_pre_activation;   // out, like pre_activation; this and the next: rows of no group become zero
  void* weighted_activation;   // out, [S*tokens + slots, I]
  float* row_dots;             // out, [S*tokens + slots]
};

// For tests and measurement: all fusions wherever there is a kernel, or none, instead of those of the tile table. That
// holds for products of any thread from here on.
enum class Fusions : int8_t { measured, all, none };
void use_fusions(Fusions fusions);

// Whether these arguments, on the current device, are to be computed by one kernel (expert_tiles.h says which are).
bool expert_glu_fused(const ExpertGlu& args);
bool expert_glu_fused(const ExpertGluBackward& args);

// Of what is fused. A workspace is as in expert_gemm.h.
int64_t expert_glu_workspace(const ExpertGlu& args);
int expert_glu(const ExpertGlu& args, void* workspace, Stream stream);
int64_t expert_glu_workspace(const ExpertGluBackward& args);
int expert_glu_backward(const ExpertGluBackward& args, void* workspace, Stream stream);

}  // namespace ummrm::cuda
