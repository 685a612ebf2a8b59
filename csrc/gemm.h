// Which library multiplies matrices: on CUDA cuBLAS, as torch chooses; on this CPU one of two.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace ummrm {

// out = a @ b (+ bias, added to every row). All 2-D, `out` preallocated, `a` and `b` may be transposed views.
void product_into(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                  const std::optional<at::Tensor>& bias = std::nullopt);

// out += a @ b, likewise.
void product_onto(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

// a @ b (+ bias) in fp32 by oneDNN, whatever the rule: for its test, also where the rule does not choose it.
at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias);

// The rule for fp32, in words, for build_info.
const char* fp32_gemm_rule();

}  // namespace ummrm
