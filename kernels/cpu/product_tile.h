// One tile of a matrix product, for expert_products.cpp: its sums stay in registers while the depth passes. Per step a
// few vectors of one operand, packed so that they lie one behind the other, meet one number a row of the other, read
// where it lies. In the language's vector extensions, so that each instruction set gets a tile of its own size; the
// loop of a whole tile is product_loop.h's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "numeric.h"
#include "product_loop.h"
#include "ummrm/expert_products.h"

// The other kernels round products before adding them, so that each clone gives the same bits; a product of matrices
// takes half the time with both in one instruction.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions alone
#define UMMRM_HAS_VECTORS 1
#define UMMRM_INLINED __attribute__((always_inline))
#endif

#ifdef UMMRM_HAS_VECTORS
namespace ummrm::cpu {

// Of a packed panel: 96 KB of 48 columns, beside the other operand in a second-level cache.
inline constexpr int64_t kDepth = 512;

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Depth is cut evenly, in multiples of 16.
constexpr int64_t depth_step(int64_t depth) {
  const int64_t blocks = std::max<int64_t>(1, (depth + kDepth - 1) / kDepth);
  return std::max<int64_t>(16, round_up((depth + blocks - 1) / blocks, 16));
}

template <int kWidth>
struct VectorOf {
  typedef float type __attribute__((vector_size(kWidth * sizeof(float)), aligned(alignof(float)), may_alias));
  typedef int mask __attribute__((vector_size(kWidth * sizeof(int))));
};
template <int kWidth>
using Vector = typename VectorOf<kWidth>::type;

template <int kWidth>
UMMRM_INLINE Vector<kWidth> load_vector(const float* from) {
  return *reinterpret_cast<const Vector<kWidth>*>(from);
}
template <int kWidth>
UMMRM_INLINE void store_vector(float* to, Vector<kWidth> value) {
  *reinterpret_cast<Vector<kWidth>*>(to) = value;
}

// A vector width, and the largest tile whose sums fit the registers: kRows x (kVectors vectors).
template <int width, int rows, int vectors>
struct Shape {
  static constexpr int kWidth = width, kRows = rows, kVectors = vectors, kColumns = width * vectors;
};

// In place: what was element r of vector c becomes element r * kCount + c of all of them, one behind the other.
// Of as many vectors as each has elements that is their transpose.
template <int kWidth, int kCount>
UMMRM_INLINE void interleave(Vector<kWidth> (&v)[kCount]) {
  typename VectorOf<kWidth>::mask low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / 2 + i % 2 * kWidth;
    high[i] = low[i] + kWidth / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < kCount; stage *= 2) {
    Vector<kWidth> next[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + kCount / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + kCount / 2], high);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) v[i] = next[i];
  }
}

// to[k][r] = row r's element k, for kRun rows and `count` elements.
constexpr int kRun = 4;
UMMRM_INLINE void pack_transposed_run(const float* const (&rows)[kRun], int64_t count, float* to, int64_t to_stride) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    Vector<4> v[4] = {load_vector<4>(rows[0] + k), load_vector<4>(rows[1] + k), load_vector<4>(rows[2] + k),
                      load_vector<4>(rows[3] + k)};
    interleave<4>(v);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store_vector<4>(to + (k + i) * to_stride, v[i]);
  }
  for (; k < count; ++k) {
    for (int i = 0; i < 4; ++i) to[k * to_stride + i] = rows[i][k];
  }
}

alignas(64) inline constexpr float kZeros[kDepth + 16] = {};

// The first `count` of `rows`, transposed: to[k][r], `width` wide, which is whole vectors; zeros where there is no row.
template <class S>
UMMRM_INLINE void pack_transposed(const Rows& rows, int64_t count, int64_t first_depth, int64_t depth, float* to,
                                  int64_t width) {
  for (int64_t r = 0; r < width; r += kRun) {
    const float* from[kRun];
    for (int i = 0; i < kRun; ++i) from[i] = r + i < count ? rows.at(r + i) + first_depth : kZeros;
    pack_transposed_run(from, depth, to + r, width);
  }
}

