// The products of expert_gemm.cpp, by at::mm and at::addmm into preallocated slices.
#include "gemm.h"

namespace ummrm {

void product_into(
    const at::Tensor& out_slice, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  at::Tensor out = out_slice;
  if (bias.has_value()) {
    at::addmm_out(out, *bias, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

const char* fp32_gemm_rule() { return "at::mm"; }

}  // namespace ummrm
