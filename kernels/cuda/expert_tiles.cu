// The list of expert_gemm_tiles.h.
#include "expert_tiles.h"

#include <vector>

#include "gemm_tile.cuh"
#include "ummrm/expert_gemm_tiles.h"

namespace ummrm::cuda {
namespace {

std::vector<TileInstance> list_instances() {
  std::vector<TileInstance> list;
  constexpr const char* kKernels[] = {"forward", "input_grad", "weight_grad"};
  for (const char* kernel : kKernels)
    list.push_back({"any", kernel, PlainTile::m, PlainTile::n, PlainTile::k, 1, 1, "plain"});
  [[maybe_unused]] const auto add = [&](const char* arch, const auto& tiles) {
    for (const char* kernel : kKernels)
      for (const TileShape& t : tiles)
        list.push_back({arch, kernel, t.m, t.n, t.k, t.cluster_m, t.cluster_n, t.schedule});
  };
#ifdef UMMRM_SM80
  add("sm80", kSm80Tiles);
#endif
#ifdef UMMRM_SM90
  add("sm90", kSm90Tiles);
#endif
  return list;
}

}  // namespace

const TileInstance* tile_instances(int* count) {
  static const std::vector<TileInstance> list = list_instances();
  *count = static_cast<int>(list.size());
  return list.data();
}

}  // namespace ummrm::cuda
