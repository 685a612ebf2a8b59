// Operators of the stem `permute`: permute, unpermute, unpermute_backward.
#include "ummrm/permute.h"

#include <ATen/ops/empty_like.h>

#include "checks.h"
#include "device.h"

namespace ummrm {
namespace {

// Number of sorted rows that hold a slot, where the host may read it, and where a device finds it.
int64_t live_rows(const Tensor& expert_offsets) {
  return on_host(expert_offsets) ? expert_offsets[-1].item<int64_t>() : 0;
}
const int32_t* live_rows_on_device(const Tensor& contiguous_offsets) {
  return contiguous_offsets.const_data_ptr<int32_t>() + contiguous_offsets.numel() - 1;
}

// What unpermute and its backward share.
void check_unpermute(const Checker& check, const Tensor& rows, const Tensor& slot_to_sorted,
                     const Tensor& expert_offsets, const OptionalTensor& shared_weight,
                     const OptionalTensor& routed_weights, int64_t num_shared, int64_t top_k) {
  check.floating("rows", rows);
  check.count("top_k", top_k, 1);
  check.count("num_shared_experts", num_shared, 0);
  check.index("slot_to_sorted", slot_to_sorted, -1, "[T*K]", rows, "rows");
  check.count("slot_to_sorted.numel()", slot_to_sorted.numel(), 0);
  const int64_t slots = slot_to_sorted.numel(), tokens = slots / top_k;
  TORCH_CHECK_VALUE(slots % top_k == 0, "ummrm.", check.op,
                    ": `slot_to_sorted` must have T * top_k entries, a multiple of ", top_k, ", got ", slots,
                    "; pass the top_k that route used.");
  check.shape("rows", rows, {num_shared * tokens + slots, -1}, "[S*T + T*K, H]",
              "put the shared experts' rows before the sorted rows");
  if (shared_weight.has_value()) {
    check.device("shared_weight", *shared_weight, rows, "rows");
    check.shape("shared_weight", *shared_weight, {tokens}, "[T]", "take it from ummrm.ops.route");
    check.dtype("shared_weight", *shared_weight, accumulator(rows), "gate weights stay in fp32 (fp64 for fp64 rows)");
  }
  if (routed_weights.has_value()) {
    check.device("routed_weights", *routed_weights, rows, "rows");
    check.shape("routed_weights", *routed_weights, {tokens, top_k}, "[T, K]", "take it from ummrm.ops.route");
    check.dtype("routed_weights", *routed_weights, accumulator(rows), "gate weights stay in fp32 (fp64 for fp64 rows)");
  }
  check.offsets(expert_offsets, slots, rows, "rows");
  check.values("slot_to_sorted", slot_to_sorted, 0, slots, "take it from ummrm.ops.sort_slots");
}

}  // namespace

void checks::permute(const Tensor& x, const Tensor& sorted_to_slot, const Tensor& expert_offsets, int64_t top_k) {
  const Checker check{"permute"};
  check.floating("x", x);
  check.shape("x", x, {-1, -1}, "[T, H]", "flatten batch and sequence into tokens first");
  check.slots("x", x.size(0), top_k);
  const int64_t slots = x.size(0) * top_k;
  check.index("sorted_to_slot", sorted_to_slot, slots, "[T*K]", x, "x");
  check.offsets(expert_offsets, slots, x, "x");
  check.values("sorted_to_slot", sorted_to_slot, 0, slots, "take it from ummrm.ops.sort_slots");
}

void checks::unpermute(const Tensor& rows, const Tensor& slot_to_sorted, const Tensor& expert_offsets,
                       const OptionalTensor& shared_weight, const OptionalTensor& routed_weights,
                       int64_t num_shared_experts, int64_t top_k) {
  check_unpermute(Checker{"unpermute"}, rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights,
                  num_shared_experts, top_k);
}

void checks::unpermute_backward(const Tensor& grad_out, const Tensor& rows, const Tensor& slot_to_sorted,
                                const Tensor& expert_offsets, const OptionalTensor& shared_weight,
                                const OptionalTensor& routed_weights, int64_t num_shared_experts, int64_t top_k) {
  const Checker check{"unpermute_backward"};
  check_unpermute(check, rows, slot_to_sorted, expert_offsets, shared_weight, routed_weights, num_shared_experts,
                  top_k);
  check.device("grad_out", grad_out, rows, "rows");
  check.shape("grad_out", grad_out, {slot_to_sorted.numel() / top_k, rows.size(1)}, "[T, H]",
              "pass the gradient of unpermute's result");
  check.dtype("grad_out", grad_out, rows.scalar_type(), "pass the gradient of unpermute's result");
}

Tensor permute(const Tensor& x_in, const Tensor& sorted_to_slot_in, const Tensor& expert_offsets_in, int64_t top_k) {
  checks::permute(x_in, sorted_to_slot_in, expert_offsets_in, top_k);
  const Checker check{"permute"};
  check.element("x", x_in);
  const int64_t slots = x_in.size(0) * top_k;
  const Tensor x = x_in.contiguous(), sorted_to_slot = sorted_to_slot_in.contiguous();
  const Tensor expert_offsets = expert_offsets_in.contiguous();
  const int64_t hidden = x.size(1);
  const Tensor out = at::empty({slots, hidden}, x.options());
  const Permute args{x.const_data_ptr(),        sorted_to_slot.const_data_ptr<int32_t>(),
                     live_rows(expert_offsets), top_k,
                     hidden * x.element_size(), out.mutable_data_ptr()};
  if (on_host(x)) {
    parallel_over(slots, hidden, [&](int64_t begin, int64_t end) { cpu::permute(args, begin, end); });
  } else {
    on_cuda(check, x,
            [&](auto stream) { return cuda::permute(args, slots, live_rows_on_device(expert_offsets), stream); });
  }
  return out;
}

Tensor unpermute(const Tensor& rows_in, const Tensor& slot_to_sorted_in, const Tensor& expert_offsets_in,
                 const OptionalTensor& shared_weight_in, const OptionalTensor& routed_weights_in,
                 int64_t num_shared_experts, int64_t top_k) {
  checks::unpermute(rows_in, slot_to_sorted_in, expert_offsets_in, shared_weight_in, routed_weights_in,
                    num_shared_experts, top_k);
  const Checker check{"unpermute"};
  const int64_t tokens = slot_to_sorted_in.numel() / top_k;
  const Tensor rows = rows_in.contiguous(), slot_to_sorted = slot_to_sorted_in.contiguous();
  const Tensor expert_offsets = expert_offsets_in.contiguous();
  const OptionalTensor shared_weight = contiguous(shared_weight_in), routed_weights = contiguous(routed_weights_in);
  const int64_t hidden = rows.size(1);
  const Tensor out = at::empty({tokens, hidden}, rows.options());
  const Unpermute args{check.element("rows", rows),
                       rows.const_data_ptr(),
                       slot_to_sorted.const_data_ptr<int32_t>(),
                       data_or_null(shared_weight),
                       data_or_null(routed_weights),
                       tokens,
                       hidden,
                       top_k,
                       num_shared_experts,
                       live_rows(expert_offsets),
                       out.mutable_data_ptr()};
  if (on_host(rows)) {
    parallel_over(tokens, hidden * (num_shared_experts + top_k),
                  [&](int64_t begin, int64_t end) { cpu::unpermute(args, begin, end); });
  } else {
    on_cuda(check, rows,
            [&](auto stream) { return cuda::unpermute(args, live_rows_on_device(expert_offsets), stream); });
  }
  return out;
}

Tensor3 unpermute_backward(const Tensor& grad_out_in, const Tensor& rows_in, const Tensor& slot_to_sorted_in,
                           const Tensor& expert_offsets_in, const OptionalTensor& shared_weight_in,
                           const OptionalTensor& routed_weights_in, int64_t num_shared_experts, int64_t top_k) {
  checks::unpermute_backward(grad_out_in, rows_in, slot_to_sorted_in, expert_offsets_in, shared_weight_in,
                             routed_weights_in, num_shared_experts, top_k);
  const Checker check{"unpermute_backward"};
  const int64_t tokens = slot_to_sorted_in.numel() / top_k;
  const Tensor grad_out = grad_out_in.contiguous(), rows = rows_in.contiguous();
  const Tensor slot_to_sorted = slot_to_sorted_in.contiguous(), expert_offsets = expert_offsets_in.contiguous();
  const OptionalTensor shared_weight = contiguous(shared_weight_in), routed_weights = contiguous(routed_weights_in);
  const int64_t hidden = rows.size(1);
  const auto acc = rows.options().dtype(accumulator(rows));
  const Tensor grad_rows = at::empty_like(rows);
  const Tensor grad_shared = shared_weight.has_value() ? at::empty({tokens}, acc) : at::empty({0}, acc);
  const Tensor grad_routed = routed_weights.has_value() ? at::empty({tokens, top_k}, acc) : at::empty({0}, acc);
  const UnpermuteBackward args{check.element("rows", rows),
                               grad_out.const_data_ptr(),
                               rows.const_data_ptr(),
                               slot_to_sorted.const_data_ptr<int32_t>(),
                               data_or_null(shared_weight),
                               data_or_null(routed_weights),
                               tokens,
                               hidden,
                               top_k,
                               num_shared_experts,
                               live_rows(expert_offsets),
                               grad_rows.mutable_data_ptr(),
                               shared_weight.has_value() ? grad_shared.mutable_data_ptr() : nullptr,
                               routed_weights.has_value() ? grad_routed.mutable_data_ptr() : nullptr};
  if (on_host(rows)) {
    parallel_over(tokens, 2 * hidden * (num_shared_experts + top_k),
                  [&](int64_t begin, int64_t end) { cpu::unpermute_backward(args, begin, end); });
  } else {
    on_cuda(check, rows,
            [&](auto stream) { return cuda::unpermute_backward(args, live_rows_on_device(expert_offsets), stream); });
  }
  return {grad_rows, grad_shared, grad_routed};
}

UMMRM_REGISTER(m) {
  m.impl("permute", &permute);
  m.impl("unpermute", &unpermute);
  m.impl("unpermute_backward", &unpermute_backward);
}

}  // namespace ummrm
