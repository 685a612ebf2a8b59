// The tiles of the grouped expert GEMM that a build holds, for those who report or measure them: the plain kernels'
// always, those on tensor cores where it had CUTLASS.
#pragma once

namespace ummrm::cuda {

struct TileInstance {
  const char* arch;    // "any", "sm80", "sm90"
  const char* kernel;  // "forward", "input_grad", "weight_grad"
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
  const char* schedule;  // "plain", "cooperative", "pingpong", "multistage"
};

const TileInstance* tile_instances(int* count);

}  // namespace ummrm::cuda
