// Operators of the stem `expert_glu`: expert_glu and expert_glu_backward, products with the gated activation at their
// end. One kernel where the build has it and it is taken (kernels/cuda/expert_tiles.h), else the two operators that
// they are made of, through the dispatcher.
#include "ummrm/expert_glu.h"

#include "checks.h"
#include "device.h"
#include "expert_glu.h"

namespace ummrm {
namespace {

int64_t experts_of(const Tensor& expert_offsets) { return expert_offsets.numel() - 1; }

// What there is to say of a product without its tensors. Where there are no routed experts cuBLAS has it.
cuda::ExpertGemm sizes_of(DType element, int64_t tokens, int64_t num_shared, int64_t num_experts, int64_t slots,
                          int64_t in, int64_t out_width, bool transpose) {
  cuda::ExpertGemm args{};
  args.dtype = element;
  args.tokens = tokens;
  args.num_shared = num_shared;
  args.num_experts = num_experts;
  args.slots = slots;
  args.in = in;
  args.out_width = out_width;
  args.transpose = transpose;
  return args;
}

// Asks the kernels of the device of `like`, and runs nothing.
template <class Args>
bool fused(const Tensor& like, const Args& args) {
  if (on_host(like) || !has_kernels(like) || args.product.num_experts == 0) return false;
  bool answer = false;
  on_cuda(Checker{"expert_glu"}, like, [&](auto) {
    answer = cuda::expert_glu_fused(args);
    return 0;
  });
  return answer;
}

}  // namespace

bool glu_is_fused(const Tensor& x, int64_t num_shared, int64_t num_experts, int64_t slots, int64_t pre_width,
                  ActivationKind kind) {
  if (x.scalar_type() != at::kBFloat16) return false;
  const auto up = sizes_of(DType::bf16, x.size(0), num_shared, num_experts, slots, x.size(1), pre_width, false);
  return fused(x, cuda::ExpertGlu{up, kind, nullptr});
}

bool glu_backward_is_fused(const Tensor& x, int64_t num_shared, int64_t num_experts, int64_t slots, int64_t pre_width,
                           ActivationKind kind) {
  if (x.scalar_type() != at::kBFloat16) return false;
  const auto down = sizes_of(DType::bf16, x.size(0), num_shared, num_experts, slots, x.size(1), pre_width / 2, true);
  return fused(x, cuda::ExpertGluBackward{down, kind, nullptr, nullptr, nullptr, nullptr, nullptr});
}

void checks::expert_glu(const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& shared_proj,
                        const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                        const OptionalTensor& shared_bias, const OptionalTensor& routed_bias, string_view kind) {
  const Checker check{"expert_glu"};
  check.activation(kind);
  check_product(check, shared_rows, routed_rows, shared_proj, routed_proj, expert_offsets, num_tokens, shared_bias,
                routed_bias, false);
  TORCH_CHECK_VALUE(shared_proj.size(1) % 2 == 0,
                    "ummrm.expert_glu: `shared_proj` must have an even number of rows (gate | up), got ",
                    shared_proj.size(1), "; concatenate gate and up.");
}

void checks::expert_glu_backward(const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& shared_proj,
                                 const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                                 const Tensor& pre_activation, const Tensor& row_weights, string_view kind) {
  const Checker check{"expert_glu_backward"};
  check.activation(kind);
  check_product(check, shared_rows, routed_rows, shared_proj, routed_proj, expert_offsets, num_tokens, std::nullopt,
                std::nullopt, true);
  const int64_t rows = shared_proj.size(0) * num_tokens + routed_rows.size(0);
  check.device("pre_activation", pre_activation, routed_rows, "routed_rows");
  check.shape("pre_activation", pre_activation, {rows, 2 * shared_proj.size(2)}, "[S*T + T*K, 2*I]",
              "pass what expert_glu returned");
  check.dtype("pre_activation", pre_activation, routed_rows.scalar_type(), "pass what expert_glu returned");
  check.device("row_weights", row_weights, routed_rows, "routed_rows");
  check.shape("row_weights", row_weights, {rows}, "[S*T + T*K]", "give one weight a row");
  check.dtype("row_weights", row_weights, accumulator(routed_rows), "gate weights stay in fp32 (fp64 for fp64 rows)");
}

Tensor2 expert_glu(const Tensor& shared_in, const Tensor& routed_in, const Tensor& shared_proj_in,
                   const Tensor& routed_proj_in, const Tensor& expert_offsets, int64_t num_tokens,
                   const OptionalTensor& shared_bias_in, const OptionalTensor& routed_bias_in, string_view kind) {
  checks::expert_glu(shared_in, routed_in, shared_proj_in, routed_proj_in, expert_offsets, num_tokens, shared_bias_in,
                     routed_bias_in, kind);
  const Checker check{"expert_glu"};
  const int64_t pre_width = shared_proj_in.size(1), rows = shared_proj_in.size(0) * num_tokens + routed_in.size(0);
  const Tensor shared = shared_in.contiguous(), routed = routed_in.contiguous(), offsets = expert_offsets.contiguous();
  const Tensor shared_proj = shared_proj_in.contiguous(), routed_proj = routed_proj_in.contiguous();
  const OptionalTensor shared_bias = contiguous(shared_bias_in), routed_bias = contiguous(routed_bias_in);
  cuda::ExpertGlu args{sizes_of(check.element("routed_rows", routed), num_tokens, shared_proj.size(0),
                                experts_of(offsets), routed.size(0), routed.size(1), pre_width, false),
                       check.activation(kind), nullptr};
  args.product.one_row_a_token = shared.size(0) == num_tokens;
  args.product.shared_rows = shared.const_data_ptr();
  args.product.routed_rows = routed.const_data_ptr();
  args.product.shared_proj = shared_proj.const_data_ptr();
  args.product.routed_proj = routed_proj.const_data_ptr();
  args.product.shared_bias = data_or_null(shared_bias);
  args.product.routed_bias = data_or_null(routed_bias);
  if (!fused(routed, args)) {
    const Tensor pre =
        UMMRM_DISPATCHED(expert_gemm)
            .call(shared, routed, shared_proj, routed_proj, offsets, num_tokens, shared_bias, routed_bias, false);
    return {pre, UMMRM_DISPATCHED(ummrm::activation).call(pre, kind, true)};
  }
  args.product.expert_offsets = offsets.const_data_ptr<int32_t>();
  args.product.spare_multiprocessors = spare_multiprocessors();
  const Tensor pre = at::empty({rows, pre_width}, routed.options());
  const Tensor act = at::empty({rows, pre_width / 2}, routed.options());
  args.product.out = pre.mutable_data_ptr();
  args.activation = act.mutable_data_ptr();
  on_cuda(check, routed, [&](auto stream) {
    const Tensor space = workspace(cuda::expert_glu_workspace(args), routed);
    return cuda::expert_glu(args, space.mutable_data_ptr(), stream);
  });
  return {pre, act};
}

Tensor3 expert_glu_backward(const Tensor& shared_in, const Tensor& routed_in, const Tensor& shared_proj_in,
                            const Tensor& routed_proj_in, const Tensor& expert_offsets, int64_t num_tokens,
                            const Tensor& pre_activation, const Tensor& row_weights, string_view kind) {
  checks::expert_glu_backward(shared_in, routed_in, shared_proj_in, routed_proj_in, expert_offsets, num_tokens,
                              pre_activation, row_weights, kind);
  const Checker check{"expert_glu_backward"};
  const int64_t width = shared_proj_in.size(2), rows = pre_activation.size(0);
  const Tensor shared = shared_in.contiguous(), routed = routed_in.contiguous();
  const Tensor offsets = expert_offsets.contiguous();
  const Tensor shared_proj = shared_proj_in.contiguous(), routed_proj = routed_proj_in.contiguous();
  const Tensor pre = pre_activation.contiguous(), weights = row_weights.contiguous();
  cuda::ExpertGluBackward args{};
  args.product = sizes_of(check.element("routed_rows", routed), num_tokens, shared_proj.size(0), experts_of(offsets),
                          routed.size(0), routed.size(1), width, true);
  args.kind = check.activation(kind);
  args.product.one_row_a_token = shared.size(0) == num_tokens;
  args.product.shared_rows = shared.const_data_ptr();
  args.product.routed_rows = routed.const_data_ptr();
  args.product.shared_proj = shared_proj.const_data_ptr();
  args.product.routed_proj = routed_proj.const_data_ptr();
  args.pre_activation = pre.const_data_ptr();
  if (!fused(routed, args)) {
    const Tensor grad =
        UMMRM_DISPATCHED(expert_gemm)
            .call(shared, routed, shared_proj, routed_proj, offsets, num_tokens, std::nullopt, std::nullopt, true);
    return UMMRM_DISPATCHED(activation_backward).call(grad, pre, weights, kind, true);
  }
  args.product.expert_offsets = offsets.const_data_ptr<int32_t>();
  args.product.spare_multiprocessors = spare_multiprocessors();
  args.row_weights = static_cast<const float*>(weights.const_data_ptr());
  const Tensor grad_pre = at::empty(pre.sizes(), pre.options()), weighted = at::empty({rows, width}, pre.options());
  const Tensor dots = at::empty({rows}, weights.options());
  args.grad_pre_activation = grad_pre.mutable_data_ptr();
  args.weighted_activation = weighted.mutable_data_ptr();
  args.row_dots = static_cast<float*>(dots.mutable_data_ptr());
  on_cuda(check, routed, [&](auto stream) {
    const Tensor space = workspace(cuda::expert_glu_workspace(args), routed);
    return cuda::expert_glu_backward(args, space.mutable_data_ptr(), stream);
  });
  return {grad_pre, weighted, dots};
}

UMMRM_REGISTER(m) {
  m.impl("expert_glu", &expert_glu);
  m.impl("expert_glu_backward", &expert_glu_backward);
}

}  // namespace ummrm
