// The products of expert_gemm.h without tensor cores, and the choice between these and those with them. All experts run
// in one launch: blocks find their rows by the offsets on the device (row_tiles.cuh). Serves fp32 on every GPU, and
// 16-bit types where their sizes or addresses suit no tensor core kernel.
#include "ummrm/expert_gemm.h"

#include "gemm_tile.cuh"
#include "kernel_choice.h"
#include "row_tiles.cuh"

namespace ummrm::cuda {
namespace {

template <class Tile, class T>
__device__ void add_bias(const ExpertGemm& args, int64_t expert, int64_t column, Sums& sums) {
  const bool shared = expert < args.num_shared;
  const T* bias = static_cast<const T*>(shared ? args.shared_bias : args.routed_bias);
  if (bias == nullptr) return;
  bias += (shared ? expert : expert - args.num_shared) * args.out_width;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t at = column + thread_column<Tile>() + j / 4 * (Tile::n / 2) + j % 4;
    const float value = at < args.out_width ? load_one<T>(bias, at) : 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4][j / 4][j % 4] += value;
  }
}

// FLOPs: 2 * in * out_width a row. `fours`: see write().
template <class Tile, class T, int N, bool transpose>
__global__ void __launch_bounds__(Tile::threads, kResident)
    expert_gemm_kernel(ExpertGemm args, int64_t row_tiles, bool fours) {
  const RowGroups groups = row_groups(args);
  const int64_t in = args.in, width = args.out_width;
  // In shared memory, not in registers, of which the sums leave none over.
  __shared__ RowTile rows;
  __shared__ int64_t column;
  if (threadIdx.x == 0) {
    const Place place = banded(blockIdx.x, row_tiles, ceil_div(width, Tile::n));
    rows = row_tile<Tile::m>(groups, place.row);
    column = place.column * Tile::n;
  }
  __syncthreads();
  if (rows.count == 0) return;
  Sums sums = {};
  if (rows.expert < args.num_shared + args.num_experts) {
    const bool shared = rows.expert < args.num_shared;
    const int64_t expert = shared ? rows.expert : rows.expert - args.num_shared;
    const int64_t row = !shared                ? rows.first - groups.shared_rows()
                        : args.one_row_a_token ? rows.first - expert * args.tokens
                                               : rows.first;
    const T* from = static_cast<const T*>(shared ? args.shared_rows : args.routed_rows) + row * in;
    const T* proj = static_cast<const T*>(shared ? args.shared_proj : args.routed_proj) + expert * width * in;
    Side<T, N, true, Tile::m, Tile::k, Tile::threads> left(from, in, rows.count);
    Side<T, N, !transpose, Tile::n, Tile::k, Tile::threads> top(proj + (transpose ? column : column * in),
                                                                transpose ? width : in, width - column);
    multiply<Tile>(left, top, in, sums);
    add_bias<Tile, T>(args, rows.expert, column, sums);
  }
  write<Tile>(sums, rows.count, width - column, fours, static_cast<T*>(args.out) + rows.first * width + column, width);
}

template <class Tile, class T>
int plain_gemm(const ExpertGemm& args, Stream stream) {
  if (args.out_width == 0) return cudaSuccess;
  constexpr int N = 4;
  const bool vectors = args.in % N == 0 && (!args.transpose || args.out_width % N == 0) &&
                       aligned16(args.shared_rows) && aligned16(args.routed_rows) && aligned16(args.shared_proj) &&
                       aligned16(args.routed_proj);
  const bool fours = args.out_width % 4 == 0 && aligned16(args.out);
  using Scalar = OneByOne<Tile>;
  const auto kernel =
      vectors ? (args.transpose ? expert_gemm_kernel<Tile, T, N, true> : expert_gemm_kernel<Tile, T, N, false>)
              : (args.transpose ? expert_gemm_kernel<Scalar, T, 1, true> : expert_gemm_kernel<Scalar, T, 1, false>);
  const int64_t row_tiles = most_row_tiles(row_groups(args), Tile::m);
  return launch(kernel, row_tiles * ceil_div(args.out_width, Tile::n), Tile::threads, stream, args, row_tiles, fours);
}

int shipped(const ExpertGemm& args, void*, Stream stream) {
  return with_type(args.dtype, [&](auto type) { return plain_gemm<PlainTile, decltype(type)>(args, stream); });
}

constexpr Candidate<ExpertGemm> kCandidates[] = {
#if defined(UMMRM_SM90)
    {9, 9, &sm90::serves, &sm90::workspace, &sm90::expert_gemm},
#endif
#if defined(UMMRM_SM80)
    {8, kAnyMajor, &sm80::serves, &sm80::workspace, &sm80::expert_gemm},
#endif
    {0, kAnyMajor, [](const ExpertGemm&) { return true; }, nullptr, &shipped},
};

}  // namespace

int64_t expert_gemm_workspace(const ExpertGemm& args) { return chosen_workspace(kCandidates, args); }

int expert_gemm(const ExpertGemm& args, void* workspace, Stream stream) {
  return choose(kCandidates, args, device_major()).run(args, workspace, stream);
}

}  // namespace ummrm::cuda
