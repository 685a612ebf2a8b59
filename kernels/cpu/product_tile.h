// One tile of a matrix product, for expert_products.cpp: its sums stay in registers while the depth passes. Per step a
// few vectors of one operand, packed so that they lie one behind the other, meet one number a row of the other, read
// where it lies. In the language's vector extensions, so that each instruction set gets a tile of its own size.
#pragma once

#include <algorithm>
#include <cstdint>

#include "numeric.h"
#include "ummrm/expert_products.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

// To an address aligned to 16 bytes.
template <int kWidth>
UMMRM_INLINE void stream_vector(float* to, Vector<kWidth> value) {
#if defined(__SSE2__)
  float elements[kWidth];
  store_vector<kWidth>(elements, value);
#pragma GCC unroll 4
  for (int i = 0; i < kWidth; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(elements + i));
#else
  store_vector<kWidth>(to, value);
#endif
}

// A vector width, and the largest tile whose sums fit the registers: kRows x (kVectors vectors).
template <int width, int rows, int vectors>
struct Shape {
  static constexpr int kWidth = width, kRows = rows, kVectors = vectors, kColumns = width * vectors;
};

// In place: element j of vector i becomes element i of vector j.
UMMRM_INLINE void transpose(Vector<4> (&v)[4]) {
  typedef int Mask __attribute__((vector_size(16)));
  const Vector<4> a = __builtin_shuffle(v[0], v[1], Mask{0, 4, 1, 5});
  const Vector<4> b = __builtin_shuffle(v[0], v[1], Mask{2, 6, 3, 7});
  const Vector<4> c = __builtin_shuffle(v[2], v[3], Mask{0, 4, 1, 5});
  const Vector<4> d = __builtin_shuffle(v[2], v[3], Mask{2, 6, 3, 7});
  v[0] = __builtin_shuffle(a, c, Mask{0, 1, 4, 5});
  v[1] = __builtin_shuffle(a, c, Mask{2, 3, 6, 7});
  v[2] = __builtin_shuffle(b, d, Mask{0, 1, 4, 5});
  v[3] = __builtin_shuffle(b, d, Mask{2, 3, 6, 7});
}

// to[k][r] = row r's element k, for kRun rows and `count` elements.
constexpr int kRun = 4;
UMMRM_INLINE void pack_transposed_run(const float* const (&rows)[kRun], int64_t count, float* to, int64_t to_stride) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    Vector<4> v[4] = {load_vector<4>(rows[0] + k), load_vector<4>(rows[1] + k), load_vector<4>(rows[2] + k),
                      load_vector<4>(rows[3] + k)};
    transpose(v);
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

template <class S, int kTileRows, int kVectors>
using Sums = Vector<S::kWidth>[kTileRows][kVectors];

// What a tile does beside its products, a little at each step of the depth, where it costs next to nothing: fetch the
// lines that the next panel will need, or pack its own panel for the tiles that follow.
struct Aside {
  const float* fetch = nullptr;  // one line a step
  int64_t fetch_stride = 0;
  float* pack = nullptr;  // [depth, columns]
};

// sums[i][j] += a_i[k] * b[k][j], over the depth; with kStep > 1 a_i[k] is a[0][k * kStep + i] instead.
template <class S, int kTileRows, int kVectors, int kStep, bool kFetches, bool kPacks>
UMMRM_INLINE void add_products(int64_t depth, const float* const* a, const float* b, int64_t b_stride, Aside aside,
                               Sums<S, kTileRows, kVectors>& sums) {
  const float* rows[kTileRows];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) rows[i] = a[i];
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Vector<S::kWidth> columns[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) columns[j] = load_vector<S::kWidth>(b + j * S::kWidth);
    if constexpr (kFetches) __builtin_prefetch(aside.fetch + k * aside.fetch_stride, 0, 2);
    if constexpr (kPacks) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j)
        store_vector<S::kWidth>(aside.pack + (k * kVectors + j) * S::kWidth, columns[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      const float value = kStep == 1 ? rows[i][k] : rows[0][k * kStep + i];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] += value * columns[j];
    }
  }
}

