// Operators of the stem `expert_gemm` on the CPU: expert_gemm, expert_gemm_wgrad, expert_bias_grad. A product an
// expert, into preallocated slices, shared experts as groups like the routed ones; experts without rows cost nothing.
#include "ummrm/expert_gemm.h"

#include <torch/library.h>

#include "check.h"
#include "gemm.h"
#include "ops.h"

namespace ummrm {
namespace {

// One expert's rows: [begin, end) of the shared rows if expert < num_shared, else of the sorted ones.
struct Group {
  bool shared;
  int64_t expert;  // within its kind
  int64_t begin, end;
  int64_t out_begin;  // in the combined buffer
};

struct Layout {
  int64_t num_tokens, num_shared, slots, live;
  std::vector<Group> groups;

  // A shared expert's group in rows that are either [S*T, ...] or [T, ...], read by every shared expert.
  Tensor shared_rows(const Tensor& rows, const Group& group) const {
    return rows.size(0) == num_tokens ? rows : rows.slice(0, group.begin, group.end);
  }
  Tensor rows_of(const Tensor& shared, const Tensor& routed, const Group& group) const {
    return group.shared ? shared_rows(shared, group) : routed.slice(0, group.begin, group.end);
  }
};

Layout layout_of(const Checker& check, const Tensor& expert_offsets, const Tensor& like, int64_t slots,
                 int64_t num_tokens, int64_t num_shared) {
  check.at_least("num_tokens", num_tokens, 0);
  check.at_least("num_shared_experts", num_shared, 0);
  check.index("expert_offsets", expert_offsets, -1, "[E + 1]", like, "routed_rows");
  check.at_least("expert_offsets.numel()", expert_offsets.numel(), 1);
  check.offsets(expert_offsets, slots);
  const Tensor host = expert_offsets.contiguous();
  const auto* offsets = host.const_data_ptr<int32_t>();
  const int64_t experts = expert_offsets.numel() - 1;
  Layout layout{num_tokens, num_shared, slots, offsets[experts], {}};
  for (int64_t s = 0; s < num_shared; ++s) {
    layout.groups.push_back({true, s, s * num_tokens, (s + 1) * num_tokens, s * num_tokens});
  }
  for (int64_t e = 0; e < experts; ++e) {
    layout.groups.push_back({false, e, offsets[e], offsets[e + 1], num_shared * num_tokens + offsets[e]});
  }
  return layout;
}

void check_rows(const Checker& check, const char* shared_name, const Tensor& shared, const char* routed_name,
                const Tensor& routed, int64_t num_tokens, int64_t num_shared, int64_t slots, int64_t width) {
  check.floating(routed_name, routed);
  check.shape(routed_name, routed, {slots, width}, "[T*K, width]", "pass the rows that permute returned");
  check.device(shared_name, shared, routed, routed_name);
  check.dtype(shared_name, shared, routed.scalar_type(), "rows and projections share a dtype");
  const bool repeated = shared.dim() == 2 && shared.size(0) == num_shared * num_tokens;
  check.shape(shared_name, shared, {repeated ? num_shared * num_tokens : num_tokens, routed.size(1)},
              "[T, width] or [S*T, width]", "pass one row a token, or one a token and shared expert");
}

void check_proj(const Checker& check, const char* name, const Tensor& tensor, const Tensor& rows, at::IntArrayRef shape,
                const char* words) {
  check.device(name, tensor, rows, "routed_rows");
  check.dtype(name, tensor, rows.scalar_type(), "rows and projections share a dtype");
  check.shape(name, tensor, shape, words, "the experts' parameters must fit the rows");
}

}  // namespace

Tensor expert_gemm(const Tensor& shared_rows_in, const Tensor& routed_rows_in, const Tensor& shared_proj,
                   const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                   const OptionalTensor& shared_bias, const OptionalTensor& routed_bias, bool transpose) {
  const Checker check{"expert_gemm"};
  check.shape("shared_proj", shared_proj, {-1, -1, -1}, "[S, N, D]", "stack the experts' projections");
  const int64_t num_shared = shared_proj.size(0), slots = routed_rows_in.dim() == 2 ? routed_rows_in.size(0) : -1;
  const int64_t in = shared_proj.size(transpose ? 1 : 2), out_width = shared_proj.size(transpose ? 2 : 1);
  check_rows(check, "shared_rows", shared_rows_in, "routed_rows", routed_rows_in, num_tokens, num_shared, slots, in);
  const Layout layout = layout_of(check, expert_offsets, routed_rows_in, slots, num_tokens, num_shared);
  const int64_t experts = expert_offsets.numel() - 1;
  check_proj(check, "shared_proj", shared_proj, routed_rows_in, {-1, -1, -1}, "[S, N, D]");
  check_proj(check, "routed_proj", routed_proj, routed_rows_in, {experts, shared_proj.size(1), shared_proj.size(2)},
             "[E, N, D]");
  if (shared_bias.has_value())
    check_proj(check, "shared_bias", *shared_bias, routed_rows_in, {num_shared, out_width}, "[S, N]");
  if (routed_bias.has_value())
    check_proj(check, "routed_bias", *routed_bias, routed_rows_in, {experts, out_width}, "[E, N]");
  TORCH_CHECK_VALUE(!transpose || (!shared_bias.has_value() && !routed_bias.has_value()), "ummrm.expert_gemm: `",
                    shared_bias.has_value() ? "shared_bias" : "routed_bias",
                    "` must be None with transpose=True, got a tensor; an input gradient has no bias.");

  const Tensor shared_rows = shared_rows_in.contiguous(), routed_rows = routed_rows_in.contiguous();
  const Tensor out = at::empty({num_shared * num_tokens + slots, out_width}, routed_rows.options());
  for (const Group& group : layout.groups) {
    if (group.end == group.begin) continue;
    const Tensor proj = (group.shared ? shared_proj : routed_proj)[group.expert];
    const OptionalTensor& biases = group.shared ? shared_bias : routed_bias;
    const OptionalTensor bias = biases.has_value() ? OptionalTensor((*biases)[group.expert]) : std::nullopt;
    product_into(out.slice(0, group.out_begin, group.out_begin + group.end - group.begin),
                 layout.rows_of(shared_rows, routed_rows, group), transpose ? proj : proj.t(), bias);
  }
  if (layout.live < slots) out.slice(0, num_shared * num_tokens + layout.live).zero_();
  return out;
}

Tensor2 expert_gemm_wgrad(const Tensor& grad_shared_in, const Tensor& grad_routed_in, const Tensor& shared_in,
                          const Tensor& routed_in, const Tensor& expert_offsets, int64_t num_tokens,
                          int64_t num_shared_experts, bool need_shared, bool need_routed) {
  const Checker check{"expert_gemm_wgrad"};
  const int64_t slots = routed_in.dim() == 2 ? routed_in.size(0) : -1;
  check_rows(check, "shared_rows", shared_in, "routed_rows", routed_in, num_tokens, num_shared_experts, slots, -1);
  check_rows(check, "grad_shared_rows", grad_shared_in, "grad_routed_rows", grad_routed_in, num_tokens,
             num_shared_experts, slots, -1);
  check.dtype("grad_routed_rows", grad_routed_in, routed_in.scalar_type(), "rows and their gradients share a dtype");
  const Layout layout = layout_of(check, expert_offsets, routed_in, slots, num_tokens, num_shared_experts);
  const int64_t experts = expert_offsets.numel() - 1, rows_width = routed_in.size(1),
                grad_width = grad_routed_in.size(1);
  const Tensor shared = shared_in.contiguous(), routed = routed_in.contiguous();
  const Tensor grad_shared = grad_shared_in.contiguous(), grad_routed = grad_routed_in.contiguous();
  const auto options = routed.options();
  const Tensor shared_grad =
      need_shared ? at::empty({num_shared_experts, grad_width, rows_width}, options) : at::empty({0}, options);
  const Tensor routed_grad =
      need_routed ? at::empty({experts, grad_width, rows_width}, options) : at::empty({0}, options);
  for (const Group& group : layout.groups) {
    if (!(group.shared ? need_shared : need_routed)) continue;
    const Tensor out = (group.shared ? shared_grad : routed_grad)[group.expert];
    if (group.end == group.begin) {
      out.zero_();
      continue;
    }
    product_into(out, layout.rows_of(grad_shared, grad_routed, group).t(), layout.rows_of(shared, routed, group));
  }
  return {shared_grad, routed_grad};
}

Tensor2 expert_bias_grad(const Tensor& shared_in, const Tensor& routed_in, const OptionalTensor& row_weights_in,
                         const Tensor& expert_offsets, int64_t num_tokens, int64_t num_shared_experts, bool need_shared,
                         bool need_routed) {
  const Checker check{"expert_bias_grad"};
  const int64_t slots = routed_in.dim() == 2 ? routed_in.size(0) : -1;
  check_rows(check, "shared_rows", shared_in, "routed_rows", routed_in, num_tokens, num_shared_experts, slots, -1);
  const Layout layout = layout_of(check, expert_offsets, routed_in, slots, num_tokens, num_shared_experts);
  if (row_weights_in.has_value()) {
    check.device("row_weights", *row_weights_in, routed_in, "routed_rows");
    check.shape("row_weights", *row_weights_in, {num_shared_experts * num_tokens + slots}, "[S*T + T*K]",
                "give one weight a row");
    check.dtype("row_weights", *row_weights_in, accumulator(routed_in),
                "gate weights stay in fp32 (fp64 for fp64 rows)");
  }
  const Tensor shared = shared_in.contiguous(), routed = routed_in.contiguous();
  const OptionalTensor row_weights = contiguous(row_weights_in);
  const int64_t width = routed.size(1), acc_bytes = accumulator_bytes(check.element("routed_rows", routed));
  const Tensor shared_grad = at::empty(
      need_shared ? std::vector<int64_t>{num_shared_experts, width} : std::vector<int64_t>{0}, routed.options());
  const Tensor routed_grad =
      at::empty(need_routed ? std::vector<int64_t>{expert_offsets.numel() - 1, width} : std::vector<int64_t>{0},
                routed.options());
  for (const Group& group : layout.groups) {
    if (!(group.shared ? need_shared : need_routed)) continue;
    const Tensor rows = layout.rows_of(shared, routed, group);
    const Tensor out = (group.shared ? shared_grad : routed_grad)[group.expert];
    const auto* weights = static_cast<const char*>(data_or_null(row_weights));
    const ColumnSums args{check.element("routed_rows", rows),
                          rows.const_data_ptr(),
                          weights == nullptr ? nullptr : weights + group.out_begin * acc_bytes,
                          group.end - group.begin,
                          width,
                          out.mutable_data_ptr()};
    const int64_t blocks = (width + cpu::kColumnBlock - 1) / cpu::kColumnBlock;
    parallel_over(blocks, cpu::kColumnBlock * args.count,
                  [&](int64_t begin, int64_t end) { cpu::column_sums(args, begin, end); });
  }
  return {shared_grad, routed_grad};
}

TORCH_LIBRARY_IMPL(ummrm, CPU, m) {
  m.impl("expert_gemm", &expert_gemm);
  m.impl("expert_gemm_wgrad", &expert_gemm_wgrad);
  m.impl("expert_bias_grad", &expert_bias_grad);
}

}  // namespace ummrm
