// Operators of the stem `routing`: route, route_backward, sort_slots.
#include "ummrm/routing.h"

#include <ATen/ops/empty_like.h>

#include <limits>

#include "checks.h"
#include "device.h"

namespace ummrm {
namespace {

constexpr const char* kFlatten = "flatten batch and sequence into tokens first";

// What one block of threads holds in its shared memory and one lane in its registers.
void check_device_limits(const Checker& check, const Tensor& like, int64_t experts, int64_t top_k) {
  check.served(like);
  if (on_host(like)) return;
  TORCH_CHECK_VALUE(experts <= cuda::kMaxExperts, "ummrm.", check.op, ": the number of experts must be at most ",
                    cuda::kMaxExperts, " on a CUDA device, got ", experts, "; use fewer experts, or route on the CPU.");
  TORCH_CHECK_VALUE(top_k <= cuda::kMaxTopK, "ummrm.", check.op, ": `top_k` must be at most ", cuda::kMaxTopK,
                    " on a CUDA device, got ", top_k, "; choose fewer experts per token, or route on the CPU.");
}

void check_logits(const Checker& check, const Tensor& logits, const OptionalTensor& mask,
                  const OptionalTensor& clean_logits, int64_t top_k) {
  check.shape("logits", logits, {-1, -1}, "[T, E]", kFlatten);
  check.floating("logits", logits);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= experts, "ummrm.", check.op,
                    ": `top_k` must be between 1 and the number of experts (", experts, "), got ", top_k,
                    "; choose fewer experts per token.");
  check.slots("logits", tokens, top_k);
  if (mask.has_value()) {
    check.device("mask", *mask, logits, "logits");
    check.shape("mask", *mask, {tokens}, "[T]", "give one entry a token");
    check.dtype("mask", *mask, at::kBool, "pass mask=mask.bool()");
  }
  if (clean_logits.has_value()) {
    check.device("clean_logits", *clean_logits, logits, "logits");
    check.shape("clean_logits", *clean_logits, {tokens, experts}, "[T, E]", "give it the shape of `logits`");
    check.dtype("clean_logits", *clean_logits, logits.scalar_type(), "give it the dtype of `logits`");
  }
}

void check_gate(const Checker& check, string_view gate, double weight) {
  TORCH_CHECK_VALUE(check.gate(gate) != Gate::fixed || (weight >= 0 && weight <= 1), "ummrm.", check.op,
                    ": `fixed_shared_weight` must lie in [0, 1], got ", weight,
                    "; it is the shared experts' share of the output.");
}

const bool* mask_or_null(const OptionalTensor& mask) { return static_cast<const bool*>(data_or_null(mask)); }

void route_on_cpu(Route& args, int32_t* tokens_per_expert, void* mean_prob, void* mean_z) {
  const int64_t blocks = (args.tokens + cpu::kRouteBlock - 1) / cpu::kRouteBlock;
  std::vector<double> block_prob(blocks * args.experts), block_z(blocks);
  std::vector<int32_t> block_count(blocks * args.experts);
  std::vector<int64_t> block_live(blocks);
  args.block_prob = block_prob.data();
  args.block_z = block_z.data();
  args.block_count = block_count.data();
  args.block_live = block_live.data();
  // A logit costs about eight element operations: an exponential, and its part in each of the K selections.
  parallel_over(blocks, cpu::kRouteBlock * args.experts * 8,
                [&](int64_t begin, int64_t end) { cpu::route(args, begin, end); });
  cpu::route_finish(args, tokens_per_expert, mean_prob, mean_z);
}

void sort_slots_on_cpu(SortSlots& args) {
  const int64_t blocks = (args.slots + cpu::kSortBlock - 1) / cpu::kSortBlock;
  std::vector<int64_t> block_next(blocks * (args.experts + 1));
  args.block_next = block_next.data();
  parallel_over(blocks, cpu::kSortBlock, [&](int64_t begin, int64_t end) { cpu::sort_slots_count(args, begin, end); });
  cpu::sort_slots_scan(args);
  parallel_over(blocks, 4 * cpu::kSortBlock,
                [&](int64_t begin, int64_t end) { cpu::sort_slots_scatter(args, begin, end); });
}

}  // namespace

void checks::route(const Tensor& logits, const OptionalTensor& mask, const OptionalTensor& clean_logits, int64_t top_k,
                   string_view gate, double fixed_shared_weight) {
  const Checker check{"route"};
  check_logits(check, logits, mask, clean_logits, top_k);
  check_gate(check, gate, fixed_shared_weight);
}

