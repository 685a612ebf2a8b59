// Operators of the stem `expert_gemm`: expert_gemm, expert_gemm_wgrad and its _add, expert_bias_grad. On a CPU a
// product an expert by the BLAS behind at::mm, into preallocated slices, shared experts as groups like the routed ones.
// On CUDA one launch for all of them, since only the device knows how many rows each has; where there are no routed
// experts, the host knows it too and cuBLAS has the products.
#include "ummrm/expert_gemm.h"

#include <ATen/Context.h>

#include "checks.h"
#include "device.h"
#include "expert_glu.h"
#include "gemm.h"

namespace ummrm {
namespace {

// What the host knows of the groups everywhere.
struct Counts {
  int64_t num_tokens, num_shared, num_experts, slots;
  int64_t shared_rows() const { return num_shared * num_tokens; }
  int64_t rows() const { return shared_rows() + slots; }
};

// One expert's rows: [begin, end) of the shared rows if `shared`, else of the sorted ones.
struct Group {
  bool shared;
  int64_t expert;  // within its kind
  int64_t begin, end;
  int64_t out_begin;  // in the combined buffer
};

// Shared rows are [S*T, ...], or [T, ...] and read by every shared expert.
bool one_row_a_token(const Counts& counts, const Tensor& shared) { return shared.size(0) == counts.num_tokens; }

Tensor rows_of(const Counts& counts, const Group& group, const Tensor& shared, const Tensor& routed) {
  if (!group.shared) return routed.slice(0, group.begin, group.end);
  return one_row_a_token(counts, shared) ? shared : shared.slice(0, group.begin, group.end);
}

// Of arguments that have been checked.
Counts counts_of(const Tensor& expert_offsets, const Tensor& routed, int64_t num_tokens, int64_t num_shared) {
  return {num_tokens, num_shared, expert_offsets.numel() - 1, routed.size(0)};
}

// Whether the host can tell all groups without waiting for a device.
bool known_to_host(const Counts& counts, const Tensor& expert_offsets) {
  return on_host(expert_offsets) || counts.num_experts == 0;
}

// All groups, shared experts first; `live` becomes the number of sorted rows that are of some expert.
std::vector<Group> groups_of(const Counts& counts, const Tensor& expert_offsets, int64_t* live) {
  std::vector<Group> groups;
  for (int64_t s = 0; s < counts.num_shared; ++s) {
    const int64_t begin = s * counts.num_tokens;
    groups.push_back({true, s, begin, begin + counts.num_tokens, begin});
  }
  *live = 0;
  if (counts.num_experts == 0) return groups;  // the offsets may be on a device
  const Tensor offsets = expert_offsets.contiguous();
  const auto* at = offsets.const_data_ptr<int32_t>();
  for (int64_t e = 0; e < counts.num_experts; ++e) {
    groups.push_back({false, e, at[e], at[e + 1], counts.shared_rows() + at[e]});
  }
  *live = at[counts.num_experts];
  return groups;
}

// Sizes first: what the rows must be is computed from them.
void check_sizes(const Checker& check, int64_t num_tokens, const char* shared_name, int64_t num_shared) {
  check.count("num_tokens", num_tokens, 0);
  check.count(shared_name, num_shared, 0);
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

// torch's own setting: torch.backends.cuda.matmul.fp32_precision, or allow_tf32, or set_float32_matmul_precision.
bool allow_tf32() {
  const auto& context = at::globalContext();
  return context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
}

int64_t slots_of(const Tensor& routed) { return routed.dim() == 2 ? routed.size(0) : -1; }

void check_proj(const Checker& check, const char* name, const Tensor& tensor, const Tensor& rows, at::IntArrayRef shape,
                const char* words) {
  check.device(name, tensor, rows, "routed_rows");
  check.dtype(name, tensor, rows.scalar_type(), "rows and projections share a dtype");
  check.shape(name, tensor, shape, words, "the experts' parameters must fit the rows");
}

void check_wgrad(const Checker& check, const Tensor& grad_shared_rows, const Tensor& grad_routed_rows,
                 const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& expert_offsets, int64_t num_tokens,
                 int64_t num_shared_experts) {
  const int64_t slots = slots_of(routed_rows);
  check_sizes(check, num_tokens, "num_shared_experts", num_shared_experts);
  check_rows(check, "shared_rows", shared_rows, "routed_rows", routed_rows, num_tokens, num_shared_experts, slots, -1);
  check_rows(check, "grad_shared_rows", grad_shared_rows, "grad_routed_rows", grad_routed_rows, num_tokens,
             num_shared_experts, slots, -1);
  check.dtype("grad_routed_rows", grad_routed_rows, routed_rows.scalar_type(),
              "rows and their gradients share a dtype");
  check.device("grad_routed_rows", grad_routed_rows, routed_rows, "routed_rows");
  check.offsets(expert_offsets, slots, routed_rows, "routed_rows");
}

}  // namespace

int spare_multiprocessors() { return at::globalContext()._SMCarveout_EXPERIMENTAL().value_or(0); }

void check_product(const Checker& check, const Tensor& shared_rows, const Tensor& routed_rows,
                   const Tensor& shared_proj, const Tensor& routed_proj, const Tensor& expert_offsets,
                   int64_t num_tokens, const OptionalTensor& shared_bias, const OptionalTensor& routed_bias,
                   bool transpose) {
  check.shape("shared_proj", shared_proj, {-1, -1, -1}, "[S, N, D]", "stack the experts' projections");
  const int64_t num_shared = shared_proj.size(0), slots = slots_of(routed_rows);
  const int64_t in = shared_proj.size(transpose ? 1 : 2), out_width = shared_proj.size(transpose ? 2 : 1);
  check_sizes(check, num_tokens, "shared_proj.shape[0]", num_shared);
  check_rows(check, "shared_rows", shared_rows, "routed_rows", routed_rows, num_tokens, num_shared, slots, in);
  check.offsets(expert_offsets, slots, routed_rows, "routed_rows");
  const int64_t experts = expert_offsets.numel() - 1;
  check_proj(check, "shared_proj", shared_proj, routed_rows, {-1, -1, -1}, "[S, N, D]");
  check_proj(check, "routed_proj", routed_proj, routed_rows, {experts, shared_proj.size(1), shared_proj.size(2)},
             "[E, N, D]");
  if (shared_bias.has_value())
    check_proj(check, "shared_bias", *shared_bias, routed_rows, {num_shared, out_width}, "[S, N]");
  if (routed_bias.has_value())
    check_proj(check, "routed_bias", *routed_bias, routed_rows, {experts, out_width}, "[E, N]");
  TORCH_CHECK_VALUE(!transpose || (!shared_bias.has_value() && !routed_bias.has_value()), "ummrm.expert_gemm: `",
                    shared_bias.has_value() ? "shared_bias" : "routed_bias",
                    "` must be None with transpose=True, got a tensor; an input gradient has no bias.");
}

void checks::expert_gemm(const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& shared_proj,
                         const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                         const OptionalTensor& shared_bias, const OptionalTensor& routed_bias, bool transpose) {
  check_product(Checker{"expert_gemm"}, shared_rows, routed_rows, shared_proj, routed_proj, expert_offsets, num_tokens,
                shared_bias, routed_bias, transpose);
}

void checks::expert_gemm_wgrad(const Tensor& grad_shared_rows, const Tensor& grad_routed_rows,
                               const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& expert_offsets,
                               int64_t num_tokens, int64_t num_shared_experts, bool, bool,
                               std::optional<at::ScalarType> out_dtype) {
  const Checker check{"expert_gemm_wgrad"};
  check_wgrad(check, grad_shared_rows, grad_routed_rows, shared_rows, routed_rows, expert_offsets, num_tokens,
              num_shared_experts);
  check.result("out_dtype", out_dtype, routed_rows);
}

void checks::expert_gemm_wgrad_add(const Tensor& grad_shared_rows, const Tensor& grad_routed_rows,
                                   const Tensor& shared_rows, const Tensor& routed_rows, const Tensor& expert_offsets,
                                   int64_t num_tokens, int64_t num_shared_experts, const OptionalTensor& shared_sum,
                                   const OptionalTensor& routed_sum) {
  const Checker check{"expert_gemm_wgrad_add"};
  check_wgrad(check, grad_shared_rows, grad_routed_rows, shared_rows, routed_rows, expert_offsets, num_tokens,
              num_shared_experts);
  const auto check_sum = [&](const char* name, const OptionalTensor& sum, int64_t experts, const char* words) {
    if (!sum.has_value()) return;
    check.device(name, *sum, routed_rows, "routed_rows");
    check.result(name, sum->scalar_type(), routed_rows);
    check.shape(name, *sum, {experts, grad_routed_rows.size(1), routed_rows.size(1)}, words,
                "pass a buffer of the projection's shape");
    TORCH_CHECK_VALUE(sum->is_contiguous(), "ummrm.", check.op, ": `", name, "` must be contiguous, got strides ",
                      sum->strides(), "; pass a contiguous buffer.");
  };
  check_sum("shared_sum", shared_sum, num_shared_experts, "[S, grad_width, width]");
  check_sum("routed_sum", routed_sum, expert_offsets.numel() - 1, "[E, grad_width, width]");
  if (shared_sum.has_value() && routed_sum.has_value()) {
    check.dtype("routed_sum", *routed_sum, shared_sum->scalar_type(),
                "give both sums one dtype, or call once for each");
  }
}

void checks::expert_bias_grad(const Tensor& shared_rows, const Tensor& routed_rows, const OptionalTensor& row_weights,
                              const Tensor& expert_offsets, int64_t num_tokens, int64_t num_shared_experts, bool,
                              bool) {
  const Checker check{"expert_bias_grad"};
  const int64_t slots = slots_of(routed_rows);
  check_sizes(check, num_tokens, "num_shared_experts", num_shared_experts);
  check_rows(check, "shared_rows", shared_rows, "routed_rows", routed_rows, num_tokens, num_shared_experts, slots, -1);
  check.offsets(expert_offsets, slots, routed_rows, "routed_rows");
  if (row_weights.has_value()) {
    check.device("row_weights", *row_weights, routed_rows, "routed_rows");
    check.shape("row_weights", *row_weights, {num_shared_experts * num_tokens + slots}, "[S*T + T*K]",
                "give one weight a row");
    check.dtype("row_weights", *row_weights, accumulator(routed_rows),
                "gate weights stay in fp32 (fp64 for fp64 rows)");
  }
}

Tensor expert_gemm(const Tensor& shared_rows_in, const Tensor& routed_rows_in, const Tensor& shared_proj,
                   const Tensor& routed_proj, const Tensor& expert_offsets, int64_t num_tokens,
                   const OptionalTensor& shared_bias, const OptionalTensor& routed_bias, bool transpose) {
  checks::expert_gemm(shared_rows_in, routed_rows_in, shared_proj, routed_proj, expert_offsets, num_tokens, shared_bias,
                      routed_bias, transpose);
  const Checker check{"expert_gemm"};
  const Counts counts = counts_of(expert_offsets, routed_rows_in, num_tokens, shared_proj.size(0));
  const int64_t num_shared = counts.num_shared, experts = counts.num_experts, slots = counts.slots;
  const int64_t in = shared_proj.size(transpose ? 1 : 2), out_width = shared_proj.size(transpose ? 2 : 1);
  const DType element = check.element("routed_rows", routed_rows_in);
  const Tensor shared_rows = shared_rows_in.contiguous(), routed_rows = routed_rows_in.contiguous();
  const Tensor out = at::empty({counts.rows(), out_width}, routed_rows.options());
  if (known_to_host(counts, expert_offsets)) {
    int64_t live = 0;
    for (const Group& group : groups_of(counts, expert_offsets, &live)) {
      if (group.end == group.begin) continue;
      const Tensor proj = (group.shared ? shared_proj : routed_proj)[group.expert];
      const OptionalTensor& biases = group.shared ? shared_bias : routed_bias;
      const OptionalTensor bias = biases.has_value() ? OptionalTensor((*biases)[group.expert]) : std::nullopt;
      product_into(out.slice(0, group.out_begin, group.out_begin + group.end - group.begin),
                   rows_of(counts, group, shared_rows, routed_rows), transpose ? proj : proj.t(), bias);
    }
    if (live < slots) out.slice(0, counts.shared_rows() + live).zero_();
    return out;
  }
  const Tensor offsets = expert_offsets.contiguous();
  const Tensor projs[] = {shared_proj.contiguous(), routed_proj.contiguous()};
  const OptionalTensor biases[] = {contiguous(shared_bias), contiguous(routed_bias)};
  const cuda::ExpertGemm args{element,
                              num_tokens,
                              num_shared,
                              experts,
                              slots,
                              in,
                              out_width,
                              transpose,
                              one_row_a_token(counts, shared_rows),
                              shared_rows.const_data_ptr(),
                              routed_rows.const_data_ptr(),
                              projs[0].const_data_ptr(),
                              projs[1].const_data_ptr(),
                              data_or_null(biases[0]),
                              data_or_null(biases[1]),
                              offsets.const_data_ptr<int32_t>(),
                              out.mutable_data_ptr(),
                              spare_multiprocessors(),
                              allow_tf32()};
  on_cuda(check, out, [&](auto stream) {
    const Tensor space = workspace(cuda::expert_gemm_workspace(args), out);
    return cuda::expert_gemm(args, space.mutable_data_ptr(), stream);
  });
  return out;
}

namespace {

// The weight gradients of what has been checked, into `shared_out` and `routed_out`, which are not defined where not
// needed: instead of what they hold, or with `add` on top of it.
void wgrad_into(const Checker& check, const Tensor& grad_shared_in, const Tensor& grad_routed_in,
                const Tensor& shared_in, const Tensor& routed_in, const Tensor& expert_offsets, int64_t num_tokens,
                int64_t num_shared_experts, const Tensor& shared_out, const Tensor& routed_out, bool add) {
  if (!shared_out.defined() && !routed_out.defined()) return;
  const Counts counts = counts_of(expert_offsets, routed_in, num_tokens, num_shared_experts);
  const DType element = check.element("routed_rows", routed_in);
  const auto result = (shared_out.defined() ? shared_out : routed_out).scalar_type();
  const int64_t rows_width = routed_in.size(1), grad_width = grad_routed_in.size(1);
  const Tensor shared = shared_in.contiguous(), routed = routed_in.contiguous();
  const Tensor grad_shared = grad_shared_in.contiguous(), grad_routed = grad_routed_in.contiguous();
  if (known_to_host(counts, expert_offsets)) {
    int64_t live = 0;
    for (const Group& group : groups_of(counts, expert_offsets, &live)) {
      const Tensor& outs = group.shared ? shared_out : routed_out;
      if (!outs.defined()) continue;
      const Tensor out = outs[group.expert];
      if (group.end == group.begin) {
        if (!add) out.zero_();
        continue;
      }
      // no library's product is wider than what it takes
      const Tensor grads = rows_of(counts, group, grad_shared, grad_routed).to(result).t(),
                   rows = rows_of(counts, group, shared, routed).to(result);
      add ? product_onto(out, grads, rows) : product_into(out, grads, rows);
    }
    return;
  }
  const Tensor offsets = expert_offsets.contiguous();
  cuda::ExpertGemmWgrad args{element,
                             result == routed_in.scalar_type() ? element : DType::f32,
                             num_tokens,
                             num_shared_experts,
                             counts.num_experts,
                             counts.slots,
                             rows_width,
                             grad_width,
                             one_row_a_token(counts, shared),
                             one_row_a_token(counts, grad_shared),
                             shared.const_data_ptr(),
                             routed.const_data_ptr(),
                             grad_shared.const_data_ptr(),
                             grad_routed.const_data_ptr(),
                             offsets.const_data_ptr<int32_t>(),
                             shared_out.defined() ? shared_out.mutable_data_ptr() : nullptr,
                             routed_out.defined() ? routed_out.mutable_data_ptr() : nullptr,
                             spare_multiprocessors(),
                             allow_tf32(),
                             add};
  bool in_place = true;
  on_cuda(check, routed, [&](auto stream) {
    in_place = !add || cuda::expert_gemm_wgrad_adds(args);
    if (!in_place) return 0;
    const Tensor space = workspace(cuda::expert_gemm_wgrad_workspace(args), routed);
    return cuda::expert_gemm_wgrad(args, space.mutable_data_ptr(), stream);
  });
  if (in_place) return;
  const auto like = [](const Tensor& out) { return out.defined() ? at::empty(out.sizes(), out.options()) : out; };
  const Tensor shared_grad = like(shared_out), routed_grad = like(routed_out);
  wgrad_into(check, grad_shared, grad_routed, shared, routed, offsets, num_tokens, num_shared_experts, shared_grad,
             routed_grad, false);
  if (shared_out.defined()) shared_out.add_(shared_grad);
  if (routed_out.defined()) routed_out.add_(routed_grad);
}

}  // namespace

Tensor2 expert_gemm_wgrad(const Tensor& grad_shared_rows, const Tensor& grad_routed_rows, const Tensor& shared_rows,
                          const Tensor& routed_rows, const Tensor& expert_offsets, int64_t num_tokens,
                          int64_t num_shared_experts, bool need_shared, bool need_routed,
                          std::optional<at::ScalarType> out_dtype) {
  checks::expert_gemm_wgrad(grad_shared_rows, grad_routed_rows, shared_rows, routed_rows, expert_offsets, num_tokens,
                            num_shared_experts, need_shared, need_routed, out_dtype);
  const Checker check{"expert_gemm_wgrad"};
  check.served(routed_rows);
  const auto options = routed_rows.options().dtype(check.result("out_dtype", out_dtype, routed_rows));
  const auto out_of = [&](int64_t experts) {
    return at::empty({experts, grad_routed_rows.size(1), routed_rows.size(1)}, options);
  };
  const Tensor shared_grad = need_shared ? out_of(num_shared_experts) : Tensor();
  const Tensor routed_grad = need_routed ? out_of(expert_offsets.numel() - 1) : Tensor();
  wgrad_into(check, grad_shared_rows, grad_routed_rows, shared_rows, routed_rows, expert_offsets, num_tokens,
             num_shared_experts, shared_grad, routed_grad, false);
  const auto or_empty = [&](const Tensor& grad) { return grad.defined() ? grad : at::empty({0}, options); };
  return {or_empty(shared_grad), or_empty(routed_grad)};
}

void expert_gemm_wgrad_add(const Tensor& grad_shared_rows, const Tensor& grad_routed_rows, const Tensor& shared_rows,
                           const Tensor& routed_rows, const Tensor& expert_offsets, int64_t num_tokens,
                           int64_t num_shared_experts, const OptionalTensor& shared_sum,
                           const OptionalTensor& routed_sum) {
  checks::expert_gemm_wgrad_add(grad_shared_rows, grad_routed_rows, shared_rows, routed_rows, expert_offsets,
                                num_tokens, num_shared_experts, shared_sum, routed_sum);
  const auto or_undefined = [](const OptionalTensor& sum) { return sum.has_value() ? *sum : Tensor(); };
  wgrad_into(Checker{"expert_gemm_wgrad_add"}, grad_shared_rows, grad_routed_rows, shared_rows, routed_rows,
             expert_offsets, num_tokens, num_shared_experts, or_undefined(shared_sum), or_undefined(routed_sum), true);
}

Tensor2 expert_bias_grad(const Tensor& shared_in, const Tensor& routed_in, const OptionalTensor& row_weights_in,
                         const Tensor& expert_offsets, int64_t num_tokens, int64_t num_shared_experts, bool need_shared,
                         bool need_routed) {
  checks::expert_bias_grad(shared_in, routed_in, row_weights_in, expert_offsets, num_tokens, num_shared_experts,
                           need_shared, need_routed);
  const Checker check{"expert_bias_grad"};
  const Counts counts = counts_of(expert_offsets, routed_in, num_tokens, num_shared_experts);
  const DType element = check.element("routed_rows", routed_in);
  const Tensor shared = shared_in.contiguous(), routed = routed_in.contiguous();
  const OptionalTensor row_weights = contiguous(row_weights_in);
  const int64_t width = routed.size(1);
  const auto empty_unless = [&](bool needed, int64_t experts) {
    return needed ? at::empty({experts, width}, routed.options()) : at::empty({0}, routed.options());
  };
  const Tensor shared_grad = empty_unless(need_shared, num_shared_experts);
  const Tensor routed_grad = empty_unless(need_routed, counts.num_experts);
  if (on_host(routed)) {
    int64_t live = 0;
    for (const Group& group : groups_of(counts, expert_offsets, &live)) {
      if (!(group.shared ? need_shared : need_routed)) continue;
      const Tensor rows = rows_of(counts, group, shared, routed);
      const Tensor out = (group.shared ? shared_grad : routed_grad)[group.expert];
      const auto* weights = static_cast<const char*>(data_or_null(row_weights));
      const ColumnSums args{element,
                            rows.const_data_ptr(),
                            weights == nullptr ? nullptr : weights + group.out_begin * accumulator_bytes(element),
                            group.end - group.begin,
                            width,
                            out.mutable_data_ptr()};
      const int64_t blocks = (width + cpu::kColumnBlock - 1) / cpu::kColumnBlock;
      parallel_over(blocks, cpu::kColumnBlock * args.count,
                    [&](int64_t begin, int64_t end) { cpu::column_sums(args, begin, end); });
    }
    return {shared_grad, routed_grad};
  }
  const Tensor offsets = expert_offsets.contiguous();
  const cuda::ExpertBiasGrad args{element,
                                  num_tokens,
                                  num_shared_experts,
                                  counts.num_experts,
                                  counts.slots,
                                  width,
                                  one_row_a_token(counts, shared),
                                  shared.const_data_ptr(),
                                  routed.const_data_ptr(),
                                  static_cast<const float*>(data_or_null(row_weights)),
                                  offsets.const_data_ptr<int32_t>(),
                                  need_shared ? shared_grad.mutable_data_ptr() : nullptr,
                                  need_routed ? routed_grad.mutable_data_ptr() : nullptr};
  on_cuda(check, routed, [&](auto stream) {
    const Tensor space = workspace(cuda::expert_bias_grad_workspace(args), routed);
    return cuda::expert_bias_grad(args, space.mutable_data_ptr(), stream);
  });
  return {shared_grad, routed_grad};
}

UMMRM_REGISTER(m) {
  m.impl("expert_gemm", &expert_gemm);
  m.impl("expert_gemm_wgrad", &expert_gemm_wgrad);
  m.impl("expert_gemm_wgrad_add", &expert_gemm_wgrad_add);
  m.impl("expert_bias_grad", &expert_bias_grad);
}

}  // namespace ummrm
