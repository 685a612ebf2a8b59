// The composed MoE FFN: moe_ffn, moe_ffn_forward, moe_ffn_backward and its _add. Made of the other operators through
// the dispatcher, so it follows whatever backend serves the device. Forward keeps the pre-activations and the routing
// maps; gathered inputs, activations and expert outputs are made again in backward, where they are needed at all.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "check.h"
#include "checks.h"
#include "expert_glu.h"

namespace ummrm {
namespace {

struct Sizes {
  int64_t tokens, hidden, top_k, num_shared, num_experts, pre_width, width;
  int64_t shared_rows() const { return num_shared * tokens; }
};

void check_parameter(const Checker& check, const char* name, const Tensor& tensor, const Tensor& x,
                     at::IntArrayRef shape, const char* words) {
  check.device(name, tensor, x, "x");
  check.dtype(name, tensor, x.scalar_type(), "give input and experts one dtype, or run under torch.autocast");
  check.shape(name, tensor, shape, words,
              "up is [n, 2*I, H] with glu=True (gate rows first) and [n, I, H] without, down [n, H, I]");
}

// Of arguments that have been checked.
Sizes sizes_of(const Tensor& x, const Tensor& expert_indices, const Experts& p, bool glu) {
  const int64_t pre_width = p.routed_up.size(1);
  return {x.size(0),           x.size(1), expert_indices.size(1),         p.shared_up.size(0),
          p.routed_up.size(0), pre_width, glu ? pre_width / 2 : pre_width};
}

void check_arguments(const Checker& check, const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
                     const Tensor& expert_indices, const Experts& p, string_view activation, bool glu) {
  check.shape("x", x, {-1, -1}, "[T, H]", "flatten batch and sequence into tokens first");
  check.floating("x", x);
  check.activation(activation);
  const char* from_route = "take it from ummrm.ops.route";
  check.shape("expert_indices", expert_indices, {x.size(0), -1}, "[T, K]", from_route);
  check.dtype("expert_indices", expert_indices, at::kInt, from_route);
  check.device("expert_indices", expert_indices, x, "x");
  check.count("expert_indices.shape[1]", expert_indices.size(1), 1);
  check.slots("x", x.size(0), expert_indices.size(1));
  check.shape("routed_up", p.routed_up, {-1, -1, x.size(1)}, "[E, 2*I or I, H]",
              "the experts must take rows of x's width");
  check.shape("shared_up", p.shared_up, {-1, p.routed_up.size(1), x.size(1)}, "[S, 2*I or I, H]",
              "shared and routed experts share a shape");
  const int64_t pre_width = p.routed_up.size(1);
  TORCH_CHECK_VALUE(!glu || pre_width % 2 == 0, "ummrm.", check.op,
                    ": `routed_up` must have an even number of rows with glu=True (gate | up), got ", pre_width,
                    "; concatenate gate and up, or pass glu=False.");
  const Sizes n = sizes_of(x, expert_indices, p, glu);
  check.count("shared_up.shape[0]", n.num_shared, 0);
  check_parameter(check, "shared_up", p.shared_up, x, {n.num_shared, n.pre_width, n.hidden}, "[S, 2*I or I, H]");
  check_parameter(check, "routed_up", p.routed_up, x, {n.num_experts, n.pre_width, n.hidden}, "[E, 2*I or I, H]");
  check_parameter(check, "shared_down", p.shared_down, x, {n.num_shared, n.hidden, n.width}, "[S, H, I]");
  check_parameter(check, "routed_down", p.routed_down, x, {n.num_experts, n.hidden, n.width}, "[E, H, I]");
  const auto check_bias = [&](const char* name, const OptionalTensor& bias, int64_t experts, int64_t width,
                              const char* words) {
    if (bias.has_value()) check_parameter(check, name, *bias, x, {experts, width}, words);
  };
  check_bias("shared_up_bias", p.shared_up_bias, n.num_shared, n.pre_width, "[S, 2*I or I]");
  check_bias("routed_up_bias", p.routed_up_bias, n.num_experts, n.pre_width, "[E, 2*I or I]");
  check_bias("shared_down_bias", p.shared_down_bias, n.num_shared, n.hidden, "[S, H]");
  check_bias("routed_down_bias", p.routed_down_bias, n.num_experts, n.hidden, "[E, H]");
  const char* wide = "gate weights stay in fp32 (fp64 for fp64 input)";
  check.device("shared_weight", shared_weight, x, "x");
  check.shape("shared_weight", shared_weight, {n.tokens}, "[T]", from_route);
  check.dtype("shared_weight", shared_weight, accumulator(x), wide);
  check.device("routed_weights", routed_weights, x, "x");
  check.shape("routed_weights", routed_weights, {n.tokens, n.top_k}, "[T, K]", from_route);
  check.dtype("routed_weights", routed_weights, accumulator(x), wide);
}

// The combined row buffer's two parts: the shared experts' rows and the sorted ones.
std::pair<Tensor, Tensor> split(const Tensor& rows, const Sizes& n) {
  return {rows.slice(0, 0, n.shared_rows()), rows.slice(0, n.shared_rows())};
}

// <g_t, bias_e> of every token and expert, [T, experts]: a down bias's part in its gate's gradient. `wide_grad` is g in
// the accumulator's dtype.
Tensor bias_dots(const Tensor& wide_grad, const Tensor& bias) {
  return at::matmul(wide_grad, bias.to(wide_grad.scalar_type()).t());
}

Tensor shared_gate_grad(const Tensor& dots, const Tensor& wide_grad, const OptionalTensor& bias, const Sizes& n) {
  Tensor total = dots.slice(0, 0, n.shared_rows()).view({n.num_shared, n.tokens}).sum(0);
  if (bias.has_value()) total = total + bias_dots(wide_grad, *bias).sum(1);
  return total / std::max<int64_t>(n.num_shared, 1);
}

Tensor routed_gate_grad(const Tensor& dots, const Tensor& slot_to_sorted, const Tensor& expert_indices,
                        const Tensor& wide_grad, const OptionalTensor& bias, const Sizes& n) {
  const Tensor of_slots = dots.slice(0, n.shared_rows()).index_select(0, slot_to_sorted).view({n.tokens, n.top_k});
  if (!bias.has_value() || n.num_experts == 0) return of_slots;  // no expert, no index that gather could take
  const Tensor from_bias = bias_dots(wide_grad, *bias).gather(1, expert_indices.clamp_min(0).to(at::kLong));
  return of_slots + from_bias.masked_fill(expert_indices.lt(0), 0);
}

}  // namespace

void checks::moe_ffn(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
                     const Tensor& expert_indices, const Tensor& shared_up, const Tensor& routed_up,
                     const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                     const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                     const OptionalTensor& routed_down_bias, string_view activation, bool glu) {
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  check_arguments(Checker{"moe_ffn"}, x, shared_weight, routed_weights, expert_indices, p, activation, glu);
  sort_slots(expert_indices, routed_up.size(0));
}

namespace {

void check_backward(const Checker& check, const Tensor& grad_out, const Tensor& x, const Tensor& shared_weight,
                    const Tensor& routed_weights, const Tensor& expert_indices, const Tensor& shared_up,
                    const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
                    const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
                    const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias,
                    const Tensor& pre_activation, const Tensor& slot_to_sorted, const Tensor& sorted_to_slot,
                    const Tensor& expert_offsets, string_view activation, bool glu) {
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  check_arguments(check, x, shared_weight, routed_weights, expert_indices, p, activation, glu);
  sort_slots(expert_indices, routed_up.size(0));
  const Sizes n = sizes_of(x, expert_indices, p, glu);
  const int64_t slots = n.tokens * n.top_k;
  const char* result = "pass the gradient of moe_ffn's result";
  check.device("grad_out", grad_out, x, "x");
  check.shape("grad_out", grad_out, x.sizes(), "[T, H]", result);
  check.dtype("grad_out", grad_out, x.scalar_type(), result);
  const char* from_forward = "pass what moe_ffn_forward returned";
  check.device("pre_activation", pre_activation, x, "x");
  check.shape("pre_activation", pre_activation, {n.shared_rows() + slots, n.pre_width}, "[S*T + T*K, 2*I or I]",
              from_forward);
  check.dtype("pre_activation", pre_activation, x.scalar_type(), from_forward);
  check.index("slot_to_sorted", slot_to_sorted, slots, "[T*K]", x, "x");
  check.index("sorted_to_slot", sorted_to_slot, slots, "[T*K]", x, "x");
  check.shape("expert_offsets", expert_offsets, {n.num_experts + 1}, "[E + 1]", from_forward);
  check.offsets(expert_offsets, slots, x, "x");
  check.values("slot_to_sorted", slot_to_sorted, 0, slots, "take it from ummrm.ops.sort_slots");
  check.values("sorted_to_slot", sorted_to_slot, 0, slots, "take it from ummrm.ops.sort_slots");
}

}  // namespace

void checks::moe_ffn_backward(const Tensor& grad_out, const Tensor& x, const Tensor& shared_weight,
                              const Tensor& routed_weights, const Tensor& expert_indices, const Tensor& shared_up,
                              const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
                              const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
                              const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias,
                              const Tensor& pre_activation, const Tensor& slot_to_sorted, const Tensor& sorted_to_slot,
                              const Tensor& expert_offsets, string_view activation, bool glu, std::array<bool, 11>) {
  check_backward(Checker{"moe_ffn_backward"}, grad_out, x, shared_weight, routed_weights, expert_indices, shared_up,
                 routed_up, shared_down, routed_down, shared_up_bias, routed_up_bias, shared_down_bias,
                 routed_down_bias, pre_activation, slot_to_sorted, sorted_to_slot, expert_offsets, activation, glu);
}

void checks::moe_ffn_backward_add(const Tensor& grad_out, const Tensor& x, const Tensor& shared_weight,
                                  const Tensor& routed_weights, const Tensor& expert_indices, const Tensor& shared_up,
                                  const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
                                  const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
                                  const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias,
                                  const Tensor& pre_activation, const Tensor& slot_to_sorted,
                                  const Tensor& sorted_to_slot, const Tensor& expert_offsets, string_view activation,
                                  bool glu, std::array<bool, 11>, const OptionalTensor& shared_up_sum,
                                  const OptionalTensor& routed_up_sum, const OptionalTensor& shared_down_sum,
                                  const OptionalTensor& routed_down_sum) {
  const Checker check{"moe_ffn_backward_add"};
  check_backward(check, grad_out, x, shared_weight, routed_weights, expert_indices, shared_up, routed_up, shared_down,
                 routed_down, shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias, pre_activation,
                 slot_to_sorted, sorted_to_slot, expert_offsets, activation, glu);
  const auto check_sum = [&](const char* name, const OptionalTensor& sum, const Tensor& projection) {
    if (!sum.has_value()) return;
    check.device(name, *sum, x, "x");
    check.result(name, sum->scalar_type(), x);
    check.shape(name, *sum, projection.sizes(), "the projection's shape", "pass a buffer like the projection");
  };
  check_sum("shared_up_sum", shared_up_sum, shared_up);
  check_sum("routed_up_sum", routed_up_sum, routed_up);
  check_sum("shared_down_sum", shared_down_sum, shared_down);
  check_sum("routed_down_sum", routed_down_sum, routed_down);
}

Tensor5 moe_ffn_forward(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
                        const Tensor& expert_indices, const Tensor& shared_up, const Tensor& routed_up,
                        const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                        const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                        const OptionalTensor& routed_down_bias, string_view activation, bool glu) {
  checks::moe_ffn(x, shared_weight, routed_weights, expert_indices, shared_up, routed_up, shared_down, routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias, activation, glu);
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  const Sizes n = sizes_of(x, expert_indices, p, glu);
  const NoAutocast no_autocast;  // dtypes are settled
  const auto [slot_to_sorted, sorted_to_slot, offsets] =
      UMMRM_DISPATCHED(sort_slots).call(expert_indices, n.num_experts);
  Tensor pre_activation, act;
  {
    const Tensor gathered = UMMRM_DISPATCHED(permute).call(x, sorted_to_slot, offsets, n.top_k);
    if (glu && glu_is_fused(x, n.num_shared, n.num_experts, gathered.size(0), n.pre_width,
                            Checker{"moe_ffn"}.activation(activation))) {
      std::tie(pre_activation, act) =
          UMMRM_DISPATCHED(expert_glu)
              .call(x, gathered, shared_up, routed_up, offsets, n.tokens, shared_up_bias, routed_up_bias, activation);
    } else {
      pre_activation =
          UMMRM_DISPATCHED(expert_gemm)
              .call(x, gathered, shared_up, routed_up, offsets, n.tokens, shared_up_bias, routed_up_bias, false);
    }
  }
  if (!act.defined()) act = UMMRM_DISPATCHED(ummrm::activation).call(pre_activation, activation, glu);
  Tensor rows;
  {
    const auto [shared, routed] = split(std::exchange(act, Tensor()), n);
    rows = UMMRM_DISPATCHED(expert_gemm)
               .call(shared, routed, shared_down, routed_down, offsets, n.tokens, shared_down_bias, routed_down_bias,
                     false);
  }
  const Tensor out = UMMRM_DISPATCHED(unpermute).call(rows, slot_to_sorted, offsets, shared_weight, routed_weights,
                                                      n.num_shared, n.top_k);
  return {out, pre_activation, slot_to_sorted, sorted_to_slot, offsets};
}

Tensor moe_ffn(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights, const Tensor& expert_indices,
               const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
               const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
               const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias, string_view activation,
               bool glu) {
  return std::get<0>(moe_ffn_forward(x, shared_weight, routed_weights, expert_indices, shared_up, routed_up,
                                     shared_down, routed_down, shared_up_bias, routed_up_bias, shared_down_bias,
                                     routed_down_bias, activation, glu));
}

namespace {

// The sums that gradients of the projections are added to, where there are any.
struct Sums {
  OptionalTensor shared_up, routed_up, shared_down, routed_down;
};

// One kind of experts' gradient of a projection: whether it is needed, and added to what or given where.
struct WeightGrad {
  bool need;
  OptionalTensor sum;
  Tensor& grad;
};

void weight_grads(const WeightGrad& shared, const WeightGrad& routed, const Tensor& grad_shared_rows,
                  const Tensor& grad_routed_rows, const Tensor& shared_rows, const Tensor& routed_rows,
                  const Tensor& offsets, const Sizes& n) {
  const auto adds = [](const WeightGrad& one) { return one.need && one.sum.has_value(); };
  const auto call_add = [&](const OptionalTensor& shared_sum, const OptionalTensor& routed_sum) {
    UMMRM_DISPATCHED(expert_gemm_wgrad_add)
        .call(grad_shared_rows, grad_routed_rows, shared_rows, routed_rows, offsets, n.tokens, n.num_shared, shared_sum,
              routed_sum);
  };
  const bool give_shared = shared.need && !adds(shared), give_routed = routed.need && !adds(routed);
  if (give_shared || give_routed) {
    auto [shared_grad, routed_grad] = UMMRM_DISPATCHED(expert_gemm_wgrad)
                                          .call(grad_shared_rows, grad_routed_rows, shared_rows, routed_rows, offsets,
                                                n.tokens, n.num_shared, give_shared, give_routed, std::nullopt);
    if (give_shared) shared.grad = shared_grad;
    if (give_routed) routed.grad = routed_grad;
  }
  if (adds(shared) && adds(routed) && shared.sum->scalar_type() == routed.sum->scalar_type()) {
    call_add(shared.sum, routed.sum);
  } else {
    if (adds(shared)) call_add(shared.sum, std::nullopt);
    if (adds(routed)) call_add(std::nullopt, routed.sum);
  }
}

std::vector<Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& shared_weight,
                             const Tensor& routed_weights, const Tensor& expert_indices, const Experts& p,
                             const Tensor& pre_activation, const Tensor& slot_to_sorted, const Tensor& sorted_to_slot,
                             const Tensor& offsets, string_view activation, bool glu, std::array<bool, 11> need,
                             const Sums& sums) {
  const auto& [shared_up, routed_up, shared_down, routed_down, shared_up_bias, routed_up_bias, shared_down_bias,
               routed_down_bias] = p;
  const Sizes n = sizes_of(x, expert_indices, p, glu);
  enum {
    kX,
    kSharedWeight,
    kRoutedWeights,
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
  const bool up_side = need[kX] || need[kSharedUp] || need[kRoutedUp] || need[kSharedUpBias] || need[kRoutedUpBias];
  const bool hidden_side =
      up_side || need[kSharedWeight] || need[kRoutedWeights] || need[kSharedDown] || need[kRoutedDown];

  // The gate weight of each row of the combined buffer.
  const Tensor row_weights = at::cat(
      {n.num_shared == 1 ? shared_weight : (shared_weight / std::max<int64_t>(n.num_shared, 1)).repeat({n.num_shared}),
       routed_weights.reshape({-1}).index_select(0, sorted_to_slot)});
  Tensor grad_pre;
  {
    const Tensor grad_rows = UMMRM_DISPATCHED(permute).call(grad_out, sorted_to_slot, offsets, n.top_k);
    if (hidden_side) {
      Tensor weighted, dots;
      if (glu && glu_backward_is_fused(x, n.num_shared, n.num_experts, grad_rows.size(0), n.pre_width,
                                       Checker{"moe_ffn_backward"}.activation(activation))) {
        std::tie(grad_pre, weighted, dots) = UMMRM_DISPATCHED(expert_glu_backward)
                                                 .call(grad_out, grad_rows, shared_down, routed_down, offsets, n.tokens,
                                                       pre_activation, row_weights, activation);
      } else {
        const Tensor grad_act = UMMRM_DISPATCHED(expert_gemm)
                                    .call(grad_out, grad_rows, shared_down, routed_down, offsets, n.tokens,
                                          std::nullopt, std::nullopt, true);
        std::tie(grad_pre, weighted, dots) =
            UMMRM_DISPATCHED(activation_backward).call(grad_act, pre_activation, row_weights, activation, glu);
      }
      const bool biased = (need[kSharedWeight] && shared_down_bias.has_value()) ||
                          (need[kRoutedWeights] && routed_down_bias.has_value());
      const Tensor wide_grad = biased ? grad_out.to(accumulator(grad_out)) : grad_out;  // once for both
      if (need[kSharedWeight]) grads[kSharedWeight] = shared_gate_grad(dots, wide_grad, shared_down_bias, n);
      if (need[kRoutedWeights]) {
        grads[kRoutedWeights] = routed_gate_grad(dots, slot_to_sorted, expert_indices, wide_grad, routed_down_bias, n);
      }
      if (need[kSharedDown] || need[kRoutedDown]) {
        const auto [shared, routed] = split(weighted, n);
        weight_grads({need[kSharedDown], sums.shared_down, grads[kSharedDown]},
                     {need[kRoutedDown], sums.routed_down, grads[kRoutedDown]}, grad_out, grad_rows, shared, routed,
                     offsets, n);
      }
    }
    if (need[kSharedDownBias] || need[kRoutedDownBias]) {
      std::tie(grads[kSharedDownBias], grads[kRoutedDownBias]) =
          UMMRM_DISPATCHED(expert_bias_grad)
              .call(grad_out, grad_rows, row_weights, offsets, n.tokens, n.num_shared, need[kSharedDownBias],
                    need[kRoutedDownBias]);
    }
  }
  if (!up_side) return grads;

  const auto [grad_shared, grad_routed] = split(grad_pre, n);
  if (need[kRoutedUp]) {
    const Tensor gathered = UMMRM_DISPATCHED(permute).call(x, sorted_to_slot, offsets, n.top_k);
    weight_grads({need[kSharedUp], sums.shared_up, grads[kSharedUp]}, {true, sums.routed_up, grads[kRoutedUp]},
                 grad_shared, grad_routed, x, gathered, offsets, n);
  } else if (need[kSharedUp]) {  // with no routed rows, so that nothing is gathered
    Tensor none;
    weight_grads({true, sums.shared_up, grads[kSharedUp]}, {false, std::nullopt, none}, grad_shared,
                 grad_routed.slice(0, 0, 0), x, x.slice(0, 0, 0), at::zeros_like(offsets), n);
  }
  if (need[kSharedUpBias] || need[kRoutedUpBias]) {
    std::tie(grads[kSharedUpBias], grads[kRoutedUpBias]) =
        UMMRM_DISPATCHED(expert_bias_grad)
            .call(grad_shared, grad_routed, std::nullopt, offsets, n.tokens, n.num_shared, need[kSharedUpBias],
                  need[kRoutedUpBias]);
  }
  if (need[kX]) {
    const Tensor grad_rows =
        UMMRM_DISPATCHED(expert_gemm)
            .call(grad_shared, grad_routed, shared_up, routed_up, offsets, n.tokens, std::nullopt, std::nullopt, true);
    grads[kX] = UMMRM_DISPATCHED(unpermute).call(grad_rows, slot_to_sorted, offsets, std::nullopt, std::nullopt,
                                                 n.num_shared, n.top_k);
  }
  return grads;
}

}  // namespace

std::vector<Tensor> moe_ffn_backward(const Tensor& grad_out, const Tensor& x, const Tensor& shared_weight,
                                     const Tensor& routed_weights, const Tensor& expert_indices,
                                     const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down,
                                     const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                                     const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                                     const OptionalTensor& routed_down_bias, const Tensor& pre_activation,
                                     const Tensor& slot_to_sorted, const Tensor& sorted_to_slot, const Tensor& offsets,
                                     string_view activation, bool glu, std::array<bool, 11> need) {
  checks::moe_ffn_backward(grad_out, x, shared_weight, routed_weights, expert_indices, shared_up, routed_up,
                           shared_down, routed_down, shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias,
                           pre_activation, slot_to_sorted, sorted_to_slot, offsets, activation, glu, need);
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  return backward(grad_out, x, shared_weight, routed_weights, expert_indices, p, pre_activation, slot_to_sorted,
                  sorted_to_slot, offsets, activation, glu, need, {});
}

std::vector<Tensor> moe_ffn_backward_add(
    const Tensor& grad_out, const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
    const Tensor& expert_indices, const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down,
    const Tensor& routed_down, const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
    const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias, const Tensor& pre_activation,
    const Tensor& slot_to_sorted, const Tensor& sorted_to_slot, const Tensor& offsets, string_view activation, bool glu,
    std::array<bool, 11> need, const OptionalTensor& shared_up_sum, const OptionalTensor& routed_up_sum,
    const OptionalTensor& shared_down_sum, const OptionalTensor& routed_down_sum) {
  checks::moe_ffn_backward_add(grad_out, x, shared_weight, routed_weights, expert_indices, shared_up, routed_up,
                               shared_down, routed_down, shared_up_bias, routed_up_bias, shared_down_bias,
                               routed_down_bias, pre_activation, slot_to_sorted, sorted_to_slot, offsets, activation,
                               glu, need, shared_up_sum, routed_up_sum, shared_down_sum, routed_down_sum);
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  return backward(grad_out, x, shared_weight, routed_weights, expert_indices, p, pre_activation, slot_to_sorted,
                  sorted_to_slot, offsets, activation, glu, need,
                  {shared_up_sum, routed_up_sum, shared_down_sum, routed_down_sum});
}

TORCH_LIBRARY_IMPL(ummrm, CompositeExplicitAutograd, m) {
  m.impl("moe_ffn", &moe_ffn);
  m.impl("moe_ffn_forward", &moe_ffn_forward);
  m.impl("moe_ffn_backward", &moe_ffn_backward);
  m.impl("moe_ffn_backward_add", &moe_ffn_backward_add);
}

}  // namespace ummrm
