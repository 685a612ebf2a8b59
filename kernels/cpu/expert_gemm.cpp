// CPU kernel of expert_gemm.h: column sums over a group's rows, in fixed runs of rows that are summed in double, so
// that neither the number of rows nor of threads shows in the result.
#include "ummrm/expert_gemm.h"

#include <algorithm>

#include "dispatch.h"

namespace ummrm::cpu {
namespace {

constexpr int64_t kRun = 64;  // rows

template <class T>
UMMRM_INLINE void column_sums_body(const ColumnSums& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  const auto* weights = static_cast<const F*>(args.row_weights);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t column = block * kColumnBlock, width = std::min(kColumnBlock, args.width - column);
    const T* rows = static_cast<const T*>(args.rows) + column;
    T* out = static_cast<T*>(args.out) + column;
    double total[kColumnBlock] = {};
    for (int64_t first = 0; first < args.count; first += kRun) {
      F sum[kColumnBlock] = {};
      for (int64_t r = first; r < std::min(first + kRun, args.count); ++r) {
        const T* row = rows + r * args.width;
        const F weight = weights == nullptr ? F(1) : weights[r];
        for (int64_t i = 0; i < width; ++i) sum[i] += weight * load(row[i]);
      }
      for (int64_t i = 0; i < width; ++i) total[i] += sum[i];
    }
    for (int64_t i = 0; i < width; ++i) out[i] = store<T>(static_cast<F>(total[i]));
  }
}

}  // namespace

UMMRM_DEFINE_LAUNCHER(column_sums, ColumnSums, column_sums_body)

}  // namespace ummrm::cpu
