// Operators of the stem `merge_experts`: merge_experts, merge_experts_dots, merge_experts_grads.
#include "ummrm/merge_experts.h"

#include "checks.h"
#include "device.h"
#include "large_empty.h"

namespace ummrm {
namespace {

// An expert's slice must be contiguous; the stride from expert to expert is free, so that gate and up rows of a fused
// projection are passed as views.
Tensor with_contiguous_slices(const Tensor& experts) {
  return experts.size(0) > 0 && !experts[0].is_contiguous() ? experts.contiguous() : experts;
}

// The experts of each tensor, in slices that kernels can read.
struct Lists {
  std::vector<Tensor> shared, routed;
  int64_t num_shared, num_routed;
  int64_t size() const { return static_cast<int64_t>(routed.size()); }
  int64_t num_experts() const { return num_shared + num_routed; }
  const Tensor& like() const { return routed[0]; }
};

int64_t expert_elements(const Tensor& experts) {
  int64_t elements = 1;
  for (int64_t d = 1; d < experts.dim(); ++d) elements *= experts.size(d);
  return elements;
}

void check_lists(const Checker& check, TensorList shared, TensorList routed) {
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
  TORCH_CHECK_VALUE(shared[0].size(0) + routed[0].size(0) > 0, "ummrm.", check.op,
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
  }
}

// Of arguments that have been checked.
Lists lists_of(TensorList shared, TensorList routed) {
  Lists lists{{}, {}, shared[0].size(0), routed[0].size(0)};
  for (const Tensor& tensor : shared) lists.shared.push_back(with_contiguous_slices(tensor));
  for (const Tensor& tensor : routed) lists.routed.push_back(with_contiguous_slices(tensor));
  return lists;
}

// What the CPU kernels take: a pointer an expert, and numbered blocks.
struct CpuArguments {
  std::vector<const void*> pointers;
  std::vector<MergeTensor> tensors;
  int64_t blocks = 0;

