// Operators of the stem `merge_experts` on the CPU: merge_experts, merge_experts_dots.
#include "ummrm/merge_experts.h"

#include <torch/library.h>

#include "check.h"
#include "ops.h"

namespace ummrm {
namespace {

// An expert's slice must be contiguous; the stride from expert to expert is free, so that gate and up rows of a fused
// projection are passed as views.
Tensor with_contiguous_slices(const Tensor& experts) {
  return experts.size(0) > 0 && !experts[0].is_contiguous() ? experts.contiguous() : experts;
}

struct Lists {
  std::vector<Tensor> shared, routed;  // keep copies alive
  std::vector<const void*> pointers;
  std::vector<MergeTensor> tensors;
  int64_t num_experts = 0, blocks = 0;
};

Lists check_lists(const Checker& check, TensorList shared, TensorList routed) {
  const auto n = static_cast<int64_t>(routed.size());
  TORCH_CHECK_VALUE(n > 0, "ummrm.", check.op,
                    ": `routed` must hold at least one tensor, got 0; pass the FFN's tensors.");
  TORCH_CHECK_VALUE(static_cast<int64_t>(shared.size()) == n, "ummrm.", check.op,
                    ": `shared` must have as many tensors as `routed` (", n, "), got ", shared.size(),
                    "; pass each FFN tensor of both kinds of expert, in the same order.");
  check.floating("routed", routed[0]);
  for (const auto& [name, list] : {std::pair{"shared", shared}, std::pair{"routed", routed}}) {
    for (const Tensor& tensor : list) {
      TORCH_CHECK_VALUE(tensor.dim() > 0, "ummrm.", check.op, ": `", name, "` must hold tensors [",
                        name[0] == 's' ? "S" : "E", ", ...], got a scalar; stack the experts.");
    }
  }
  Lists lists;
  lists.num_experts = shared[0].size(0) + routed[0].size(0);
  TORCH_CHECK_VALUE(lists.num_experts > 0, "ummrm.", check.op,
                    ": `routed` and `shared` must hold at least one expert, got 0; stack the experts.");
  for (int64_t i = 0; i < n; ++i) {
    for (const auto& [name, tensor] : {std::pair{"shared", shared[i]}, std::pair{"routed", routed[i]}}) {
      check.device(name, tensor, routed[0], "routed[0]");
      check.dtype(name, tensor, routed[0].scalar_type(), "all tensors of one call share a dtype");
    }
    auto expected = routed[i].sizes().vec();
    expected[0] = routed[0].size(0);
    check.shape("routed", routed[i], expected, "[E, ...]", "every tensor holds the same experts");
    expected[0] = shared[0].size(0);
    check.shape("shared", shared[i], expected, "[S, ...]", "a shared expert has the shape of a routed one");
    lists.shared.push_back(with_contiguous_slices(shared[i]));
    lists.routed.push_back(with_contiguous_slices(routed[i]));
  }
  for (int64_t i = 0; i < n; ++i) {
    for (const Tensor& experts : {lists.shared[i], lists.routed[i]}) {
      const auto* base = static_cast<const char*>(experts.const_data_ptr());
      for (int64_t e = 0; e < experts.size(0); ++e) {
        lists.pointers.push_back(base + e * experts.stride(0) * experts.element_size());
      }
    }
    int64_t elements = 1;
    for (int64_t d = 1; d < routed[i].dim(); ++d) elements *= routed[i].size(d);
    lists.tensors.push_back({nullptr, elements, lists.blocks, nullptr, nullptr});
    lists.blocks += cpu::merge_blocks(elements);
  }
  for (int64_t i = 0; i < n; ++i) lists.tensors[i].experts = lists.pointers.data() + i * lists.num_experts;
  return lists;
}

}  // namespace

std::vector<Tensor> merge_experts(TensorList shared, TensorList routed, const Tensor& coefficients_in) {
  const Checker check{"merge_experts"};
  Lists lists = check_lists(check, shared, routed);
  const auto n = static_cast<int64_t>(routed.size());
  check.device("coefficients", coefficients_in, routed[0], "routed[0]");
  check.shape("coefficients", coefficients_in, {n, lists.num_experts}, "[len(routed), S + E]",
              "one row a tensor, shared experts first");
  check.dtype("coefficients", coefficients_in, accumulator(routed[0]),
              "coefficients stay in fp32 (fp64 for fp64 experts)");
  const Tensor coefficients = coefficients_in.contiguous();
  std::vector<Tensor> merged;
  for (int64_t i = 0; i < n; ++i) {
    merged.push_back(at::empty(routed[i].sizes().slice(1), routed[i].options()));
    lists.tensors[i].merged = merged.back().mutable_data_ptr();
  }
  const MergeExperts args{check.element(routed[0]),      n,      lists.num_experts, lists.tensors.data(),
                          coefficients.const_data_ptr(), nullptr};
  parallel_over(lists.blocks, cpu::kMergeBlock * lists.num_experts,
                [&](int64_t begin, int64_t end) { cpu::merge_experts(args, begin, end); });
  return merged;
}

Tensor merge_experts_dots(TensorList grads_in, TensorList shared, TensorList routed) {
  const Checker check{"merge_experts_dots"};
  Lists lists = check_lists(check, shared, routed);
  const auto n = static_cast<int64_t>(routed.size());
  TORCH_CHECK_VALUE(static_cast<int64_t>(grads_in.size()) == n,
                    "ummrm.merge_experts_dots: `grads` must have as many tensors as `routed` (", n, "), got ",
                    grads_in.size(), "; pass one gradient a merged tensor.");
  std::vector<Tensor> grads;
  for (int64_t i = 0; i < n; ++i) {
    check.device("grads", grads_in[i], routed[0], "routed[0]");
    check.shape("grads", grads_in[i], routed[i].sizes().slice(1), "a merged tensor's",
                "pass one gradient a merged tensor");
    check.dtype("grads", grads_in[i], routed[0].scalar_type(), "all tensors of one call share a dtype");
    grads.push_back(grads_in[i].contiguous());
    lists.tensors[i].grad = grads.back().const_data_ptr();
  }
  const Tensor dots = at::empty({n, lists.num_experts}, routed[0].options().dtype(accumulator(routed[0])));
  std::vector<double> block_dots(lists.blocks * lists.num_experts);
  const MergeExperts args{check.element(routed[0]), n,       lists.num_experts,
                          lists.tensors.data(),     nullptr, block_dots.data()};
  parallel_over(lists.blocks, cpu::kMergeBlock * lists.num_experts,
                [&](int64_t begin, int64_t end) { cpu::merge_experts_dots(args, begin, end); });
  cpu::merge_experts_dots_finish(args, dots.mutable_data_ptr());
  return dots;
}

TORCH_LIBRARY_IMPL(ummrm, CPU, m) {
  m.impl("merge_experts", &merge_experts);
  m.impl("merge_experts_dots", &merge_experts_dots);
}

}  // namespace ummrm
