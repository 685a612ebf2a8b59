// The composed MoE FFN: moe_ffn, moe_ffn_forward, moe_ffn_backward and its _add. Made of the other operators through
// the dispatcher, so it follows whatever backend serves the device. Forward keeps the pre-activations and the routing
// maps; gathered inputs, activations and expert outputs are made again in backward, where they are needed at all.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "check.h"
#include "checks.h"
#include "expert_glu.h"
#include "moe_ffn.h"

namespace ummrm {
namespace {

// The combined row buffer's two parts: the shared experts' rows and the sorted ones.
std::pair<Tensor, Tensor> split(const Tensor& rows, const MoeSizes& n) {
  return {rows.slice(0, 0, n.shared_rows()), rows.slice(0, n.shared_rows())};
}

// <g_t, bias_e> of every token and expert, [T, experts]: a down bias's part in its gate's gradient. `wide_grad` is g in
// the accumulator's dtype.
Tensor bias_dots(const Tensor& wide_grad, const Tensor& bias) {
  return at::matmul(wide_grad, bias.to(wide_grad.scalar_type()).t());
}

Tensor shared_gate_grad(const Tensor& dots, const Tensor& wide_grad, const OptionalTensor& bias, const MoeSizes& n) {
  Tensor total = dots.slice(0, 0, n.shared_rows()).view({n.num_shared, n.tokens}).sum(0);
  if (bias.has_value()) total = total + bias_dots(wide_grad, *bias).sum(1);
  return total / std::max<int64_t>(n.num_shared, 1);
}

Tensor routed_gate_grad(const Tensor& dots, const Tensor& slot_to_sorted, const Tensor& expert_indices,
                        const Tensor& wide_grad, const OptionalTensor& bias, const MoeSizes& n) {
  const Tensor of_slots = dots.slice(0, n.shared_rows()).index_select(0, slot_to_sorted).view({n.tokens, n.top_k});
  if (!bias.has_value() || n.num_experts == 0) return of_slots;  // no expert, no index that gather could take
  const Tensor from_bias = bias_dots(wide_grad, *bias).gather(1, expert_indices.clamp_min(0).to(at::kLong));
  return of_slots + from_bias.masked_fill(expert_indices.lt(0), 0);
}

}  // namespace

namespace {

// What moe_ffn_forward returns; without `keep` the pre-activation may be undefined.
Tensor5 forward(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
                const Tensor& expert_indices, const Experts& p, string_view activation, bool glu, bool keep) {
  const auto& [shared_up, routed_up, shared_down, routed_down, shared_up_bias, routed_up_bias, shared_down_bias,
               routed_down_bias] = p;
  const MoeSizes n = sizes_of(x, expert_indices, p, glu);
  const ActivationKind kind = Checker{"moe_ffn"}.activation(activation);
  const NoAutocast no_autocast;  // dtypes are settled
  const auto [slot_to_sorted, sorted_to_slot, offsets] =
      UMMRM_DISPATCHED(sort_slots).call(expert_indices, n.num_experts);
  Tensor pre_activation, rows;
  if (host::serves(x)) {
    std::tie(rows, pre_activation) = host::forward(x, p, {slot_to_sorted, sorted_to_slot, offsets}, n, kind, glu, keep);
  } else {
    Tensor act;
    {
      const Tensor gathered = UMMRM_DISPATCHED(permute).call(x, sorted_to_slot, offsets, n.top_k);
      if (glu && glu_is_fused(x, n.num_shared, n.num_experts, gathered.size(0), n.pre_width, kind)) {
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
    const auto [shared, routed] = split(std::exchange(act, Tensor()), n);
    rows = UMMRM_DISPATCHED(expert_gemm)
               .call(shared, routed, shared_down, routed_down, offsets, n.tokens, shared_down_bias, routed_down_bias,
                     false);
  }
  const Tensor out = UMMRM_DISPATCHED(unpermute).call(rows, slot_to_sorted, offsets, shared_weight, routed_weights,
                                                      n.num_shared, n.top_k);
  return {out, pre_activation, slot_to_sorted, sorted_to_slot, offsets};
}

}  // namespace

Tensor5 moe_ffn_forward(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights,
                        const Tensor& expert_indices, const Tensor& shared_up, const Tensor& routed_up,
                        const Tensor& shared_down, const Tensor& routed_down, const OptionalTensor& shared_up_bias,
                        const OptionalTensor& routed_up_bias, const OptionalTensor& shared_down_bias,
                        const OptionalTensor& routed_down_bias, string_view activation, bool glu) {
  checks::moe_ffn(x, shared_weight, routed_weights, expert_indices, shared_up, routed_up, shared_down, routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias, activation, glu);
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  return forward(x, shared_weight, routed_weights, expert_indices, p, activation, glu, true);
}

Tensor moe_ffn(const Tensor& x, const Tensor& shared_weight, const Tensor& routed_weights, const Tensor& expert_indices,
               const Tensor& shared_up, const Tensor& routed_up, const Tensor& shared_down, const Tensor& routed_down,
               const OptionalTensor& shared_up_bias, const OptionalTensor& routed_up_bias,
               const OptionalTensor& shared_down_bias, const OptionalTensor& routed_down_bias, string_view activation,
               bool glu) {
  checks::moe_ffn(x, shared_weight, routed_weights, expert_indices, shared_up, routed_up, shared_down, routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias, activation, glu);
  const Experts p{shared_up,      routed_up,      shared_down,      routed_down,
                  shared_up_bias, routed_up_bias, shared_down_bias, routed_down_bias};
  return std::get<0>(forward(x, shared_weight, routed_weights, expert_indices, p, activation, glu, false));
}

namespace {

// One kind of experts' gradient of a projection: whether it is needed, and added to what or given where.
struct WeightGrad {
  bool need;
  OptionalTensor sum;
  Tensor& grad;
};

void weight_grads(const WeightGrad& shared, const WeightGrad& routed, const Tensor& grad_shared_rows,
                  const Tensor& grad_routed_rows, const Tensor& shared_rows, const Tensor& routed_rows,
                  const Tensor& offsets, const MoeSizes& n) {
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
                             const WeightSums& sums) {
  const auto& [shared_up, routed_up, shared_down, routed_down, shared_up_bias, routed_up_bias, shared_down_bias,
               routed_down_bias] = p;
  const MoeSizes n = sizes_of(x, expert_indices, p, glu);
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
  const ActivationKind kind = Checker{"moe_ffn_backward"}.activation(activation);
  const NoAutocast no_autocast;
  std::vector<Tensor> grads = empty_grads(need.size(), x);
  const bool up_side = need[kX] || need[kSharedUp] || need[kRoutedUp] || need[kSharedUpBias] || need[kRoutedUpBias];
  const bool hidden_side =
      up_side || need[kSharedWeight] || need[kRoutedWeights] || need[kSharedDown] || need[kRoutedDown];

  // The gate weight of each row of the combined buffer.
  const Tensor row_weights = at::cat(
      {n.num_shared == 1 ? shared_weight : (shared_weight / std::max<int64_t>(n.num_shared, 1)).repeat({n.num_shared}),
       routed_weights.reshape({-1}).index_select(0, sorted_to_slot)});
  const auto gate_grads = [&](const Tensor& dots) {
    const bool biased =
        (need[kSharedWeight] && shared_down_bias.has_value()) || (need[kRoutedWeights] && routed_down_bias.has_value());
    const Tensor wide_grad = biased ? grad_out.to(accumulator(grad_out)) : grad_out;  // once for both
    if (need[kSharedWeight]) grads[kSharedWeight] = shared_gate_grad(dots, wide_grad, shared_down_bias, n);
    if (need[kRoutedWeights]) {
      grads[kRoutedWeights] = routed_gate_grad(dots, slot_to_sorted, expert_indices, wide_grad, routed_down_bias, n);
    }
  };
  const bool down_bias = need[kSharedDownBias] || need[kRoutedDownBias];
  const auto down_bias_grads = [&](const Tensor& grad_rows) {
    std::tie(grads[kSharedDownBias], grads[kRoutedDownBias]) =
        UMMRM_DISPATCHED(expert_bias_grad)
            .call(grad_out, grad_rows, row_weights, offsets, n.tokens, n.num_shared, need[kSharedDownBias],
                  need[kRoutedDownBias]);
  };
  const auto up_bias_grads = [&](const Tensor& grad_pre) {
    if (!need[kSharedUpBias] && !need[kRoutedUpBias]) return;
    const auto [shared, routed] = split(grad_pre, n);
    std::tie(grads[kSharedUpBias], grads[kRoutedUpBias]) =
        UMMRM_DISPATCHED(expert_bias_grad)
            .call(shared, routed, std::nullopt, offsets, n.tokens, n.num_shared, need[kSharedUpBias],
                  need[kRoutedUpBias]);
  };
  const auto x_grad = [&](const Tensor& grad_rows) {
    grads[kX] = UMMRM_DISPATCHED(unpermute).call(grad_rows, slot_to_sorted, offsets, std::nullopt, std::nullopt,
                                                 n.num_shared, n.top_k);
  };

  if (hidden_side && host::serves(x) && sums.are_contiguous()) {
    const auto found =
        host::backward(grad_out, x, p, {slot_to_sorted, sorted_to_slot, offsets}, pre_activation, row_weights, n, kind,
                       glu, {need[kX], need[kSharedUp], need[kRoutedUp], need[kSharedDown], need[kRoutedDown]}, sums);
    const auto take = [&](int at, const Tensor& grad) {
      if (grad.defined()) grads[at] = grad;
    };
    take(kSharedUp, found.shared_up);
    take(kRoutedUp, found.routed_up);
    take(kSharedDown, found.shared_down);
    take(kRoutedDown, found.routed_down);
    gate_grads(found.dots);
    if (need[kX]) x_grad(found.rows);
    up_bias_grads(found.pre_activation);
    if (down_bias) down_bias_grads(UMMRM_DISPATCHED(permute).call(grad_out, sorted_to_slot, offsets, n.top_k));
    return grads;
  }

  Tensor grad_pre;
  {
    const Tensor grad_rows = UMMRM_DISPATCHED(permute).call(grad_out, sorted_to_slot, offsets, n.top_k);
    if (hidden_side) {
      Tensor weighted, dots;
      if (glu && glu_backward_is_fused(x, n.num_shared, n.num_experts, grad_rows.size(0), n.pre_width, kind)) {
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
      gate_grads(dots);
      if (need[kSharedDown] || need[kRoutedDown]) {
        const auto [shared, routed] = split(weighted, n);
        weight_grads({need[kSharedDown], sums.shared_down, grads[kSharedDown]},
                     {need[kRoutedDown], sums.routed_down, grads[kRoutedDown]}, grad_out, grad_rows, shared, routed,
                     offsets, n);
      }
    }
    if (down_bias) down_bias_grads(grad_rows);
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
  up_bias_grads(grad_pre);
  if (need[kX]) {
    x_grad(
        UMMRM_DISPATCHED(expert_gemm)
            .call(grad_shared, grad_routed, shared_up, routed_up, offsets, n.tokens, std::nullopt, std::nullopt, true));
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
