// The operators' C++ signatures, one for each schema line in module.cpp, where arguments and results are named; the
// meaning of each is in ummrm/ops/__init__.py. Called directly these skip the dispatcher; UMMRM_DISPATCHED goes through
// it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace ummrm {

using at::Tensor;
using at::TensorList;
using c10::string_view;
using OptionalTensor = std::optional<Tensor>;
using Tensor2 = std::tuple<Tensor, Tensor>;
using Tensor3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensor5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensor6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor6 route(const Tensor& logits, const OptionalTensor& mask, const OptionalTensor& clean_logits, int64_t top_k,
              string_view gate, double fixed_shared_weight);
Tensor2 route_backward(const Tensor& grad_shared_weight, const Tensor& grad_routed_weights,
                       const Tensor& grad_mean_prob, const Tensor& grad_mean_z, const Tensor& logits,
                       const OptionalTensor& mask, const OptionalTensor& clean_logits, const Tensor& expert_indices,
                       const Tensor& tokens_per_expert, string_view gate, double fixed_shared_weight);
Tensor3 sort_slots(const Tensor& expert_indices, int64_t num_experts);

Tensor permute(const Tensor& x, const Tensor& sorted_to_slot, const Tensor& expert_offsets, int64_t top_k);
Tensor unpermute(const Tensor& rows, const Tensor& slot_to_sorted, const Tensor& expert_offsets,
                 const OptionalTensor& shared_weight, const OptionalTensor& routed_weights, int64_t num_shared_experts,
                 int64_t top_k);
Tensor3 unpermute_backward(const Tensor& grad_out, const Tensor& rows, const Tensor& slot_to_sorted,
                           const Tensor& expert_offsets, const OptionalTensor& shared_weight,
                           const OptionalTensor& routed_weights, int64_t num_shared_experts, int64_t top_k);

Tensor expert_gemm(const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& shared_proj,
                   const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                   const OptionalTensor& shared_bias, const OptionalTensor& routed_bias, bool transpose);
Tensor2 expert_gemm_wgrad(const Tensor& grad_shared_rows, const Tensor& grad_routed_rows, const Tensor& shared_rows,
                          const Tensor& routed_rows, const Tensor& expert_offsets, int64_t num_tokens,
                          int64_t num_shared_experts, bool need_shared, bool need_routed,
                          std::optional<at::ScalarType> out_dtype);
void expert_gemm_wgrad_add(const Tensor& grad_shared_rows, const Tensor& grad_routed_rows, const Tensor& shared_rows,
                           const Tensor& routed_rows, const Tensor& expert_offsets, int64_t num_tokens,
                           int64_t num_shared_experts, const OptionalTensor& shared_sum,
                           const OptionalTensor& routed_sum);
Tensor2 expert_bias_grad(const Tensor& shared_rows, const Tensor& routed_rows, const OptionalTensor& row_weights,
                         const Tensor& expert_offsets, int64_t num_tokens, int64_t num_shared_experts, bool need_shared,
                         bool need_routed);

Tensor activation(const Tensor& pre_activation, string_view kind, bool glu);
Tensor3 activation_backward(const Tensor& grad, const Tensor& pre_activation, const OptionalTensor& row_weights,
                            string_view kind, bool glu);

Tensor2 expert_glu(const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& shared_proj,
                   const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                   const OptionalTensor& shared_bias, const OptionalTensor& routed_bias, string_view kind);
Tensor3 expert_glu_backward(const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& shared_proj,
                            const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                            const Tensor& pre_activation, const Tensor& row_weights, string_view kind);

std::vector<Tensor> merge_experts(TensorList shared, TensorList routed, const Tensor& coefficients);
Tensor merge_experts_dots(TensorList grads, TensorList shared, TensorList routed);
Tensor2 merge_experts_grads(const Tensor& grad, const Tensor& coefficients, int64_t num_shared, bool need_shared,
                            bool need_routed);

Tensor moe_ffn(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights, const Tensor& expert_indices,
               const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
               const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
               const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias, string_view activation,
               bool glu);
Tensor5 moe_ffn_forward(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
                        const Tensor& expert_indices, const Tensor& shared_up, const Tensor& routed_up,
                        const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                        const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                        const OptionalTensor& routed_down_bias, string_view activation, bool glu);
std::vector<Tensor> moe_ffn_backward(const Tensor& grad_out, const Tensor& x, const Tensor& shared_weight,
                                     const Tensor& routed_weights, const Tensor& expert_indices,
                                     const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down,
                                     const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                                     const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                                     const OptionalTensor& routed_down_bias, const Tensor& pre_activation,
                                     const Tensor& slot_to_sorted, const Tensor& sorted_to_slot,
                                     const Tensor& expert_offsets, string_view activation, bool glu,
                                     std::array<bool, 11> need);

std::vector<Tensor> moe_ffn_backward_add(
    const Tensor& grad_out, const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
    const Tensor& expert_indices, const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down,
    const Tensor& routed_down, const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
    const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias, const Tensor& pre_activation,
    const Tensor& slot_to_sorted, const Tensor& sorted_to_slot, const Tensor& expert_offsets, string_view activation,
    bool glu, std::array<bool, 11> need, const OptionalTensor& shared_up_sum, const OptionalTensor& routed_up_sum,
    const OptionalTensor& shared_down_sum, const OptionalTensor& routed_down_sum);

std::vector<Tensor> merge_ffn(const Tensor& coefficients, const Tensor& shared_up, const Tensor& routed_up,
                              const Tensor& shared_down, const Tensor& routed_down,
                              const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
                              const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias, bool glu);
Tensor merged_ffn(const Tensor& x, const Tensor& coefficients, const Tensor& shared_up, const Tensor& routed_up,
                  const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                  const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                  const OptionalTensor& routed_down_bias, string_view activation, bool glu);
Tensor2 merged_ffn_forward(const Tensor& x, const Tensor& coefficients, const Tensor& shared_up,
                           const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
                           const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
                           const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias,
                           string_view activation, bool glu);
std::vector<Tensor> merged_ffn_backward(const Tensor& grad_out, const Tensor& x, const Tensor& coefficients,
                                        const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down,
                                        const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                                        const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                                        const OptionalTensor& routed_down_bias, const Tensor& pre_activation,
                                        string_view activation, bool glu, std::array<bool, 10> need);

// The parameters of a layer's experts, as the composed operators take them.
struct Experts {
  const Tensor &shared_up, &routed_up, &shared_down, &routed_down;
  const OptionalTensor &shared_up_bias, &routed_up_bias, &shared_down_bias, &routed_down_bias;
};

inline std::string qualified_name(std::string op) { return op.starts_with("ummrm::") ? op : "ummrm::" + op; }

// The operator `name` through the dispatcher, with the signature of its C++ function: for compositions, so that
// whichever backend serves the device runs.
template <class Function>
auto find_operator(Function*, const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>();
}

// `op` is the function's name, qualified where another name hides it.
#define UMMRM_DISPATCHED(op)                                                                      \
  ([]() -> const auto& {                                                                          \
    static const auto handle = ::ummrm::find_operator(&op, ::ummrm::qualified_name(#op).c_str()); \
    return handle;                                                                                \
  }())

}  // namespace ummrm
