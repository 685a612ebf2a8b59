// One tile of a matrix product by a block, without tensor cores: fp32 is multiplied exactly, 16-bit types are widened
// on the way to shared memory. The next step's elements are loaded while this one's are multiplied; each thread keeps 8
// x 8 sums. Any sizes: what lies outside counts as zero. Sums run over the depth in its order, so results repeat.
#pragma once

#include <type_traits>

#include "numeric.cuh"

namespace ummrm::cuda {

// A thread's 8 x 8 sums are 2 x 2 squares of 4 x 4, half a tile apart.
template <int rows, int columns, int steps>
struct Tile {
  static constexpr int m = rows, n = columns, k = steps, threads = m / 8 * (n / 8);
  static_assert(m % 64 == 0 && n % 64 == 0, "a warp is 4 threads down and 8 across, and swizzling moves 32 at most");
  static_assert(k % 4 == 0 && k <= 32);
};

// What is shipped. Shorter steps where elements are loaded one by one, whose addresses take registers.
using PlainTile = Tile<128, 128, 8>;
template <class Wide>
using OneByOne = Tile<Wide::m, Wide::n, 4>;

using Sums = float[2][4][2][4];

// Where element (depth k, outer o) of a factor that is contiguous along the depth stands in shared memory is
// k * outer + (o ^ swizzled<depth>(k)): units of four stay whole, yet threads that store neighbouring depths of one row
// meet different banks. A factor contiguous the other way needs none of it.
template <int depth>
__device__ constexpr int swizzled(int k) {
  return k / 4 * (kWarp / (depth / 4)) % kWarp;
}

// Four elements: 16 bytes of fp32, 8 of the 16-bit types.
template <class T>
__device__ void unpack_four(uint4 words, float (&to)[4]) {
  unpack<T>(words.x, to);
  unpack<T>(words.y, to + 1);
  unpack<T>(words.z, to + 2);
  unpack<T>(words.w, to + 3);
}
template <class T>
__device__ void unpack_four(uint2 words, float (&to)[4]) {
  unpack<T>(words.x, to);
  unpack<T>(words.y, to + 2);
}

template <class T>
__device__ void store_four(const float (&from)[4], T* at) {
  if constexpr (sizeof(T) == 4) {
    store<4>(from, at);
  } else {
    *reinterpret_cast<uint2*>(at) = uint2{pack<T>(from), pack<T>(from + 2)};
  }
}

// One of the two factors, `outer` rows (or columns) of the result by `depth` a step, contiguous along the depth or
// across it, N elements an access.
template <class T, int N, bool along_depth, int outer, int depth, int threads>
class Side {
  static constexpr int kAlong = (along_depth ? depth : outer) / N;  // accesses along the contiguous direction
  static constexpr int kAcross = kAlong < threads ? kAlong : threads, kRounds = kAlong / kAcross;
  static constexpr int kDown = threads / kAcross, kUnits = outer * depth / (N * threads);
  static_assert(kAlong % kAcross == 0 && threads % kAcross == 0 && kUnits * threads * N == outer * depth);
  static_assert(N == 1 || N == 4);
  using Word = std::conditional_t<N == 1, T, std::conditional_t<sizeof(T) == 4, uint4, uint2>>;

 public:
  static __device__ constexpr int swizzle(int k) { return along_depth ? swizzled<depth>(k) : 0; }

  // `at`: the tile's first element. `stride`: between neighbours across the contiguous direction. `outer_left`: how
  // many of the tile's rows there are, or more.
  __device__ Side(const T* at, int64_t stride, int64_t outer_left)
      : at_(at + down(0) * stride + along(0)),
        stride_(stride),
        outer_left_(static_cast<int>(outer_left < outer ? outer_left : outer) - (along_depth ? down(0) : along(0))) {}

