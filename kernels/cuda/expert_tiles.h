// Which tile a grouped GEMM takes: by measurement where bench/tune.py wrote one for its sizes, else by the rules below.
// The choice depends on sizes and the kind of GPU alone, never on what tokens chose, so that results repeat. Plain C++:
// the tests run it without a GPU.
#pragma once

#include <cstdint>

namespace ummrm::cuda {

enum class ExpertProduct : int8_t { forward, input_grad, weight_grad };

struct TileShape {
  int m, n, k, cluster_m, cluster_n;
  const char* schedule;
};

// A cluster loads once what its two tiles share: b's columns for two tiles below one another, a's rows for two side by
// side. The latter rounds no group up to 256 rows, which matters where groups are small; the last one rounds no columns
// up to 256, which an odd multiple of 128 would waste.
inline constexpr TileShape kSm90Tiles[] = {
    {128, 256, 64, 2, 1, "cooperative"}, {128, 128, 64, 1, 2, "pingpong"}, {128, 128, 64, 2, 1, "pingpong"}};
inline constexpr TileShape kSm80Tiles[] = {{128, 256, 32, 1, 1, "multistage"}, {128, 128, 32, 1, 1, "multistage"}};
inline constexpr int kSm90TileCount = 3, kSm80TileCount = 2;
inline constexpr int kSm90SmallTile = 1, kSm80SmallTile = 1, kSm90OddTile = 2;

struct GroupedSizes {
  ExpertProduct product;
  int64_t groups;
  int64_t rows;     // of an average group, tokens and slots over shared and routed experts
  int64_t columns;  // of the result
  int64_t other;    // the third size of the product
};

struct TileChoice {
  int tile;      // of kSm90Tiles or kSm80Tiles
  int64_t band;  // columns that tiles walk along before they go on to the next rows
};

// Largest n with 2^n <= rows; -1 for none.
constexpr int floor_log2(int64_t rows) {
  int bits = -1;
  for (; rows > 0; rows /= 2) ++bits;
  return bits;
}

struct MeasuredTile {
  int arch, sms;  // 90 and 132: an H100 or H200 of the SXM form
  ExpertProduct product;
  int64_t columns, other;
  int log2_rows;
  int tile;
  int64_t band;
};

inline constexpr MeasuredTile kMeasuredTiles[] = {
    {},  // matches nothing; an array must have a row
#include "expert_tiles_measured.inc"
};

// What a product may do at its end, in registers: the gated activation after the up-projection, its backward after the
// down-projection's input gradient (ummrm/expert_glu.h), weight gradients added to what is there. Each saves passes
// over memory and lengthens a kernel whose tensor cores wait meanwhile, so none is taken before a GPU has shown it
// faster: bench/tune.py prints both, and its row then goes here.
enum class Fusion : int8_t { glu, glu_backward, weight_sum };

struct TakenFusion {
  int arch;
  Fusion fusion;
};

inline constexpr TakenFusion kTakenFusions[] = {
    {},  // matches no architecture
};

constexpr bool fusion_taken(int arch, Fusion fusion) {
  for (const TakenFusion& row : kTakenFusions)
    if (row.arch == arch && row.fusion == fusion) return true;
  return false;
}

constexpr int64_t kBandColumns = 2048;      // 8 tiles of 256: with their 16 of 128 rows a square of what 132 tiles read
constexpr int64_t kBandedBytes = 16 << 20;  // of b; less stays in the L2 cache, however tiles walk

constexpr TileChoice choose_tile(int arch, int sms, const GroupedSizes& sizes) {
  for (const MeasuredTile& row : kMeasuredTiles) {
    if (row.arch == arch && row.sms == sms && row.product == sizes.product && row.columns == sizes.columns &&
        row.other == sizes.other && row.log2_rows == floor_log2(sizes.rows))
      return {row.tile, row.band};
  }
  const bool rows_reduced = sizes.product == ExpertProduct::weight_grad;
  const int64_t m = rows_reduced ? sizes.other : sizes.rows, reduced = rows_reduced ? sizes.rows : sizes.other;
  const int64_t large_tiles = sizes.groups * ((m + 127) / 128) * ((sizes.columns + 255) / 256);
  const int64_t wasted = (256 - sizes.columns % 256) % 256;          // columns of the last large tile
  const bool short_groups = arch == 90 && !rows_reduced && m < 512;  // the large tile's clusters are 256 rows tall
  const bool small = reduced <= 1024 || large_tiles < 4 * sms || wasted * 16 > sizes.columns || short_groups;
  const bool banded = sizes.columns > kBandColumns && sizes.columns * reduced * 2 > kBandedBytes;
  // Of Hopper's small tiles the one whose clusters compute less that nobody asked for: columns up to 256 or rows, of
  // which a group has 128 more half of the time.
  const int64_t more_columns = sizes.columns % 256 > 0 && sizes.columns % 256 <= 128 ? 128 : 0;
  const int64_t more_rows = !rows_reduced ? 64 : m % 256 > 0 && m % 256 <= 128 ? 128 : 0;
  const bool odd = more_rows * sizes.columns < more_columns * m;
  const int small_tile = arch != 90 ? kSm80SmallTile : odd ? kSm90OddTile : kSm90SmallTile;
  return {small ? small_tile : 0, banded ? kBandColumns : sizes.columns};
}

}  // namespace ummrm::cuda
