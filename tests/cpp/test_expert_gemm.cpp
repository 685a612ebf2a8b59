// expert_gemm.h: bias gradients against plain column sums in double.
#include "ummrm/expert_gemm.h"

#include "testing.h"

using namespace testing;

static void compare(DType type, int64_t count, int64_t width, bool weighted) {
  Random random(count + width);
  const Array rows = random.array(type, count * width), weights = random.array(accumulator(type), count);
  Array out(type, width), again(type, width);
  for (auto& [to, threads] : {std::pair<Array*, int64_t>{&out, 1}, {&again, 3}}) {
    const ummrm::ColumnSums args{type, rows.data(), weighted ? weights.data() : nullptr, count, width, to->data()};
    launch((width + ummrm::cpu::kColumnBlock - 1) / ummrm::cpu::kColumnBlock, threads,
           [&](int64_t begin, int64_t end) { ummrm::cpu::column_sums(args, begin, end); });
  }
  CHECK(out.same_bits(again), "column sums depend on the threads");
  for (int64_t c = 0; c < width; ++c) {
    double want = 0, magnitude = 0;
    for (int64_t r = 0; r < count; ++r) {
      const double term = (weighted ? weights[r] : 1) * rows[r * width + c];
      want += term;
      magnitude += std::fabs(term);
    }
    check_close(out, c, want, epsilon(type) * std::fabs(want) + 66 * epsilon(accumulator(type)) * magnitude,
                "column sum");
  }
}

int main() {
  for (const DType type : kTypes) {
    for (const bool weighted : {true, false}) {
      compare(type, 0, 3, weighted);
      compare(type, 1, 128, weighted);
      compare(type, 333, 301, weighted);
    }
  }
  return finish();
}
