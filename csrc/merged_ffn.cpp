// The FFN of the merge phase: merge_ffn, merged_ffn, merged_ffn_forward, merged_ffn_backward. One merge_experts call
// makes every tensor of a dense FFN from the experts, which is merge_ffn, and the dense FFN runs on it. Made of the
// other operators through the dispatcher. The merged tensors are not kept for backward: merging again costs (S + E + 1)
// passes over one FFN, keeping them would cost a dense model's memory.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "check.h"
#include "checks.h"

namespace ummrm {
namespace {

// The FFN's tensors as merge_experts takes them: each projection's rows have coefficients of their own, so a fused
// gate-and-up projection enters as two views. `projection[i]` is the row of the coefficients for list entry i.
struct Parts {
  std::vector<Tensor> shared, routed;
  std::vector<int64_t> projection;
  int64_t num_projections, width;
  bool glu, has_up_bias, has_down_bias;

  void add(const Tensor& of_shared, const Tensor& of_routed, int64_t row) {
    shared.push_back(of_shared);
    routed.push_back(of_routed);
    projection.push_back(row);
  }
  void add_up(const Tensor& of_shared, const Tensor& of_routed) {
    if (!glu) return add(of_shared, of_routed, 0);
    add(of_shared.slice(1, 0, width), of_routed.slice(1, 0, width), 0);
    add(of_shared.slice(1, width), of_routed.slice(1, width), 1);
  }
  int64_t up_parts() const { return glu ? 2 : 1; }
  // One row a list entry; the first entries are the projections in order, biases repeat their rows. Without an index
  // tensor, which a GPU would have to wait for.
  Tensor expand(const Tensor& coefficients) const {
    if (static_cast<int64_t>(projection.size()) == num_projections) return coefficients;
    std::vector<Tensor> rows;
    for (const int64_t row : projection) rows.push_back(coefficients.slice(0, row, row + 1));
    return at::cat(rows);
  }
};

// The experts' parameters and coefficients, which must be on the device of `like` and take rows `hidden` wide (-1: of
// any width).
void check_experts(const Checker& check, const Tensor& coefficients, const Experts& p, bool glu, int64_t hidden,
                   const Tensor& like, const char* like_name) {
  check.floating("routed_up", p.routed_up);
  check.shape("routed_up", p.routed_up, {-1, -1, hidden}, "[E, 2*I or I, H]",
              "the experts must take rows of x's width");
  const int64_t num_experts = p.routed_up.size(0), pre_width = p.routed_up.size(1);
  hidden = p.routed_up.size(2);
  TORCH_CHECK_VALUE(!glu || pre_width % 2 == 0, "ummrm.", check.op,
                    ": `routed_up` must have an even number of rows with glu=True (gate | up), got ", pre_width,
                    "; concatenate gate and up, or pass glu=False.");
  check.shape("shared_up", p.shared_up, {-1, pre_width, hidden}, "[S, 2*I or I, H]",
              "shared and routed experts share a shape");
  const int64_t num_shared = p.shared_up.size(0), width = glu ? pre_width / 2 : pre_width;
  const auto parameter = [&](const char* name, const Tensor& tensor, at::IntArrayRef shape, const char* words) {
    check.device(name, tensor, like, like_name);
    check.dtype(name, tensor, p.routed_up.scalar_type(), "give the experts' parameters one dtype");
    check.shape(name, tensor, shape, words,
                "up is [n, 2*I, H] with glu=True (gate rows first) and [n, I, H] without, down [n, H, I]");
  };
  parameter("routed_up", p.routed_up, {num_experts, pre_width, hidden}, "[E, 2*I or I, H]");
  parameter("shared_up", p.shared_up, {num_shared, pre_width, hidden}, "[S, 2*I or I, H]");
  parameter("shared_down", p.shared_down, {num_shared, hidden, width}, "[S, H, I]");
  parameter("routed_down", p.routed_down, {num_experts, hidden, width}, "[E, H, I]");
  const auto pair = [&](const char* shared_name, const OptionalTensor& shared, const char* routed_name,
                        const OptionalTensor& routed, int64_t size) {
    TORCH_CHECK_VALUE(shared.has_value() == routed.has_value(), "ummrm.", check.op, ": `", shared_name, "` and `",
                      routed_name,
                      "` must both be given or both be None, got only one; pass the other, zeros if it has none.");
    if (!shared.has_value()) return;
    parameter(shared_name, *shared, {num_shared, size}, "[S, width]");
    parameter(routed_name, *routed, {num_experts, size}, "[E, width]");
  };
  pair("shared_up_bias", p.shared_up_bias, "routed_up_bias", p.routed_up_bias, pre_width);
  pair("shared_down_bias", p.shared_down_bias, "routed_down_bias", p.routed_down_bias, hidden);
  check.device("coefficients", coefficients, like, like_name);
  check.shape("coefficients", coefficients, {glu ? 3 : 2, num_shared + num_experts}, glu ? "[3, S + E]" : "[2, S + E]",
              "one row for each of gate, up and down (up and down without glu), shared experts first");
  check.dtype("coefficients", coefficients, accumulator(p.routed_up),
              "coefficients stay in fp32 (fp64 for fp64 experts)");
}

void check_arguments(const Checker& check, const Tensor& x, const Tensor& coefficients, const Experts& p,
                     string_view activation, bool glu) {
  check.shape("x", x, {-1, -1}, "[T, H]", "flatten batch and sequence into tokens first");
  check.floating("x", x);
  check.activation(activation);
  check_experts(check, coefficients, p, glu, x.size(1), x, "x");
}

// Of arguments that have been checked.
Parts parts_of(const Experts& p, bool glu) {
  const int64_t pre_width = p.routed_up.size(1);
  Parts parts{{}, {}, {}, glu ? 3 : 2, glu ? pre_width / 2 : pre_width, glu, false, false};
  parts.has_up_bias = p.shared_up_bias.has_value();
  parts.has_down_bias = p.shared_down_bias.has_value();
  parts.add_up(p.shared_up, p.routed_up);
  parts.add(p.shared_down, p.routed_down, parts.num_projections - 1);
  if (parts.has_up_bias) parts.add_up(*p.shared_up_bias, *p.routed_up_bias);
  if (parts.has_down_bias) parts.add(*p.shared_down_bias, *p.routed_down_bias, parts.num_projections - 1);
  return parts;
}

// Gate and up rows one above the other, cast on the way; an extra pass over 1/(S + E + 1) of what merging reads.
Tensor stacked(const Tensor* parts, int64_t count, at::ScalarType dtype) {
  if (count == 1) return parts[0].to(dtype);
  auto sizes = parts[0].sizes().vec();
  sizes[0] *= count;
  const Tensor out = at::empty(sizes, parts[0].options().dtype(dtype));
  for (int64_t i = 0; i < count; ++i) out.slice(0, i * parts[0].size(0), (i + 1) * parts[0].size(0)).copy_(parts[i]);
  return out;
}

// The merged tensors that there are, in `dtype`: up, down, up's bias, down's bias.
std::vector<Tensor> merge(const Parts& parts, const Tensor& coefficients, at::ScalarType dtype) {
  const auto merged = UMMRM_DISPATCHED(merge_experts).call(parts.shared, parts.routed, parts.expand(coefficients));
  std::vector<Tensor> tensors;
  const Tensor* next = merged.data();
  const auto take = [&](int64_t count) {
    tensors.push_back(stacked(next, count, dtype));
    next += count;
  };
  take(parts.up_parts());
  take(1);
  if (parts.has_up_bias) take(parts.up_parts());
  if (parts.has_down_bias) take(1);
  return tensors;
}

// The merged FFN in x's dtype, each tensor as a group of one shared expert: [1, ...].
struct Dense {
  Tensor up, down;
  OptionalTensor up_bias, down_bias;

