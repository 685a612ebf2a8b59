// The products of expert_gemm.cpp. at::mm and at::addmm write preallocated slices, and are oneDNN in bf16 and MKL in
// fp32. MKL does not use AVX-512 on AMD processors and oneDNN does: on Zen 5, 370 to 460 against 185 to 204 GFLOP/s, so
// that the whole MoE FFN takes half the time although oneDNN's operator returns a new tensor, to be copied. On Zen 3
// (AVX2) MKL is the faster by 1.2. So the rule asks for both, AMD and AVX-512; it never times anything.
#include "gemm.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <string_view>

#include "ummrm/cpu_info.h"

namespace ummrm {
namespace {

// oneDNN's product as inductor uses it. The operator is private to torch: absent or changed, it is not used.
const std::optional<c10::OperatorHandle>& linear_pointwise() {
  static const auto handle = []() -> std::optional<c10::OperatorHandle> {
    const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    const bool known =
        found.has_value() && found->schema().arguments().size() == 6 && found->schema().returns().size() == 1;
    return known ? std::optional(*found) : std::nullopt;
  }();
  return handle;
}

bool fp32_by_onednn() {
  static const bool chosen =
      cpu::is_amd() && std::string_view(cpu::isa()) == "x86-64-v4" && linear_pointwise().has_value();
  return chosen;
}

bool by_onednn(const at::Tensor& out, const at::Tensor& a) {
  return out.is_cpu() && out.scalar_type() == at::kFloat && a.size(1) > 0 && fp32_by_onednn();
}

}  // namespace

at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(linear_pointwise().has_value(),
                    "this torch has no oneDNN linear operator; build torch with MKLDNN");
  torch::jit::Stack stack{a,
                          b.t(),
                          bias.has_value() ? c10::IValue(bias->contiguous()) : c10::IValue(),  // it ignores strides
                          "none",
                          c10::IValue(c10::List<std::optional<at::Scalar>>()),
                          ""};
  linear_pointwise()->callBoxed(stack);
  return stack.front().toTensor();
}

void product_into(const at::Tensor& out_slice, const at::Tensor& a, const at::Tensor& b,
                  const std::optional<at::Tensor>& bias) {
  at::Tensor out = out_slice;
  if (by_onednn(out, a)) {
    out.copy_(onednn_product(a, b, bias));
  } else if (bias.has_value()) {
    at::addmm_out(out, *bias, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

void product_onto(const at::Tensor& out_slice, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor out = out_slice;
  if (by_onednn(out, a)) {
    out.add_(onednn_product(a, b, std::nullopt));
  } else {
    at::addmm_out(out, out, a, b);
  }
}

const char* fp32_gemm_rule() {
  return fp32_by_onednn() ? "oneDNN (AMD processor with AVX-512)"
                          : "at::mm (oneDNN only on AMD processors with AVX-512)";
}

}  // namespace ummrm
