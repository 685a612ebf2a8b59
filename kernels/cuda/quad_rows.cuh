// Sums of a tile as tensor cores leave them in registers, turned into rows that are read and written 16 bytes at a
// time: the end of a product that does more than store its sums. Knows nothing of CUTLASS.
//
// After mma.sync and wgmma alike a lane holds, of every 16 x 8 block, columns 2 * (lane % 4) and the next, in row
// lane / 4 and eight rows below. So four lanes share a row, and of four neighbouring blocks each can have one whole.
#pragma once

#include "numeric.cuh"

namespace ummrm::cuda {

inline constexpr int kEight = 8;           // columns of a block
inline constexpr int kChunk = 4 * kEight;  // columns that four lanes have at a time

// `own[b]`: the lane's two values of block b of four. Becomes the eight of block lane % 4, in their order: those of
// lane p of the four at [p]. Every lane of the warp must come.
__device__ inline void exchange_in_quad(float (&own)[4][2]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int b = 0; b < 4; b += 2) {
      const float got = __shfl_xor_sync(kAllLanes, odd ? own[b][c] : own[b + 1][c], 1);
      own[b][c] = odd ? got : own[b][c];
      own[b + 1][c] = odd ? own[b + 1][c] : got;
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const float got = __shfl_xor_sync(kAllLanes, high ? own[b][c] : own[b + 2][c], 2);
      own[b][c] = high ? got : own[b][c];
      own[b + 2][c] = high ? own[b + 2][c] : got;
    }
  }
}

// Hands a warp's part of a tile to `ending`, eight columns of a row at a time. The part has `blocks` blocks of columns,
// the first at `first_column` of the problem's `columns`, a multiple of eight; with two sides the second half of the
// blocks are the same columns' other values. `sums(block, i, c)` is the lane's c-th sum of a block in its i-th row,
// `row_of(i)` that row within the problem, which has `rows`. An ending has
//   kSides;
//   Read read(row, column): what it reads of eight columns in a row, asked for `ahead` times at once, which takes
//   registers; float write(row, column, read, sums): whose results, summed over the part's columns, go to dot<columns
//   of a part>(row, first column, sum), where it has kDots.
template <int blocks, int lane_rows, int ahead, class Ending, class Sums, class RowOf>
__device__ void finish_rows(const Ending& ending, const Sums& sums, const RowOf& row_of, int rows, int first_column,
                            int columns) {
  constexpr int kSides = Ending::kSides, kChunks = blocks / (4 * kSides);
  static_assert(blocks % (4 * kSides) == 0 && kChunks % ahead == 0);
  const auto column_of = [&](int chunk) {
    return first_column + chunk * kChunk + static_cast<int>(threadIdx.x % 4) * kEight;
  };
#pragma unroll
  for (int i = 0; i < lane_rows; ++i) {
    const int row = row_of(i);
    float dot = 0;
#pragma unroll
    for (int first = 0; first < kChunks; first += ahead) {
      typename Ending::Read reads[ahead];
#pragma unroll
      for (int next = 0; next < ahead; ++next) {
        const int column = column_of(first + next);
        if (row < rows && column < columns) reads[next] = ending.read(row, column);
      }
#pragma unroll
      for (int next = 0; next < ahead; ++next) {
        float values[kSides][4][2], eights[kSides][kEight];
#pragma unroll
        for (int side = 0; side < kSides; ++side) {
#pragma unroll
          for (int at = 0; at < kEight; ++at)
            values[side][at / 2][at % 2] = sums(side * (blocks / kSides) + (first + next) * 4 + at / 2, i, at % 2);
          exchange_in_quad(values[side]);
#pragma unroll
          for (int at = 0; at < kEight; ++at) eights[side][at] = values[side][at / 2][at % 2];
        }
        const int column = column_of(first + next);
        if (row < rows && column < columns) dot += ending.write(row, column, reads[next], eights);
      }
    }
    if constexpr (Ending::kDots) {
      dot = lanes_sum<4>(dot);
      if (threadIdx.x % 4 == 0 && row < rows && first_column < columns)
        ending.template dot<blocks * kEight / kSides>(row, first_column, dot);
    }
  }
}

}  // namespace ummrm::cuda
