// Bias gradients of expert_gemm.h, bound by memory: column sums of every expert's rows in two stages, first of tiles of
// rows, side by side, then of each expert's tiles in their order. The cut into tiles follows from the offsets alone, so
// results repeat.
#include "numeric.cuh"
#include "row_tiles.cuh"
#include "ummrm/expert_gemm.h"

namespace ummrm::cuda {
namespace {

constexpr int kSumThreads = 256, kSumWarps = kSumThreads / kWarp;
// Rows a tile: the tiles' sums are 4 bytes a column of each, 0.4% of what bf16 rows take.
constexpr int kTileRows = 512;

// Bytes moved: one row a row. A block sums a tile's `kWarp * N` columns, a warp every kSumWarps-th row of them.
template <class T, int N, int height>
__global__ void __launch_bounds__(kSumThreads, kResident)
    tile_sums_kernel(ExpertBiasGrad args, int64_t column_tiles, float* tile_sums) {
  __shared__ float parts[kSumWarps][kWarp * N];
  const RowGroups groups = row_groups(args);
  const int64_t tile = blockIdx.x / column_tiles, first_column = blockIdx.x % column_tiles * kWarp * N;
  const RowTile rows = row_tile<height>(groups, tile);
  const bool shared = rows.expert < args.num_shared;
  const bool needed = rows.expert < args.num_shared + args.num_experts && rows.count > 0 &&
                      (shared ? args.shared_grad : args.routed_grad) != nullptr;
  if (!needed) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t column = first_column + lane * N;
  const int64_t row = !shared                ? rows.first - groups.shared_rows()
                      : args.one_row_a_token ? rows.first - rows.expert * args.tokens
                                             : rows.first;
  const T* from = static_cast<const T*>(shared ? args.shared_rows : args.routed_rows) + row * args.width;
  float sum[N] = {};
  if (column < args.width) {
#pragma unroll 4
    for (int64_t r = warp; r < rows.count; r += kSumWarps) {
      float values[N];
      load<N>(from + r * args.width + column, values);
      const float weight = args.row_weights == nullptr ? 1.f : args.row_weights[rows.first + r];
      for (int i = 0; i < N; ++i) sum[i] += weight * values[i];
    }
  }
  for (int i = 0; i < N; ++i) parts[warp][i * kWarp + lane] = sum[i];
  __syncthreads();
  for (int at = threadIdx.x; at < kWarp * N; at += kSumThreads) {
    const int64_t to = first_column + at;
    if (to >= args.width) break;
    float total = 0;
    for (int w = 0; w < kSumWarps; ++w) total += parts[w][at % N * kWarp + at / N];
    tile_sums[tile * args.width + to] = total;
  }
}

// A thread an expert's column.
template <class T, int height>
__global__ void __launch_bounds__(kSumThreads, kResident)
    expert_sums_kernel(ExpertBiasGrad args, int64_t column_tiles, const float* tile_sums) {
  const RowGroups groups = row_groups(args);
  const int64_t expert = blockIdx.x / column_tiles, column = blockIdx.x % column_tiles * kSumThreads + threadIdx.x;
  const bool shared = expert < args.num_shared;
  void* out = shared ? args.shared_grad : args.routed_grad;
  if (out == nullptr || column >= args.width) return;
  const float* from = tile_sums + first_row_tile<height>(groups, expert) * args.width + column;
  const int64_t tiles = ceil_div(expert_rows(groups, expert).count, height);
  float total = 0;
#pragma unroll 8
  for (int64_t t = 0; t < tiles; ++t) total += from[t * args.width];
  store_one<T>(total, out, (shared ? expert : expert - args.num_shared) * args.width + column);
}

template <int height>
int64_t tile_sums_bytes(const ExpertBiasGrad& args) {
  const int64_t bytes = most_row_tiles(row_groups(args), height) * args.width * static_cast<int64_t>(sizeof(float));
  return ceil_div(bytes, 256) * 256;
}

template <int height>
int column_sums(const ExpertBiasGrad& args, void* workspace, Stream stream) {
  return with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    auto* tile_sums = static_cast<float*>(workspace);
    const bool vectors = args.width % kVector<T> == 0 && aligned16(args.shared_rows) && aligned16(args.routed_rows);
    const int64_t per_block = kWarp * (vectors ? kVector<T> : 1), column_tiles = ceil_div(args.width, per_block);
    const int first = launch(vectors ? tile_sums_kernel<T, kVector<T>, height> : tile_sums_kernel<T, 1, height>,
                             most_row_tiles(row_groups(args), height) * column_tiles, kSumThreads, stream, args,
                             column_tiles, tile_sums);
    if (first != cudaSuccess) return first;
    const int64_t blocks = ceil_div(args.width, kSumThreads);
    return launch(expert_sums_kernel<T, height>, (args.num_shared + args.num_experts) * blocks, kSumThreads, stream,
                  args, blocks, static_cast<const float*>(tile_sums));
  });
}

}  // namespace

int64_t expert_bias_grad_workspace(const ExpertBiasGrad& args) { return tile_sums_bytes<kTileRows>(args); }

int expert_bias_grad(const ExpertBiasGrad& args, void* workspace, Stream stream) {
  return column_sums<kTileRows>(args, workspace, stream);
}

}  // namespace ummrm::cuda