void checks::route_backward(const Tensor& grad_shared_weight, const Tensor& grad_routed_weights,
                            const Tensor& grad_mean_prob, const Tensor& grad_mean_z, const Tensor& logits,
                            const OptionalTensor& mask, const OptionalTensor& clean_logits,
                            const Tensor& expert_indices, const Tensor& tokens_per_expert, string_view gate,
                            double fixed_shared_weight) {
  const Checker check{"route_backward"};
  check.shape("logits", logits, {-1, -1}, "[T, E]", kFlatten);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check.shape("expert_indices", expert_indices, {tokens, -1}, "[T, K]", "pass what route returned");
  const int64_t top_k = expert_indices.size(1);
  check_logits(check, logits, mask, clean_logits, top_k);
  check_gate(check, gate, fixed_shared_weight);
  const auto acc = accumulator(logits);
  const char* remedy = "pass the gradient of what route returned";
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"grad_shared_weight", grad_shared_weight},
                                     {"grad_routed_weights", grad_routed_weights},
                                     {"grad_mean_prob", grad_mean_prob},
                                     {"grad_mean_z", grad_mean_z},
                                     {"expert_indices", expert_indices},
                                     {"tokens_per_expert", tokens_per_expert}}) {
    check.device(name, tensor, logits, "logits");
  }
  check.shape("grad_shared_weight", grad_shared_weight, {tokens}, "[T]", remedy);
  check.dtype("grad_shared_weight", grad_shared_weight, acc, remedy);
  check.shape("grad_routed_weights", grad_routed_weights, {tokens, top_k}, "[T, K]", remedy);
  check.dtype("grad_routed_weights", grad_routed_weights, acc, remedy);
  check.shape("grad_mean_prob", grad_mean_prob, {experts}, "[E]", remedy);
  check.dtype("grad_mean_prob", grad_mean_prob, acc, remedy);
  check.shape("grad_mean_z", grad_mean_z, {}, "[]", remedy);
  check.dtype("grad_mean_z", grad_mean_z, acc, remedy);
  check.dtype("expert_indices", expert_indices, at::kInt, "pass what route returned");
  check.shape("tokens_per_expert", tokens_per_expert, {experts}, "[E]", "pass what route returned");
  check.dtype("tokens_per_expert", tokens_per_expert, at::kInt, "pass what route returned");
  check.routed_indices(expert_indices, mask, experts);
}

void checks::sort_slots(const Tensor& expert_indices, int64_t num_experts) {
  const Checker check{"sort_slots"};
  check.count("num_experts", num_experts, 0);
  check.dtype("expert_indices", expert_indices, at::kInt, "take it from ummrm.ops.route");
  TORCH_CHECK_VALUE(expert_indices.numel() <= std::numeric_limits<int32_t>::max(),
                    "ummrm.sort_slots: `expert_indices` must have fewer than 2^31 entries, got ",
                    expert_indices.numel(), "; split the batch.");
  check.values("expert_indices", expert_indices, -1, num_experts,
               "take it from ummrm.ops.route with the same number of experts (-1 marks a masked token)");
}

Tensor6 route(const Tensor& logits_in, const OptionalTensor& mask_in, const OptionalTensor& clean_in, int64_t top_k,
              string_view gate, double fixed_shared_weight) {
  checks::route(logits_in, mask_in, clean_in, top_k, gate, fixed_shared_weight);
  const Checker check{"route"};
  check_device_limits(check, logits_in, logits_in.size(1), top_k);
  const Tensor logits = logits_in.contiguous();
  const OptionalTensor mask = contiguous(mask_in), clean = contiguous(clean_in);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const auto acc = logits.options().dtype(accumulator(logits)), index = logits.options().dtype(at::kInt);
  const Tensor shared_weight = at::empty({tokens}, acc), routed_weights = at::empty({tokens, top_k}, acc);
  const Tensor indices = at::empty({tokens, top_k}, index), counts = at::empty({experts}, index);
  const Tensor mean_prob = at::empty({experts}, acc), mean_z = at::empty({}, acc);

  Route args{};
  args.dtype = check.element("logits", logits);
  args.logits = logits.const_data_ptr();
  args.clean = data_or_null(clean);
  args.mask = mask_or_null(mask);
  args.tokens = tokens;
  args.experts = experts;
  args.top_k = top_k;
  args.gate = check.gate(gate);
  args.fixed_shared_weight = fixed_shared_weight;
  args.shared_weight = shared_weight.mutable_data_ptr();
  args.routed_weights = routed_weights.mutable_data_ptr();
  args.expert_indices = indices.mutable_data_ptr<int32_t>();
  if (on_host(logits)) {
    route_on_cpu(args, counts.mutable_data_ptr<int32_t>(), mean_prob.mutable_data_ptr(), mean_z.mutable_data_ptr());
  } else {
    on_cuda(check, logits, [&](auto stream) {
      const Tensor space = workspace(cuda::route_workspace(tokens, experts), logits);
      return cuda::route(args, counts.mutable_data_ptr<int32_t>(), mean_prob.mutable_data_ptr<float>(),
                         mean_z.mutable_data_ptr<float>(), space.mutable_data_ptr(), stream);
    });
  }
  return {shared_weight, routed_weights, indices, counts, mean_prob, mean_z};
}

