// The argument checks of moe_ffn, moe_ffn_backward and its _add, and the sizes of what has been checked.
#include "checks.h"
#include "moe_ffn.h"

namespace ummrm {

// Of arguments that have been checked.
MoeSizes sizes_of(const Tensor& x, const Tensor& expert_indices, const Experts& p, bool glu) {
  const int64_t pre_width = p.routed_up.size(1);
  return {x.size(0),           x.size(1), expert_indices.size(1),         p.shared_up.size(0),
          p.routed_up.size(0), pre_width, glu ? pre_width / 2 : pre_width};
}

namespace {

void check_parameter(const Checker& check, const char* name, const Tensor& tensor, const Tensor& x,
                     at::IntArrayRef shape, const char* words) {
  check.device(name, tensor, x, "x");
  check.dtype(name, tensor, x.scalar_type(), "give input and experts one dtype, or run under torch.autocast");
  check.shape(name, tensor, shape, words,
              "up is [n, 2*I, H] with glu=True (gate rows first) and [n, I, H] without, down [n, H, I]");
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
  const MoeSizes n = sizes_of(x, expert_indices, p, glu);
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
  const MoeSizes n = sizes_of(x, expert_indices, p, glu);
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

}  // namespace ummrm
