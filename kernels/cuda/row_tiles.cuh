// How a block finds its rows in a combined buffer (expert_gemm.h), where only the device knows the experts' offsets:
// the rows are cut into tiles of one expert each, shared experts first, then routed ones, then the rows of none. The
// host launches as many as there can be at most; those that there are not find themselves empty.
#pragma once

#include "launch.cuh"

namespace ummrm::cuda {

struct RowGroups {
  int64_t tokens, num_shared, num_experts, slots;
  const int32_t* expert_offsets;  // [num_experts + 1], on the device

  __host__ __device__ int64_t shared_rows() const { return num_shared * tokens; }
};

template <class Args>
__host__ __device__ RowGroups row_groups(const Args& args) {
  return {args.tokens, args.num_shared, args.num_experts, args.slots, args.expert_offsets};
}

// Experts are counted through: shared ones, then routed ones; num_shared + num_experts stands for none.
struct RowTile {
  int64_t expert;
  int64_t first;  // in the combined buffer
  int64_t count;  // at most the height; 0: there is no such tile
};

// Tiles enough for any offsets: each of the E experts and the rows of none may leave one unfinished.
__host__ __device__ inline int64_t most_row_tiles(const RowGroups& groups, int64_t height) {
  const int64_t routed = (groups.slots + (groups.num_experts + 1) * (height - 1)) / height;
  return groups.num_shared * ceil_div(groups.tokens, height) + (routed < groups.slots ? routed : groups.slots);
}

// The rows of one expert, or of none.
__device__ inline RowTile expert_rows(const RowGroups& groups, int64_t expert) {
  if (expert < groups.num_shared) return {expert, expert * groups.tokens, groups.tokens};
  const int64_t routed = expert - groups.num_shared, begin = groups.expert_offsets[routed];
  const int64_t end = routed < groups.num_experts ? groups.expert_offsets[routed + 1] : groups.slots;
  return {expert, groups.shared_rows() + begin, end - begin};
}

// Tiles before the first of `expert`.
template <int height>
__device__ int64_t first_row_tile(const RowGroups& groups, int64_t expert) {
  const int64_t each = ceil_div(groups.tokens, height);
  if (expert <= groups.num_shared) return expert * each;
  int64_t tiles = groups.num_shared * each;
  for (int64_t e = groups.num_shared; e < expert; ++e) tiles += ceil_div(expert_rows(groups, e).count, height);
  return tiles;
}

template <int height>
__device__ RowTile row_tile(const RowGroups& groups, int64_t tile) {
  const int64_t each = ceil_div(groups.tokens, height), none = groups.num_shared + groups.num_experts;
  // Shared experts by division, the others by counting: they are few, and the offsets are in the cache.
  int64_t expert = each == 0 || tile >= groups.num_shared * each ? groups.num_shared : tile / each;
  tile -= expert * each;
  for (; expert <= none; ++expert) {
    const RowTile rows = expert_rows(groups, expert);
    const int64_t tiles = ceil_div(rows.count, height);
    if (tile < tiles) {
      const int64_t skipped = tile * height, left = rows.count - skipped;
      return {expert, rows.first + skipped, left < height ? left : height};
    }
    tile -= tiles;
  }
  return {none, 0, 0};
}

// Blocks that run at once share rows and columns in the L2 cache: eight row tiles by as many column tiles as fit.
struct Place {
  int64_t row, column;
};
__device__ inline Place banded(int64_t block, int64_t row_tiles, int64_t column_tiles) {
  constexpr int64_t kBand = 8;
  const int64_t first = block / (kBand * column_tiles) * kBand, left = row_tiles - first;
  const int64_t height = left < kBand ? left : kBand, within = block - first * column_tiles;
  return {first + within % height, within / height};
}

}  // namespace ummrm::cuda