// `count` columns of a matrix that has the depth as its rows, not transposed: to[k][c] = row k's element c.
template <class S>
UMMRM_INLINE void pack(const Rows& rows, int64_t first_depth, int64_t depth, int64_t column, int64_t count, float* to,
                       int64_t width) {
  for (int64_t k = 0; k < depth; ++k, to += width) {
    const float* from = rows.at(first_depth + k) + column;
    int64_t c = 0;
    for (; c + S::kWidth <= count; c += S::kWidth) store_vector<S::kWidth>(to + c, load_vector<S::kWidth>(from + c));
    for (; c < count; ++c) to[c] = from[c];
    for (; c < width; ++c) to[c] = 0;
  }
}

// See TileLoop; `stream`: past the caches, where `out` is aligned to a vector.
template <class S, int kTileRows, int kVectors>
UMMRM_INLINE void run_loop(const TileLoop& loop, [[maybe_unused]] bool stream) {
#ifdef UMMRM_HAS_CLONES
  if constexpr (kTileRows == S::kRows) {
    const auto& table = S::kWidth == 16 ? loops::kWide : loops::kUsual;
    return table[kVectors - 1][2 * stream + (loop.pack != nullptr)](loop);
  }
#endif
  constexpr int64_t kBytes = sizeof(float);
  Vector<S::kWidth> sums[kTileRows][kVectors] = {};
  const float* b = loop.b;
  for (int64_t k = 0; k < loop.depth; ++k, b += loop.b_step / kBytes) {
    Vector<S::kWidth> columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) columns[j] = load_vector<S::kWidth>(b + j * S::kWidth);
    if (loop.pack != nullptr) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        store_vector<S::kWidth>(loop.pack + (k * kVectors + j) * S::kWidth, columns[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const float value = loop.a[(i * loop.a_row + k * loop.a_step) / kBytes];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] += value * columns[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      store_vector<S::kWidth>(loop.out + i * loop.out_row / kBytes + j * S::kWidth, sums[i][j]);
  }
}

// Where a tile's sums go, and what is added to them.
struct Target {
  float* out;
  int64_t stride;
  bool add;             // on top of what is there
  const float* bias;    // otherwise a number a column, or null
  bool stream = false;  // past the caches: not added to, and not read soon
};

// An operand of a tile, in elements: the number for row i and step k is at[i * row + k * step].
struct Numbers {
  const float* at;
  int64_t row, step;
};

UMMRM_INLINE TileLoop loop_of(int64_t depth, const Numbers& a, const float* b, int64_t b_stride, float* pack,
                              Ahead* ahead) {
  constexpr int64_t kBytes = sizeof(float);
  return {a.at, a.row * kBytes, a.step * kBytes, b, b_stride * kBytes, depth, pack, nullptr, 0, ahead};
}

// A tile whose vectors run along the columns of the result.
template <class S, int kTileRows, int kVectors>
UMMRM_INLINE void column_tile(int64_t depth, const Numbers& a, const float* b, int64_t b_stride, const Target& target,
                              int64_t columns, float* pack, Ahead* ahead) {
  constexpr int kWidth = S::kWidth, kColumns = kWidth * kVectors;
  TileLoop loop = loop_of(depth, a, b, b_stride, pack, ahead);
  for (int i = 0; i < kTileRows && !target.stream; ++i) {
    for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(target.out + i * target.stride + c, 1);
  }
  if (columns == kColumns && !target.add && target.bias == nullptr) {
    loop.out = target.out;
    loop.out_row = target.stride * static_cast<int64_t>(sizeof(float));
    return run_loop<S, kTileRows, kVectors>(loop, target.stream);
  }
  alignas(64) float sums[kTileRows][kColumns];
  loop.out = sums[0];
  loop.out_row = sizeof(sums[0]);
  run_loop<S, kTileRows, kVectors>(loop, false);
  for (int i = 0; i < kTileRows; ++i) {
    float* out = target.out + i * target.stride;
    const float* start = target.add ? out : target.bias;
    if (columns == kColumns) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c += kWidth)
        store_vector<kWidth>(out + c, load_vector<kWidth>(start + c) + load_vector<kWidth>(sums[i] + c));
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) out[c] = start == nullptr ? sums[i][c] : start[c] + sums[i][c];
  }
}

