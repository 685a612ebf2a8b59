// See async.h.
#include "async.h"

namespace ptx {

bool do_at_once(Launch& launch) {
  return options.order == Order::at_once || (options.order == Order::random && launch.random() % 2 == 0);
}

void do_some(Launch& launch, Warp& warp) {
  auto& loads = warp.block->cluster->loads;
  if (!loads.empty()) do_load(launch, *warp.block->cluster, launch.random() % loads.size());
  if (!warp.copy_groups.empty()) {
    for (Copy& copy : warp.copy_groups[launch.random() % warp.copy_groups.size()]) do_copy(warp, copy);
  }
  if (!warp.store_groups.empty()) {
    for (TensorStore& store : warp.store_groups[launch.random() % warp.store_groups.size()])
      read_store(launch, warp, store);
  }
  // Products of a warp add to the same registers, so they are done in order; a number of them.
  size_t some = launch.random() % 4;
  for (auto& group : warp.product_groups) {
    for (WarpProduct& product : group) {
      if (product.done) continue;
      if (some-- == 0) return;
      do_product(launch, warp, product);
    }
  }
}

bool do_first(Launch& launch, Cluster& cluster) {
  if (cluster.loads.empty()) return false;
  do_load(launch, cluster, 0);
  return true;
}

void finish(Launch& launch, Warp& warp) {
  for (auto& group : warp.store_groups) {
    for (TensorStore& store : group) {
      if (!store.read) fail(launch, warp, "a block ended while a tensor store reads its shared memory");
      do_store(launch, warp, store);
    }
  }
  if (!warp.stores.empty()) fail(launch, warp, "a tensor store was never committed");
  if (!warp.products.empty() || !warp.product_groups.empty()) fail(launch, warp, "a wgmma was never waited for");
}

}  // namespace ptx
