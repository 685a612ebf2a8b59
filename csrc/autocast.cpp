// Autocast of the differentiable operators, for CPU and CUDA: the products run in the autocast dtype, routing in fp32,
// gate weights and merge coefficients stay as they are. Operators that are not here are left alone: what they are given
// already has the dtype of a product's result.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "check.h"
#include "ops.h"

namespace ummrm {
namespace {

template <c10::DeviceType device>
struct Autocast {
  static Tensor lower(const Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
  }
  static OptionalTensor lower(const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(lower(*tensor)) : std::nullopt;
  }
  static Tensor to_float(const Tensor& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, device); }

  static Tensor6 route(const Tensor& logits, const OptionalTensor& mask, const OptionalTensor& clean_logits,
                       int64_t top_k, string_view gate, double fixed_shared_weight) {
    const NoAutocast guard;
    const OptionalTensor clean = clean_logits.has_value() ? OptionalTensor(to_float(*clean_logits)) : std::nullopt;
    return UMMRM_DISPATCHED(ummrm::route).call(to_float(logits), mask, clean, top_k, gate, fixed_shared_weight);
  }

  static Tensor expert_gemm(const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& shared_proj,
                            const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                            const OptionalTensor& shared_bias, const OptionalTensor& routed_bias, bool transpose) {
    const NoAutocast guard;
    return UMMRM_DISPATCHED(ummrm::expert_gemm)
        .call(lower(shared_rows), lower(routed_rows), lower(shared_proj), lower(routed_proj), expert_offsets,
              num_tokens, lower(shared_bias), lower(routed_bias), transpose);
  }

  static Tensor moe_ffn(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
                        const Tensor& expert_indices, const Tensor& shared_up, const Tensor& routed_up,
                        const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                        const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                        const OptionalTensor& routed_down_bias, string_view activation, bool glu) {
    const NoAutocast guard;
    return UMMRM_DISPATCHED(ummrm::moe_ffn)
        .call(lower(x), shared_weight, routed_weights, expert_indices, lower(shared_up), lower(routed_up),
              lower(shared_down), lower(routed_down), lower(shared_up_bias), lower(routed_up_bias),
              lower(shared_down_bias), lower(routed_down_bias), activation, glu);
  }

  // The experts are merged in their own dtype and rounded to x's after.
  static Tensor merged_ffn(const Tensor& x, const Tensor& coefficients, const Tensor& shared_up,
                           const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
                           const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
                           const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias,
                           string_view activation, bool glu) {
    const NoAutocast guard;
    return UMMRM_DISPATCHED(ummrm::merged_ffn)
        .call(lower(x), coefficients, shared_up, routed_up, shared_down, routed_down, shared_up_bias, routed_up_bias,
              shared_down_bias, routed_down_bias, activation, glu);
  }

  static void implement(torch::Library& m) {
    m.impl("route", &route);
    m.impl("expert_gemm", &expert_gemm);
    m.impl("moe_ffn", &moe_ffn);
    m.impl("merged_ffn", &merged_ffn);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(ummrm, AutocastCPU, m) { Autocast<at::kCPU>::implement(m); }
TORCH_LIBRARY_IMPL(ummrm, AutocastCUDA, m) { Autocast<at::kCUDA>::implement(m); }

}  // namespace ummrm