// A tile whose vectors run along the rows of the result: row i of a belongs to column i. `rows` of them are wanted.
template <class S, int kTileColumns, int kVectors>
UMMRM_INLINE void row_tile(int64_t depth, const Numbers& a, const float* b, int64_t b_stride, const Target& target,
                           int64_t rows, Ahead* ahead) {
  constexpr int kTileRows = S::kWidth * kVectors;
  for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(target.out + r * target.stride, 1);
  alignas(64) float tile[kTileColumns][kTileRows];
  TileLoop loop = loop_of(depth, a, b, b_stride, nullptr, ahead);
  loop.out = tile[0];
  loop.out_row = sizeof(tile[0]);
  run_loop<S, kTileColumns, kVectors>(loop, false);
  int64_t r = 0;
  if constexpr (kTileColumns % 4 == 0) {
    const Vector<kTileColumns> bias =
        target.bias == nullptr ? Vector<kTileColumns>{} : load_vector<kTileColumns>(target.bias);
    for (; r + S::kWidth <= rows; r += S::kWidth) {
      Vector<S::kWidth> v[kTileColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kTileColumns; ++c) v[c] = load_vector<S::kWidth>(tile[c] + r);
      interleave<S::kWidth>(v);
      alignas(64) float lines[S::kWidth][kTileColumns];
#pragma GCC unroll 8
      for (int c = 0; c < kTileColumns; ++c) store_vector<S::kWidth>(lines[0] + c * S::kWidth, v[c]);
#pragma GCC unroll 16
      for (int i = 0; i < S::kWidth; ++i) {
        float* to = target.out + (r + i) * target.stride;
        store_vector<kTileColumns>(
            to, (target.add ? load_vector<kTileColumns>(to) : bias) + load_vector<kTileColumns>(lines[i]));
      }
    }
  }
  for (; r < rows; ++r) {
    float* to = target.out + r * target.stride;
    for (int c = 0; c < kTileColumns; ++c)
      to[c] = (target.add ? to[c] : target.bias == nullptr ? 0.f : target.bias[c]) + tile[c][r];
  }
}

// Columns of the next panel: as many as a tile holds, but two and two vectors rather than three and one, of which the
// last would be half as fast.
template <class S>
UMMRM_INLINE int64_t next_panel(int64_t left) {
  constexpr int64_t kWidth = S::kWidth;
  static_assert(S::kVectors == 3);
  return std::min(left, left > S::kColumns && left <= 4 * kWidth ? 2 * kWidth : S::kColumns);
}

// Calls body.template operator()<vectors>() with as many as `columns` need.
template <class S, class Body>
UMMRM_INLINE void with_vectors(int64_t columns, const Body& body) {
  static_assert(S::kVectors == 3);
  if (columns > 2 * S::kWidth) return body.template operator()<3>();
  if (columns > S::kWidth) return body.template operator()<2>();
  body.template operator()<1>();
}

// Calls body.template operator()<count>(first) over `total`, in runs of kRows and, at the end, of less.
template <class S, class Body>
UMMRM_INLINE void in_tiles(int64_t total, const Body& body) {
  int64_t first = 0;
  for (; first + S::kRows <= total; first += S::kRows) body.template operator()<S::kRows>(first);
  if constexpr (S::kRows > 4) {
    if (total - first >= 4) {
      body.template operator()<4>(first);
      first += 4;
    }
  }
  if (total - first >= 2) {
    body.template operator()<2>(first);
    first += 2;
  }
  if (total - first >= 1) body.template operator()<1>(first);
}

}  // namespace ummrm::cpu
#endif