// Where a tile's sums go, and what they begin with.
struct Target {
  float* out;
  int64_t stride;
  bool add;             // on top of what is there
  const float* bias;    // otherwise what they begin with: a number a column, or null
  bool stream = false;  // past the caches: not added to, and not read soon
};

// A tile whose vectors run along the columns of the result.
template <class S, int kTileRows, int kVectors, int kStep>
UMMRM_INLINE void column_tile(int64_t depth, const float* const* a, const float* b, int64_t b_stride,
                              const Target& target, int64_t columns, Aside aside = {}) {
  constexpr int kWidth = S::kWidth, kColumns = kWidth * kVectors;
  Sums<S, kTileRows, kVectors> sums;
  const bool whole = columns == kColumns;
  float start[kColumns] = {};
  if (target.bias != nullptr) std::copy_n(target.bias, columns, start);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = load_vector<kWidth>(start + j * kWidth);
  }
  for (int i = 0; i < kTileRows && !target.stream; ++i) {
    for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(target.out + i * target.stride + c, 1);
  }
  if (aside.pack != nullptr) {
    add_products<S, kTileRows, kVectors, kStep, false, true>(depth, a, b, b_stride, aside, sums);
  } else if (aside.fetch != nullptr) {
    add_products<S, kTileRows, kVectors, kStep, true, false>(depth, a, b, b_stride, aside, sums);
  } else {
    add_products<S, kTileRows, kVectors, kStep, false, false>(depth, a, b, b_stride, aside, sums);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    float* out = target.out + i * target.stride;
    if (whole && target.stream) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) stream_vector<kWidth>(out + j * kWidth, sums[i][j]);
      continue;
    }
    if (whole) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* to = out + j * kWidth;
        store_vector<kWidth>(to, target.add ? load_vector<kWidth>(to) + sums[i][j] : sums[i][j]);
      }
      continue;
    }
    float row[kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store_vector<kWidth>(row + j * kWidth, sums[i][j]);
    for (int64_t c = 0; c < columns; ++c) out[c] = target.add ? out[c] + row[c] : row[c];
  }
}

// A tile whose vectors run along the rows of the result: a_i belongs to column i. `rows` of them are wanted.
template <class S, int kTileColumns, int kVectors>
UMMRM_INLINE void row_tile(int64_t depth, const float* const* a, const float* b, int64_t b_stride, const Target& target,
                           int64_t rows) {
  constexpr int kWidth = S::kWidth, kTileRows = kWidth * kVectors;
  Sums<S, kTileColumns, kVectors> sums;
#pragma GCC unroll 16
  for (int i = 0; i < kTileColumns; ++i) {
    const float start = target.bias == nullptr ? 0.f : target.bias[i];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = start + Vector<kWidth>{};
  }
  for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(target.out + r * target.stride, 1);
  add_products<S, kTileColumns, kVectors, 1, false, false>(depth, a, b, b_stride, {}, sums);
  alignas(64) float tile[kTileColumns][kTileRows];
#pragma GCC unroll 16
  for (int i = 0; i < kTileColumns; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store_vector<kWidth>(tile[i] + j * kWidth, sums[i][j]);
  }
  int64_t r = 0;
  if constexpr (kTileColumns % 4 == 0) {
    for (; r + 4 <= rows; r += 4) {
#pragma GCC unroll 4
      for (int c = 0; c < kTileColumns; c += 4) {
        Vector<4> v[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) v[i] = load_vector<4>(tile[c + i] + r);
        transpose(v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          float* to = target.out + (r + i) * target.stride + c;
          store_vector<4>(to, target.add ? load_vector<4>(to) + v[i] : v[i]);
        }
      }
    }
  }
  for (; r < rows; ++r) {
    float* to = target.out + r * target.stride;
    for (int c = 0; c < kTileColumns; ++c) to[c] = target.add ? to[c] + tile[c][r] : tile[c][r];
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
