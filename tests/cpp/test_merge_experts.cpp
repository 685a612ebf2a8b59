// merge_experts.h against plain sums in double, over tensors of awkward sizes, cut over one and several threads.
#include "ummrm/merge_experts.h"

#include "testing.h"

using namespace testing;

static void compare(DType type, int64_t num_experts, const std::vector<int64_t>& sizes = {1, 4095, 0, 4097, 9000}) {
  Random random(num_experts);
  const auto n = static_cast<int64_t>(sizes.size());
  std::vector<std::vector<Array>> experts(n);
  std::vector<std::vector<const void*>> pointers(n);
  std::vector<Array> grads;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t e = 0; e < num_experts; ++e) experts[i].push_back(random.array(type, sizes[i]));
    for (const Array& expert : experts[i]) pointers[i].push_back(expert.data());
    grads.push_back(random.array(type, sizes[i]));
  }
  const Array coefficients = random.array(accumulator(type), n * num_experts);

  const auto run = [&](int64_t threads, std::vector<Array>& merged, Array& dots) {
    std::vector<ummrm::MergeTensor> tensors;
    int64_t blocks = 0;
    for (int64_t i = 0; i < n; ++i) {
      merged.emplace_back(type, sizes[i]);
      tensors.push_back({pointers[i].data(), sizes[i], blocks, nullptr, grads[i].data()});
      blocks += ummrm::cpu::merge_blocks(sizes[i]);
    }
    for (int64_t i = 0; i < n; ++i) tensors[i].merged = merged[i].data();
    std::vector<double> block_dots(blocks * num_experts, NAN);
    const ummrm::MergeExperts args{type, n, num_experts, tensors.data(), coefficients.data(), block_dots.data()};
    launch(blocks, threads, [&](int64_t begin, int64_t end) { ummrm::cpu::merge_experts(args, begin, end); });
    launch(blocks, threads, [&](int64_t begin, int64_t end) { ummrm::cpu::merge_experts_dots(args, begin, end); });
    ummrm::cpu::merge_experts_dots_finish(args, dots.data());
  };
  const auto run_grads = [&](int64_t threads, std::vector<Array>& of_experts) {
    std::vector<std::vector<void*>> to(n);
    std::vector<ummrm::MergeGradTensor> tensors;
    int64_t blocks = 0;
    of_experts.reserve(n * num_experts);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t e = 0; e < num_experts; ++e) {
        of_experts.emplace_back(type, sizes[i]);
        to[i].push_back(e % 3 == 2 ? nullptr : of_experts.back().data());  // some are not wanted
      }
      tensors.push_back({to[i].data(), sizes[i], blocks, grads[i].data()});
      blocks += ummrm::cpu::merge_blocks(sizes[i]);
    }
    const ummrm::MergeExpertsGrads args{type, n, num_experts, tensors.data(), coefficients.data()};
    launch(blocks, threads, [&](int64_t begin, int64_t end) { ummrm::cpu::merge_experts_grads(args, begin, end); });
  };
  std::vector<Array> of_experts, of_experts_again;
  run_grads(1, of_experts);
  run_grads(3, of_experts_again);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t e = 0; e < num_experts; ++e) {
      const Array& got = of_experts[i * num_experts + e];
      CHECK(got.same_bits(of_experts_again[i * num_experts + e]), "an expert's gradient depends on the threads");
      for (int64_t j = 0; j < sizes[i] && e % 3 != 2; ++j) {
        const double want = coefficients[i * num_experts + e] * grads[i][j];
        check_close(got, j, want, epsilon(type) * std::fabs(want) + 1e-30, "expert's gradient");
      }
    }
  }

  std::vector<Array> merged, merged_again;
  Array dots(accumulator(type), n * num_experts), dots_again(accumulator(type), n * num_experts);
  run(1, merged, dots);
  run(3, merged_again, dots_again);

  for (int64_t i = 0; i < n; ++i) {
    CHECK(merged[i].same_bits(merged_again[i]), "merged tensor %lld depends on the threads", static_cast<long long>(i));
    for (int64_t j = 0; j < sizes[i]; ++j) {
      double want = 0, magnitude = 0;
      for (int64_t e = 0; e < num_experts; ++e) {
        want += coefficients[i * num_experts + e] * experts[i][e][j];
        magnitude += std::fabs(coefficients[i * num_experts + e] * experts[i][e][j]);
      }
      const double sums = epsilon(accumulator(type)) * static_cast<double>(num_experts + 1) * magnitude;
      check_close(merged[i], j, want, epsilon(type) * std::fabs(want) + sums + 1e-30, "merged");
    }
    for (int64_t e = 0; e < num_experts; ++e) {
      double want = 0, magnitude = 0;
      for (int64_t j = 0; j < sizes[i]; ++j) {
        want += grads[i][j] * experts[i][e][j];
        magnitude += std::fabs(grads[i][j] * experts[i][e][j]);
      }
      check_close(dots, i * num_experts + e, want, 24 * epsilon(accumulator(type)) * magnitude, "dot");
    }
  }
  CHECK(dots.same_bits(dots_again), "dots depend on the threads");
}

int main() {
  for (const DType type : kTypes) {
    compare(type, 1);
    compare(type, 9);
    compare(type, 2, {(int64_t{5} << 20) / (type == DType::f64 ? 8 : 2) + 37});  // past the caches
  }
  return finish();
}