  explicit CpuArguments(const Lists& lists) {
    for (int64_t i = 0; i < lists.size(); ++i) {
      for (const Tensor& experts : {lists.shared[i], lists.routed[i]}) {
        const auto* base = static_cast<const char*>(experts.const_data_ptr());
        for (int64_t e = 0; e < experts.size(0); ++e) {
          pointers.push_back(base + e * experts.stride(0) * experts.element_size());
        }
      }
      const int64_t elements = expert_elements(lists.routed[i]);
      tensors.push_back({nullptr, elements, blocks, nullptr, nullptr});
      blocks += cpu::merge_blocks(elements);
    }
    for (int64_t i = 0; i < lists.size(); ++i) tensors[i].experts = pointers.data() + i * lists.num_experts();
  }
};

// Calls body(args, first) with up to cuda::kMaxMergeTensors of the tensors from number `first` on, which are one
// launch.
template <class Body>
void for_each_launch(const Checker& check, const Lists& lists, const std::vector<Tensor>& merged,
                     const std::vector<Tensor>& grads, const Body& body) {
  for (int64_t first = 0; first < lists.size(); first += cuda::kMaxMergeTensors) {
    cuda::MergeExperts args{};
    args.dtype = check.element("routed", lists.like());
    args.num_tensors = std::min(cuda::kMaxMergeTensors, lists.size() - first);
    args.num_shared = lists.num_shared;
    args.num_routed = lists.num_routed;
    for (int64_t i = 0; i < args.num_tensors; ++i) {
      const Tensor &shared = lists.shared[first + i], &routed = lists.routed[first + i];
      args.tensors[i] = {shared.const_data_ptr(),
                         routed.const_data_ptr(),
                         shared.stride(0),
                         routed.stride(0),
                         expert_elements(routed),
                         merged.empty() ? nullptr : merged[first + i].mutable_data_ptr(),
                         grads.empty() ? nullptr : grads[first + i].const_data_ptr()};
    }
    body(args, first);
  }
}

}  // namespace

void checks::merge_experts(TensorList shared, TensorList routed, const Tensor& coefficients) {
  const Checker check{"merge_experts"};
  check_lists(check, shared, routed);
  check.device("coefficients", coefficients, routed[0], "routed[0]");
  check.shape("coefficients", coefficients,
              {static_cast<int64_t>(routed.size()), shared[0].size(0) + routed[0].size(0)}, "[len(routed), S + E]",
              "one row a tensor, shared experts first");
  check.dtype("coefficients", coefficients, accumulator(routed[0]),
              "coefficients stay in fp32 (fp64 for fp64 experts)");
}

void checks::merge_experts_dots(TensorList grads, TensorList shared, TensorList routed) {
  const Checker check{"merge_experts_dots"};
  check_lists(check, shared, routed);
  TORCH_CHECK_VALUE(grads.size() == routed.size(),
                    "ummrm.merge_experts_dots: `grads` must have as many tensors as `routed` (", routed.size(),
                    "), got ", grads.size(), "; pass one gradient a merged tensor.");
  for (size_t i = 0; i < grads.size(); ++i) {
    check.device("grads", grads[i], routed[0], "routed[0]");
    check.shape("grads", grads[i], routed[i].sizes().slice(1), "a merged tensor's",
                "pass one gradient a merged tensor");
    check.dtype("grads", grads[i], routed[0].scalar_type(), "all tensors of one call share a dtype");
  }
}

void checks::merge_experts_grads(const Tensor& grad, const Tensor& coefficients, int64_t num_shared, bool, bool) {
  const Checker check{"merge_experts_grads"};
  check.floating("grad", grad);
  check.device("coefficients", coefficients, grad, "grad");
  check.shape("coefficients", coefficients, {-1, -1}, "[parts, S + E]",
              "one row an equal part of the tensor, shared experts first");
  check.dtype("coefficients", coefficients, accumulator(grad), "coefficients stay in fp32 (fp64 for fp64 experts)");
  const int64_t parts = coefficients.size(0), experts = coefficients.size(1), rows = grad.dim() > 0 ? grad.size(0) : 0;
  TORCH_CHECK_VALUE(parts > 0 && grad.dim() > 0 && rows % parts == 0,
                    "ummrm.merge_experts_grads: `coefficients` must have a number of rows that divides grad's leading "
                    "size, got ",
                    parts, " rows for a grad of shape ", grad.sizes(),
                    "; pass two for a fused gate-and-up projection, else one.");
  TORCH_CHECK_VALUE(0 <= num_shared && num_shared <= experts,
                    "ummrm.merge_experts_grads: `num_shared` must be from 0 to the number of experts (", experts,
                    "), got ", num_shared, "; the other coefficients are the routed experts'.");
}

std::vector<Tensor> merge_experts(TensorList shared, TensorList routed, const Tensor& coefficients_in) {
  checks::merge_experts(shared, routed, coefficients_in);
  const Checker check{"merge_experts"};
  const Lists lists = lists_of(shared, routed);
  const int64_t n = lists.size(), experts = lists.num_experts();
  const DType dtype = check.element("routed", lists.like());
  const Tensor coefficients = coefficients_in.contiguous();
  std::vector<Tensor> merged;
  for (const Tensor& tensor : routed) merged.push_back(large_empty(tensor.sizes().slice(1), tensor.options()));
  if (on_host(lists.like())) {
    CpuArguments of(lists);
    for (int64_t i = 0; i < n; ++i) of.tensors[i].merged = merged[i].mutable_data_ptr();
    const MergeExperts args{dtype, n, experts, of.tensors.data(), coefficients.const_data_ptr(), nullptr};
    parallel_over(of.blocks, cpu::kMergeBlock * experts,
                  [&](int64_t begin, int64_t end) { cpu::merge_experts(args, begin, end); });
  } else {
    for_each_launch(check, lists, merged, {}, [&](cuda::MergeExperts& args, int64_t first) {
      args.coefficients = coefficients.const_data_ptr<float>() + first * experts;
      on_cuda(check, lists.like(), [&](auto stream) { return cuda::merge_experts(args, stream); });
    });
  }
  return merged;
}

Tensor merge_experts_dots(TensorList grads_in, TensorList shared, TensorList routed) {
  checks::merge_experts_dots(grads_in, shared, routed);
  const Checker check{"merge_experts_dots"};
  const Lists lists = lists_of(shared, routed);
  const int64_t n = lists.size(), experts = lists.num_experts();
  std::vector<Tensor> grads;
  for (const Tensor& grad : grads_in) grads.push_back(grad.contiguous());
  const DType dtype = check.element("routed", lists.like());
  const Tensor dots = at::empty({n, experts}, lists.like().options().dtype(accumulator(lists.like())));
  if (on_host(lists.like())) {
    CpuArguments of(lists);
    for (int64_t i = 0; i < n; ++i) of.tensors[i].grad = grads[i].const_data_ptr();
    std::vector<double> block_dots(of.blocks * experts);
    const MergeExperts args{dtype, n, experts, of.tensors.data(), nullptr, block_dots.data()};
    parallel_over(of.blocks, cpu::kMergeBlock * experts,
                  [&](int64_t begin, int64_t end) { cpu::merge_experts_dots(args, begin, end); });
    cpu::merge_experts_dots_finish(args, dots.mutable_data_ptr());
  } else {
    for_each_launch(check, lists, {}, grads, [&](cuda::MergeExperts& args, int64_t first) {
      on_cuda(check, lists.like(), [&](auto stream) {
        const Tensor space = workspace(cuda::merge_experts_dots_workspace(args), dots);
        return cuda::merge_experts_dots(args, dots.mutable_data_ptr<float>() + first * experts,
                                        space.mutable_data_ptr(), stream);
      });
    });
  }
  return dots;
}

Tensor2 merge_experts_grads(const Tensor& grad_in, const Tensor& coefficients_in, int64_t num_shared, bool need_shared,
                            bool need_routed) {
  checks::merge_experts_grads(grad_in, coefficients_in, num_shared, need_shared, need_routed);
  const Checker check{"merge_experts_grads"};
  const Tensor grad = grad_in.contiguous(), coefficients = coefficients_in.contiguous();
  const DType dtype = check.element("grad", grad);
  const int64_t parts = coefficients.size(0), experts = coefficients.size(1), num_routed = experts - num_shared;
  const auto result = [&](bool need, int64_t count) {
    if (!need) return at::empty({0}, grad.options());
    auto sizes = grad.sizes().vec();
    sizes.insert(sizes.begin(), count);
    return large_empty(sizes, grad.options());
  };
  const Tensor of_shared = result(need_shared, num_shared), of_routed = result(need_routed, num_routed);
  // Part `part` of expert e, counted from the first of its kind; null where it is not wanted.
  const int64_t stride = grad.numel(), elements = stride / parts, bytes = grad.element_size();
  const auto place = [&](bool need, const Tensor& of, int64_t e, int64_t part) -> void* {
    return need ? static_cast<char*>(of.mutable_data_ptr()) + (e * stride + part * elements) * bytes : nullptr;
  };
  const auto* from = static_cast<const char*>(grad.const_data_ptr());
  if (on_host(grad)) {
    std::vector<void*> pointers;
    std::vector<MergeGradTensor> tensors;
    const int64_t blocks = cpu::merge_blocks(elements);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t e = 0; e < num_shared; ++e) pointers.push_back(place(need_shared, of_shared, e, part));
      for (int64_t e = 0; e < num_routed; ++e) pointers.push_back(place(need_routed, of_routed, e, part));
      tensors.push_back({nullptr, elements, part * blocks, from + part * elements * bytes});
    }
    for (int64_t part = 0; part < parts; ++part) tensors[part].expert_grads = pointers.data() + part * experts;
    const MergeExpertsGrads args{dtype, parts, experts, tensors.data(), coefficients.const_data_ptr()};
    parallel_over(parts * blocks, cpu::kMergeBlock * (experts + 1),
                  [&](int64_t begin, int64_t end) { cpu::merge_experts_grads(args, begin, end); });
    return {of_shared, of_routed};
  }
  for (int64_t first = 0; first < parts; first += cuda::kMaxMergeTensors) {
    cuda::MergeExpertsGrads args{};
    args.dtype = dtype;
    args.num_tensors = std::min(cuda::kMaxMergeTensors, parts - first);
    args.num_shared = num_shared;
    args.num_routed = num_routed;
    args.coefficients = coefficients.const_data_ptr<float>() + first * experts;
    for (int64_t i = 0; i < args.num_tensors; ++i) {
      const int64_t part = first + i;
      args.tensors[i] = {
          place(need_shared, of_shared, 0, part), place(need_routed, of_routed, 0, part), stride, stride, elements,
          from + part * elements * bytes};
    }
    on_cuda(check, grad, [&](auto stream) { return cuda::merge_experts_grads(args, stream); });
  }
  return {of_shared, of_routed};
}

UMMRM_REGISTER(m) {
  m.impl("merge_experts", &merge_experts);
  m.impl("merge_experts_dots", &merge_experts_dots);
  m.impl("merge_experts_grads", &merge_experts_grads);
}

}  // namespace ummrm