Tensor2 route_backward(const Tensor& grad_shared_weight, const Tensor& grad_routed_weights,
                       const Tensor& grad_mean_prob, const Tensor& grad_mean_z, const Tensor& logits_in,
                       const OptionalTensor& mask_in, const OptionalTensor& clean_in, const Tensor& expert_indices_in,
                       const Tensor& tokens_per_expert_in, string_view gate, double fixed_shared_weight) {
  checks::route_backward(grad_shared_weight, grad_routed_weights, grad_mean_prob, grad_mean_z, logits_in, mask_in,
                         clean_in, expert_indices_in, tokens_per_expert_in, gate, fixed_shared_weight);
  const Checker check{"route_backward"};
  const int64_t tokens = logits_in.size(0), experts = logits_in.size(1), top_k = expert_indices_in.size(1);
  check_device_limits(check, logits_in, experts, top_k);
  const Tensor logits = logits_in.contiguous(), indices = expert_indices_in.contiguous();
  const OptionalTensor mask = contiguous(mask_in), clean = contiguous(clean_in);
  const Tensor shared = grad_shared_weight.contiguous(), routed = grad_routed_weights.contiguous();
  const Tensor prob = grad_mean_prob.contiguous(), tokens_per_expert = tokens_per_expert_in.contiguous();
  const Tensor grad_logits = at::empty_like(logits);
  const Tensor grad_clean = clean.has_value() ? at::empty_like(*clean) : at::empty({0}, logits.options());

  RouteBackward args{};
  args.dtype = check.element("logits", logits);
  args.logits = logits.const_data_ptr();
  args.clean = data_or_null(clean);
  args.mask = mask_or_null(mask);
  args.tokens = tokens;
  args.experts = experts;
  args.top_k = top_k;
  args.gate = check.gate(gate);
  args.fixed_shared_weight = fixed_shared_weight;
  args.expert_indices = indices.const_data_ptr<int32_t>();
  args.grad_shared_weight = shared.const_data_ptr();
  args.grad_routed_weights = routed.const_data_ptr();
  args.grad_mean_prob = prob.const_data_ptr();
  args.grad_mean_z = grad_mean_z.const_data_ptr();
  args.grad_logits = grad_logits.mutable_data_ptr();
  args.grad_clean = clean.has_value() ? grad_clean.mutable_data_ptr() : nullptr;
  if (on_host(logits)) {
    args.live_tokens = tokens_per_expert.sum().item<int64_t>() / top_k;
    parallel_over(tokens, experts * 16, [&](int64_t begin, int64_t end) { cpu::route_backward(args, begin, end); });
  } else {
    on_cuda(check, logits, [&](auto stream) {
      return cuda::route_backward(args, tokens_per_expert.const_data_ptr<int32_t>(), stream);
    });
  }
  return {grad_logits, grad_clean};
}

Tensor3 sort_slots(const Tensor& expert_indices_in, int64_t num_experts) {
  checks::sort_slots(expert_indices_in, num_experts);
  const Checker check{"sort_slots"};
  check_device_limits(check, expert_indices_in, num_experts, 1);
  const int64_t slots = expert_indices_in.numel();
  const Tensor indices = expert_indices_in.contiguous();
  const Tensor slot_to_sorted = at::empty({slots}, indices.options()), sorted_to_slot = at::empty_like(slot_to_sorted);
  const Tensor offsets = at::empty({num_experts + 1}, indices.options());
  SortSlots args{indices.const_data_ptr<int32_t>(),
                 slots,
                 num_experts,
                 slot_to_sorted.mutable_data_ptr<int32_t>(),
                 sorted_to_slot.mutable_data_ptr<int32_t>(),
                 offsets.mutable_data_ptr<int32_t>(),
                 nullptr};
  if (on_host(indices)) {
    sort_slots_on_cpu(args);
  } else {
    on_cuda(check, indices, [&](auto stream) {
      const Tensor space = workspace(cuda::sort_slots_workspace(slots, num_experts), indices);
      return cuda::sort_slots(args, space.mutable_data_ptr(), stream);
    });
  }
  return {slot_to_sorted, sorted_to_slot, offsets};
}

UMMRM_REGISTER(m) {
  m.impl("route", &route);
  m.impl("route_backward", &route_backward);
  m.impl("sort_slots", &sort_slots);
}

}  // namespace ummrm
