// The part of the grouped expert GEMM that is no GEMM on a CPU: bias gradients. The products themselves belong to the
// BLAS behind at::mm, which no kernel here would beat (csrc/expert_gemm.cpp).
#pragma once

#include <cstdint>

#include "ummrm/types.h"

namespace ummrm {

// out[c] = sum over the group's rows of row_weights[r] * rows[r, c], accumulated wide, rounded once.
struct ColumnSums {
  DType dtype;              // of rows and out
  const void* rows;         // the group's first row, [count, width]
  const void* row_weights;  // accumulator type, the group's first weight; null: ones
  int64_t count, width;
  void* out;  // [width]
};

namespace cpu {

inline constexpr int64_t kColumnBlock = 128;

void column_sums(const ColumnSums& args, int64_t begin_block, int64_t end_block);

}  // namespace cpu
}  // namespace ummrm
