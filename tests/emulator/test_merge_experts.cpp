// The CUDA kernels of merge_experts.h on the emulator, against plain loops in double: several tensors a call, slices of
// a larger tensor, ragged ends, more experts than wait in shared memory at once.
#include "merge_experts.cu"

#include <memory>

#include "emulated.h"

using namespace testing;

struct Case {
  DType type;
  int64_t num_shared, num_routed;
  std::vector<int64_t> elements;
  int64_t gap;  // elements between one routed expert's end and the next one's start; twice that between shared ones
  bool aligned;
};

struct Results {
  std::vector<Array> merged, of_shared, of_routed;
  Array dots;
};

static void check(const Case& c) {
  Random random(c.num_routed * 13 + c.elements[0]);
  const int64_t experts = c.num_shared + c.num_routed, n = static_cast<int64_t>(c.elements.size());
  std::vector<Array> shared, routed, grads;
  for (const int64_t elements : c.elements) {
    shared.push_back(random.array(c.type, c.num_shared * (elements + 2 * c.gap)));
    routed.push_back(random.array(c.type, c.num_routed * (elements + c.gap)));
    grads.push_back(random.array(c.type, elements));
  }
  const Array coefficients = random.array(DType::f32, n * experts);
  const auto run = [&] {
    std::vector<std::unique_ptr<Placed>> keep;
    const auto place = [&](const Array& array) {
      keep.push_back(std::make_unique<Placed>(array, c.aligned));
      return keep.back()->data();
    };
    ummrm::cuda::MergeExperts args{c.type,       n,  c.num_shared,
                                   c.num_routed, {}, static_cast<const float*>(coefficients.data())};
    std::vector<size_t> outputs;
    for (int64_t i = 0; i < n; ++i) {
      args.tensors[i] = {place(shared[i]),
                         place(routed[i]),
                         c.elements[i] + 2 * c.gap,
                         c.elements[i] + c.gap,
                         c.elements[i],
                         place(Array(c.type, c.elements[i])),
                         nullptr};
      outputs.push_back(keep.size() - 1);
      args.tensors[i].grad = place(grads[i]);
    }
    // The experts' gradients go where experts of such strides would lie.
    ummrm::cuda::MergeExpertsGrads of{c.type, n, c.num_shared, c.num_routed, {}, args.coefficients};
    std::vector<size_t> grad_outputs;
    for (int64_t i = 0; i < n; ++i) {
      const ummrm::cuda::MergeTensor& like = args.tensors[i];
      of.tensors[i] = {place(Array(c.type, c.num_shared * like.shared_stride)),
                       place(Array(c.type, c.num_routed * like.routed_stride)),
                       like.shared_stride,
                       like.routed_stride,
                       like.elements,
                       like.grad};
      grad_outputs.push_back(keep.size() - 2);
    }
    Results results{{}, {}, {}, Array(DType::f32, n * experts)};
    check_launch(ummrm::cuda::merge_experts(args, nullptr), "merge_experts");
    std::vector<unsigned char> workspace(ummrm::cuda::merge_experts_dots_workspace(args), 0xff);
    check_launch(
        ummrm::cuda::merge_experts_dots(args, static_cast<float*>(results.dots.data()), workspace.data(), nullptr),
        "merge_experts_dots");
    check_launch(ummrm::cuda::merge_experts_grads(of, nullptr), "merge_experts_grads");
    for (const size_t at : outputs) results.merged.push_back(keep[at]->array());
    for (const size_t at : grad_outputs) {
      results.of_shared.push_back(keep[at]->array());
      results.of_routed.push_back(keep[at + 1]->array());
    }
    return results;
  };
  const Results got = under_all_orders("merge_experts", run, [](const Results& a, const Results& b) {
    bool same = a.dots.same_bits(b.dots);
    for (size_t i = 0; i < a.merged.size(); ++i)
      same &= a.merged[i].same_bits(b.merged[i]) && a.of_shared[i].same_bits(b.of_shared[i]) &&
              a.of_routed[i].same_bits(b.of_routed[i]);
    return same;
  });
  for (int64_t i = 0; i < n; ++i) {
    const int64_t shared_stride = c.elements[i] + 2 * c.gap, stride = c.elements[i] + c.gap;
    std::vector<double> dots(experts, 0), sizes(experts, 0);
    for (int64_t j = 0; j < c.elements[i]; ++j) {
      double want = 0, size = 0;
      for (int64_t e = 0; e < experts; ++e) {
        const double w =
            e < c.num_shared ? shared[i][e * shared_stride + j] : routed[i][(e - c.num_shared) * stride + j];
        want += coefficients[i * experts + e] * w;
        size += std::fabs(coefficients[i * experts + e] * w);
        dots[e] += grads[i][j] * w;
        sizes[e] += std::fabs(grads[i][j] * w);
        const double of_expert = coefficients[i * experts + e] * grads[i][j];
        const Array& at = e < c.num_shared ? got.of_shared[i] : got.of_routed[i];
        check_close(at, e < c.num_shared ? e * shared_stride + j : (e - c.num_shared) * stride + j, of_expert,
                    epsilon(c.type) * std::fabs(of_expert), "expert's gradient");
      }
      check_close(got.merged[i], j, want, 1e-6 * size + epsilon(c.type) * std::fabs(want), "merged");
    }
    for (int64_t e = 0; e < experts; ++e) check_close(got.dots, i * experts + e, dots[e], 1e-6 * sizes[e], "dot");
  }
}

int main() {
  for (const DType type : kCudaTypes) {
    for (const bool aligned : {true, false}) {
      check({type, 1, 3, {16}, 0, aligned});
      check({type, 2, 2, {37, 5}, 0, aligned});     // strides that break the alignment
      check({type, 2, 4, {45, 8, 1}, 3, aligned});  // the routed experts alone are aligned
      if (kSmallOnly) continue;
      check({type, 1, 7, {8200, 4096, 4095, 64, 64, 40}, 8, aligned});  // a gated FFN with its biases
      check({type, 0, 35, {300, 0, 17}, 11, aligned});
      check({type, 1, 0, {4104}, 8, aligned});
    }
  }
  ummrm::cuda::MergeExperts many{};
  ummrm::cuda::MergeExpertsGrads many_grads{};
  many.num_tensors = many_grads.num_tensors = ummrm::cuda::kMaxMergeTensors + 1;
  CHECK(ummrm::cuda::merge_experts(many, nullptr) != 0 &&
            ummrm::cuda::merge_experts_dots(many, nullptr, nullptr, nullptr) != 0 &&
            ummrm::cuda::merge_experts_grads(many_grads, nullptr) != 0,
        "more tensors than a call takes are refused");
  return finish();
}
