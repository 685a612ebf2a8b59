// The weight gradients of expert_gemm.h without tensor cores, and the choice between these and those with them. A block
// sums one tile of one expert's gradient over all of the expert's rows, however many the device finds there to be.
#include "gemm_tile.cuh"
#include "kernel_choice.h"
#include "row_tiles.cuh"
#include "ummrm/expert_gemm.h"

namespace ummrm::cuda {
namespace {

// FLOPs: 2 * width * grad_width a row. `fours`: see write(). Blocks count tiles from those of `first_expert` on.
template <class Tile, class T, int N>
__global__ void __launch_bounds__(Tile::threads, kResident)
    expert_gemm_wgrad_kernel(ExpertGemmWgrad args, int64_t first_expert, bool fours) {
  const RowGroups groups = row_groups(args);
  const int64_t width = args.width, grad_width = args.grad_width;
  // In shared memory, not in registers, of which the sums leave none over.
  __shared__ RowTile rows;
  __shared__ int64_t out_row, out_column;
  if (threadIdx.x == 0) {
    const int64_t row_tiles = ceil_div(grad_width, Tile::m), column_tiles = ceil_div(width, Tile::n);
    const int64_t each = row_tiles * column_tiles;
    const Place place = banded(blockIdx.x % each, row_tiles, column_tiles);
    rows = expert_rows(groups, first_expert + blockIdx.x / each);
    out_row = place.row * Tile::m;
    out_column = place.column * Tile::n;
  }
  __syncthreads();
  const bool shared = rows.expert < args.num_shared;
  const auto first_row = [&](bool one_a_token) {
    return !shared ? rows.first - groups.shared_rows() : one_a_token ? 0 : rows.first;
  };
  Sums sums = {};
  if (rows.count > 0) {
    const T* grad = static_cast<const T*>(shared ? args.grad_shared_rows : args.grad_routed_rows) +
                    first_row(args.one_grad_row_a_token) * grad_width + out_row;
    const T* row = static_cast<const T*>(shared ? args.shared_rows : args.routed_rows) +
                   first_row(args.one_row_a_token) * width + out_column;
    Side<T, N, false, Tile::m, Tile::k, Tile::threads> left(grad, grad_width, grad_width - out_row);
    Side<T, N, false, Tile::n, Tile::k, Tile::threads> top(row, width, width - out_column);
    multiply<Tile>(left, top, rows.count, sums);
  }
  void* out = shared ? args.shared_grad : args.routed_grad;
  const int64_t expert = shared ? rows.expert : rows.expert - args.num_shared;
  const int64_t at = (expert * grad_width + out_row) * width + out_column;
  if (args.grad_dtype == DType::f32) {
    write<Tile>(sums, grad_width - out_row, width - out_column, fours, static_cast<float*>(out) + at, width);
  } else if constexpr (sizeof(T) == 2) {
    write<Tile>(sums, grad_width - out_row, width - out_column, fours, static_cast<T*>(out) + at, width);
  }
}

template <class Tile, class T>
int plain_wgrad(const ExpertGemmWgrad& args, Stream stream) {
  if (args.grad_dtype != args.dtype && args.grad_dtype != DType::f32) return cudaErrorInvalidValue;
  const int64_t tiles = ceil_div(args.grad_width, Tile::m) * ceil_div(args.width, Tile::n);
  const int64_t first = args.shared_grad == nullptr ? args.num_shared : 0;
  const int64_t last = args.num_shared + (args.routed_grad == nullptr ? 0 : args.num_experts);
  if (last <= first) return cudaSuccess;
  constexpr int N = 4;
  const bool vectors = args.width % N == 0 && args.grad_width % N == 0 && aligned16(args.shared_rows) &&
                       aligned16(args.routed_rows) && aligned16(args.grad_shared_rows) &&
                       aligned16(args.grad_routed_rows);
  const bool fours = args.width % 4 == 0 && aligned16(args.shared_grad) && aligned16(args.routed_grad);
  const auto kernel = vectors ? expert_gemm_wgrad_kernel<Tile, T, N> : expert_gemm_wgrad_kernel<OneByOne<Tile>, T, 1>;
  return launch(kernel, (last - first) * tiles, Tile::threads, stream, args, first, fours);
}

int shipped_wgrad(const ExpertGemmWgrad& args, void*, Stream stream) {
  return with_type(args.dtype, [&](auto type) { return plain_wgrad<PlainTile, decltype(type)>(args, stream); });
}

constexpr Candidate<ExpertGemmWgrad> kWgradCandidates[] = {
#if defined(UMMRM_SM90)
    {9, 9, &sm90::serves, &sm90::workspace, &sm90::expert_gemm_wgrad},
#endif
#if defined(UMMRM_SM80)
    {8, kAnyMajor, &sm80::serves, &sm80::workspace, &sm80::expert_gemm_wgrad},
#endif
    {0, kAnyMajor, [](const ExpertGemmWgrad&) { return true; }, nullptr, &shipped_wgrad},
};

}  // namespace

int64_t expert_gemm_wgrad_workspace(const ExpertGemmWgrad& args) { return chosen_workspace(kWgradCandidates, args); }

int expert_gemm_wgrad(const ExpertGemmWgrad& args, void* workspace, Stream stream) {
  return choose(kWgradCandidates, args, device_major()).run(args, workspace, stream);
}

}  // namespace ummrm::cuda