  // Loads the next step, of which `depth_left` is inside.
  __device__ void fetch(int depth_left) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int more_down = i / kRounds * kDown, more_along = i % kRounds * kAcross * N;
      const bool inside = along_depth ? more_down < outer_left_ && more_along < depth_left - along(0)
                                      : more_along < outer_left_ && more_down < depth_left - down(0);
      const T* from = at_ + more_down * stride_ + more_along;
      fetched_[i] = inside ? *reinterpret_cast<const Word*>(from) : Word{};
    }
    at_ += along_depth ? depth : depth * stride_;
  }

  __device__ void put(float* shared) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int k = along_depth ? along(i) : down(i), o = along_depth ? down(i) : along(i);
      if constexpr (N == 1) {
        float pair[2];
        unpack<T>(raw(fetched_[i]), pair);
        shared[k * outer + (o ^ swizzle(k))] = pair[0];
      } else {
        float values[4];
        unpack_four<T>(fetched_[i], values);
        if constexpr (along_depth) {
          for (int j = 0; j < 4; ++j) shared[(k + j) * outer + (o ^ swizzle(k))] = values[j];
        } else {
          store<4>(values, shared + k * outer + o);
        }
      }
    }
  }

 private:
  static __device__ int along(int i) { return static_cast<int>(threadIdx.x % kAcross) * N + i % kRounds * kAcross * N; }
  static __device__ int down(int i) { return static_cast<int>(threadIdx.x / kAcross) + i / kRounds * kDown; }

  const T* at_;
  int64_t stride_;
  int outer_left_;
  Word fetched_[kUnits];
};

// The thread's first row and column of the tile.
template <class Tile>
__device__ int thread_row() {
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  return static_cast<int>(warp / (Tile::n / 64) * 4 + lane / 8) * 4;
}
template <class Tile>
__device__ int thread_column() {
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  return static_cast<int>(warp % (Tile::n / 64) * 8 + lane % 8) * 4;
}

// sums += rows * columns over `depth`, which all threads of the block give alike.
template <class Tile, class Rows, class Columns>
__device__ void multiply(Rows& rows, Columns& columns, int64_t depth, Sums& sums) {
  struct alignas(16) Stage {
    float rows[Tile::k * Tile::m], columns[Tile::k * Tile::n];
  };
  __shared__ Stage stages[2];
  if (depth <= 0) return;
  const int row = thread_row<Tile>(), column = thread_column<Tile>();
  // Steps that are not fetched yet, and how much of the last is inside.
  auto ahead = static_cast<int>(ceil_div(depth, Tile::k));
  const int last = static_cast<int>(depth - (int64_t{ahead} - 1) * Tile::k);
  const auto fetch = [&] {
    const int left = ahead > 1 ? Tile::k : ahead == 1 ? last : 0;
    rows.fetch(left);
    columns.fetch(left);
    --ahead;
  };
  const auto put = [&](Stage& stage) {
    rows.put(stage.rows);
    columns.put(stage.columns);
    __syncthreads();
  };
  // Past the end zeros are fetched and put: were that a branch, the compiler would fetch after the products.
  fetch();
  put(stages[0]);
  for (int stage = 0; ahead >= 0; stage ^= 1) {
    fetch();
    const Stage& now = stages[stage];
#pragma unroll
    for (int k = 0; k < Tile::k; ++k) {
      const int r = row ^ Rows::swizzle(k), c = column ^ Columns::swizzle(k);
      float left[2][4], top[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load<4>(now.rows + k * Tile::m + half * (Tile::m / 2) + r, left[half]);
        load<4>(now.columns + k * Tile::n + half * (Tile::n / 2) + c, top[half]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i / 4][i % 4][j / 4][j % 4] += left[i / 4][i % 4] * top[j / 4][j % 4];
      }
    }
    put(stages[stage ^ 1]);
  }
}

// Rounds the tile's sums to `out`, at its first element; a row has `stride` elements, of which `columns` and more are
// left. `fours`: the stride is a multiple of four, and `out` aligned to four elements.
template <class Tile, class T>
__device__ void write(const Sums& sums, int64_t rows, int64_t columns, bool fours, T* out, int64_t stride) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = thread_row<Tile>() + i / 4 * (Tile::m / 2) + i % 4;
    if (row >= rows) continue;
    for (int half = 0; half < 2; ++half) {
      const int column = thread_column<Tile>() + half * (Tile::n / 2);
      const float (&four)[4] = sums[i / 4][i % 4][half];
      T* to = out + row * stride + column;
      if (fours) {
        if (column < columns) store_four(four, to);
      } else {
        for (int j = 0; j < 4; ++j) {
          if (column + j < columns) store_one<T>(four[j], to, j);
        }
      }
    }
  }
}

}  // namespace ummrm::cuda