  Dense(const Parts& parts, const Tensor& coefficients, at::ScalarType dtype) {
    const auto merged = merge(parts, coefficients, dtype);
    up = merged[0].unsqueeze(0);
    down = merged[1].unsqueeze(0);
    if (parts.has_up_bias) up_bias = merged[2].unsqueeze(0);
    if (parts.has_down_bias) down_bias = merged.back().unsqueeze(0);
  }
};

// rows @ proj^T + bias, or rows @ proj: expert_gemm with the dense tensor as its only, shared, expert.
Tensor dense_gemm(const Tensor& rows, const Tensor& proj, const OptionalTensor& bias, bool transpose) {
  const Tensor none = proj.slice(0, 0, 0), offsets = at::zeros({1}, rows.options().dtype(at::kInt));
  return UMMRM_DISPATCHED(expert_gemm)
      .call(rows, rows.slice(0, 0, 0), proj, none, offsets, rows.size(0), bias, std::nullopt, transpose);
}

Tensor dense_wgrad(const Tensor& grad, const Tensor& rows) {
  const Tensor offsets = at::zeros({1}, rows.options().dtype(at::kInt));
  return std::get<0>(UMMRM_DISPATCHED(expert_gemm_wgrad)
                         .call(grad, grad.slice(0, 0, 0), rows, rows.slice(0, 0, 0), offsets, rows.size(0), 1, true,
                               false, std::nullopt))[0];
}

Tensor dense_bias_grad(const Tensor& grad) {
  const Tensor offsets = at::zeros({1}, grad.options().dtype(at::kInt));
  return std::get<0>(UMMRM_DISPATCHED(expert_bias_grad)
                         .call(grad, grad.slice(0, 0, 0), std::nullopt, offsets, grad.size(0), 1, true, false))[0];
}

}  // namespace

void checks::merge_ffn(const Tensor& coefficients, const Tensor& shared_up, const Tensor& routed_up,
                       const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                       const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                       const OptionalTensor& routed_down_bias, bool glu) {
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  check_experts(Checker{"merge_ffn"}, coefficients, p, glu, -1, coefficients, "coefficients");
}

void checks::merged_ffn(const Tensor& x, const Tensor& coefficients, const Tensor& shared_up, const Tensor& routed_up,
                        const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                        const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                        const OptionalTensor& routed_down_bias, string_view activation, bool glu) {
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  check_arguments(Checker{"merged_ffn"}, x, coefficients, p, activation, glu);
}

void checks::merged_ffn_backward(const Tensor& grad_out, const Tensor& x, const Tensor& coefficients,
                                 const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down,
                                 const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                                 const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                                 const OptionalTensor& routed_down_bias, const Tensor& pre_activation,
                                 string_view activation, bool glu, std::array<bool, 10>) {
  const Checker check{"merged_ffn_backward"};
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  check_arguments(check, x, coefficients, p, activation, glu);
  const char* result = "pass the gradient of merged_ffn's result";
  check.device("grad_out", grad_out, x, "x");
  check.shape("grad_out", grad_out, x.sizes(), "[T, H]", result);
  check.dtype("grad_out", grad_out, x.scalar_type(), result);
  const char* from_forward = "pass what merged_ffn_forward returned";
  check.device("pre_activation", pre_activation, x, "x");
  check.shape("pre_activation", pre_activation, {x.size(0), routed_up.size(1)}, "[T, 2*I or I]", from_forward);
  check.dtype("pre_activation", pre_activation, x.scalar_type(), from_forward);
}

std::vector<Tensor> merge_ffn(const Tensor& coefficients, const Tensor& shared_up, const Tensor& routed_up,
                              const Tensor& shared_down, const Tensor& routed_down,
                              const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
                              const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias,
                              bool glu) {
  checks::merge_ffn(coefficients, shared_up, routed_up, shared_down, routed_down, shared_up_bias, routed_up_bias,
                    shared_down_bias, routed_down_bias, glu);
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  return merge(parts_of(p, glu), coefficients, routed_up.scalar_type());
}

Tensor2 merged_ffn_forward(const Tensor& x, const Tensor& coefficients, const Tensor& shared_up,
                           const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
                           const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
                           const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias,
                           string_view activation, bool glu) {
  checks::merged_ffn(x, coefficients, shared_up, routed_up, shared_down, routed_down, shared_up_bias, routed_up_bias,
                     shared_down_bias, routed_down_bias, activation, glu);
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  const NoAutocast no_autocast;  // dtypes are settled
  const Dense dense(parts_of(p, glu), coefficients, x.scalar_type());
  const Tensor pre_activation = dense_gemm(x, dense.up, dense.up_bias, false);
  const Tensor act = UMMRM_DISPATCHED(ummrm::activation).call(pre_activation, activation, glu);
  return {dense_gemm(act, dense.down, dense.down_bias, false), pre_activation};
}

Tensor merged_ffn(const Tensor& x, const Tensor& coefficients, const Tensor& shared_up, const Tensor& routed_up,
                  const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                  const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                  const OptionalTensor& routed_down_bias, string_view activation, bool glu) {
  return std::get<0>(merged_ffn_forward(x, coefficients, shared_up, routed_up, shared_down, routed_down, shared_up_bias,
                                        routed_up_bias, shared_down_bias, routed_down_bias, activation, glu));
}

std::vector<Tensor> merged_ffn_backward(const Tensor& grad_out, const Tensor& x, const Tensor& coefficients,
                                        const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down,
                                        const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                                        const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                                        const OptionalTensor& routed_down_bias, const Tensor& pre_activation,
                                        string_view activation, bool glu, std::array<bool, 10> need) {
  checks::merged_ffn_backward(grad_out, x, coefficients, shared_up, routed_up, shared_down, routed_down, shared_up_bias,
                              routed_up_bias, shared_down_bias, routed_down_bias, pre_activation, activation, glu,
                              need);
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  const Parts parts = parts_of(p, glu);
  enum {
    kX,
    kCoefficients,
    kSharedUp,
    kRoutedUp,
    kSharedDown,
    kRoutedDown,
    kSharedUpBias,
    kRoutedUpBias,
    kSharedDownBias,
    kRoutedDownBias
  };
  const NoAutocast no_autocast;
  std::vector<Tensor> grads = empty_grads(need.size(), x);
  const bool up_weights = need[kCoefficients] || need[kSharedUp] || need[kRoutedUp];
  const bool down_weights = need[kCoefficients] || need[kSharedDown] || need[kRoutedDown];
  const bool up_bias = parts.has_up_bias && (need[kCoefficients] || need[kSharedUpBias] || need[kRoutedUpBias]);
  const bool down_bias = parts.has_down_bias && (need[kCoefficients] || need[kSharedDownBias] || need[kRoutedDownBias]);

  // Gradients of the merged tensors, in the parameters' dtype.
  const auto dtype = routed_up.scalar_type();
  Tensor grad_up, grad_down, grad_up_bias, grad_down_bias;
  if (down_bias) grad_down_bias = dense_bias_grad(grad_out).to(dtype);
  if (need[kX] || up_weights || up_bias || down_weights) {
    const Dense dense(parts, coefficients, x.scalar_type());
    // Weights of one make the activation a by-product of its backward, in the same pass.
    const OptionalTensor ones =
        down_weights ? OptionalTensor(at::ones({x.size(0)}, x.options().dtype(accumulator(x)))) : std::nullopt;
    const Tensor grad_act = dense_gemm(grad_out, dense.down, std::nullopt, true);
    const auto [grad_pre, act, dots] =
        UMMRM_DISPATCHED(activation_backward).call(grad_act, pre_activation, ones, activation, glu);
    if (down_weights) grad_down = dense_wgrad(grad_out, act).to(dtype);
    if (up_weights) grad_up = dense_wgrad(grad_pre, x).to(dtype);
    if (up_bias) grad_up_bias = dense_bias_grad(grad_pre).to(dtype);
    if (need[kX]) grads[kX] = dense_gemm(grad_pre, dense.up, std::nullopt, true);
  }

  if (need[kCoefficients]) {
    std::vector<Tensor> merged_grads;  // part by part, as merged
    const auto add_up = [&](const Tensor& grad) {
      for (const Tensor& part : grad.chunk(parts.up_parts())) merged_grads.push_back(part);
    };
    add_up(grad_up);
    merged_grads.push_back(grad_down);
    if (parts.has_up_bias) add_up(grad_up_bias);
    if (parts.has_down_bias) merged_grads.push_back(grad_down_bias);
    const Tensor dots = UMMRM_DISPATCHED(merge_experts_dots).call(merged_grads, parts.shared, parts.routed);
    Tensor total = dots.slice(0, 0, parts.num_projections);
    if (dots.size(0) > parts.num_projections) total = total.clone();
    for (int64_t i = parts.num_projections; i < dots.size(0); ++i) total[parts.projection[i]].add_(dots[i]);
    grads[kCoefficients] = total;
  }
  const Tensor of_up = coefficients.slice(0, 0, parts.up_parts()), of_down = coefficients.slice(0, parts.up_parts());
  const auto fill = [&](int64_t at, const Tensor& of, const Tensor& rows) {
    if (!need[at] && !need[at + 1]) return;
    const auto [of_shared, of_routed] =
        UMMRM_DISPATCHED(merge_experts_grads).call(of, rows, shared_up.size(0), need[at], need[at + 1]);
    if (need[at]) grads[at] = of_shared;
    if (need[at + 1]) grads[at + 1] = of_routed;
  };
  fill(kSharedUp, grad_up, of_up);
  fill(kSharedDown, grad_down, of_down);
  if (parts.has_up_bias) fill(kSharedUpBias, grad_up_bias, of_up);
  if (parts.has_down_bias) fill(kSharedDownBias, grad_down_bias, of_down);
  return grads;
}

TORCH_LIBRARY_IMPL(ummrm, CompositeExplicitAutograd, m) {
  m.impl("merge_ffn", &merge_ffn);
  m.impl("merged_ffn", &merged_ffn);
  m.impl("merged_ffn_forward", &merged_ffn_forward);
  m.impl("merged_ffn_backward", &merged_ffn_backward);
}

}  // namespace ummrm
