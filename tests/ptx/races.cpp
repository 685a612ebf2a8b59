// See races.h.
#include "races.h"

#include "shadow.h"

namespace ptx::races {
namespace {

constexpr uint32_t kCell = 4, kGranule = 16, kUnderWay = UINT32_MAX;

uint32_t next_epoch(const Warp& warp) { return warp.seen[warp.number] + 1; }

uint32_t seen_of(const Warp& warp, size_t index) { return index < warp.seen.size() ? warp.seen[index] : 0; }

Races& of(Block& block) {
  Races& races = block.races;
  if (races.writes.empty()) {
    const size_t cells = block.shared.size() / kCell + 1, granules = block.shared.size() / kGranule + 1;
    races.writes.resize(cells);
    races.reads.resize(cells * block.warps.size());
    races.granules.resize(granules);
    races.products.resize(granules * ((block.warps.size() + 3) / 4));
  }
  return races;
}

std::string name_of(const Block& block, size_t number) {
  const size_t warps = block.warps.size();
  return "warp " + std::to_string(number % warps) + " of block rank " + std::to_string(number / warps);
}

[[noreturn]] void fail(const Step& step, uint32_t granule_or_cell, uint32_t size, const std::string& what) {
  step.fail("a race: shared memory at " + std::to_string(granule_or_cell * size) +
            " is touched, and nothing stands between " + what);
}

// What a warp may not follow without having seen it.
void check_copy(const Step& step, Block& block, uint32_t g) {
  const Granule& granule = of(block).granules[g];
  if (granule.phase == 0 || seen_of(step.warp, granule.barrier) >= granule.phase) return;
  fail(step, g, kGranule, "that and the tensor copy to it");
}

void check_write(const Step& step, Block& block, uint32_t cell) {
  const Write& write = of(block).writes[cell];
  if (write.epoch == 0 || write.warp == step.warp.number || seen_of(step.warp, write.warp) >= write.epoch) return;
  fail(step, cell, kCell, "that and what " + name_of(block, write.warp) + " wrote");
}

void check_reads(const Step& step, Block& block, uint32_t cell) {
  const size_t warps = block.warps.size(), first = static_cast<size_t>(block.rank) * warps;
  const uint32_t* reads = of(block).reads.data() + cell * warps;
  for (size_t i = 0; i < warps; ++i) {
    if (reads[i] == 0 || first + i == step.warp.number || seen_of(step.warp, first + i) >= reads[i]) continue;
    fail(step, cell, kCell, "that and what " + name_of(block, first + i) + " read");
  }
}

bool over(const Warp& warp, const Warp& of, const std::vector<uint32_t>& waited, size_t group) {
  return waited.size() > group && (&warp == &of || seen_of(warp, of.number) >= waited[group]);
}

void check_async_reads(const Step& step, Block& block, uint32_t g) {
  const Races& races = of(block);
  const size_t groups = (block.warps.size() + 3) / 4;
  for (size_t i = 0; i < groups; ++i) {
    const uint32_t product = races.products[g * groups + i];
    bool done = product == 0;
    for (size_t w = i * 4; !done && w < std::min(i * 4 + 4, block.warps.size()); ++w) {
      done = over(step.warp, block.warps[w], block.warps[w].products_waited, product - 1);
    }
    if (!done)
      fail(step, g, kGranule,
           "that and the wgmma of warps " + std::to_string(i * 4) + " to " + std::to_string(i * 4 + 3) +
               " that reads it");
  }
  const Granule& granule = races.granules[g];
  if (granule.store == 0) return;
  const Warp& from = block.warps[granule.store_warp];
  if (!over(step.warp, from, from.stores_waited, granule.store - 1))
    fail(step, g, kGranule, "that and the tensor store that reads it");
}

template <class Body>
void for_units(uint32_t offset, uint32_t bytes, uint32_t size, const Body& body) {
  for (uint32_t unit = offset / size; unit <= (offset + bytes - 1) / size; ++unit) body(unit);
}

void note_remote(const Step& step, Block& block) {
  if (&block != step.warp.block) merge_at(of(block).remote, step.warp.number, next_epoch(step.warp));
}

BarrierClock& barrier_of(Block& block, uint32_t offset) { return block.races.barriers[offset]; }

}  // namespace

void read(const Step& step, const Place& place, int bytes) {
  if (place.block == nullptr || bytes < static_cast<int>(kCell)) return;
  Block& block = *place.block;
  Races& races = of(block);
  const auto count = static_cast<uint32_t>(bytes);
  const uint32_t epoch = next_epoch(step.warp);
  const bool own = &block == step.warp.block;
  for_units(place.offset, count, kGranule, [&](uint32_t g) {
    check_copy(step, block, g);
    races.granules[g].plain = true;
  });
  for_units(place.offset, count, kCell, [&](uint32_t cell) {
    check_write(step, block, cell);
    if (own) races.reads[cell * block.warps.size() + static_cast<size_t>(step.warp.id)] = epoch;
  });
  note_remote(step, block);
}

void wrote(const Step& step, const Place& place, int bytes) {
  if (place.block == nullptr || bytes < static_cast<int>(kCell)) return;
  Block& block = *place.block;
  Races& races = of(block);
  const auto count = static_cast<uint32_t>(bytes);
  for_units(place.offset, count, kGranule, [&](uint32_t g) {
    check_copy(step, block, g);
    check_async_reads(step, block, g);
    races.granules[g].plain = true;
  });
  for_units(place.offset, count, kCell, [&](uint32_t cell) {
    check_write(step, block, cell);
    check_reads(step, block, cell);
    races.writes[cell] = {next_epoch(step.warp), static_cast<uint32_t>(step.warp.number)};
  });
  note_remote(step, block);
}

void check_load(const Step& step, Block& block, uint32_t offset, uint32_t bytes) {
  Races& races = of(block);
  for_units(offset, bytes, kGranule, [&](uint32_t g) {
    check_copy(step, block, g);
    check_async_reads(step, block, g);
    if (!races.granules[g].plain) return;
    for (uint32_t cell = g * (kGranule / kCell); cell < (g + 1) * (kGranule / kCell); ++cell) {
      check_write(step, block, cell);
      check_reads(step, block, cell);
    }
  });
}

void load_starts(Block& block, uint32_t offset, uint32_t bytes) {
  for_units(offset, bytes, kGranule, [&](uint32_t g) { of(block).granules[g].phase = kUnderWay; });
}

void load_ends(Block& block, uint32_t offset, uint32_t bytes, const Block& barriers, uint32_t barrier) {
  const BarrierClock& clock = barriers.races.barriers.at(barrier);
  for_units(offset, bytes, kGranule, [&](uint32_t g) {
    of(block).granules[g].barrier = static_cast<uint32_t>(clock.index);
    of(block).granules[g].phase = clock.phases + 2;
  });
  merge_at(block.races.loads, clock.index, clock.phases + 2);
}

void product_reads(const Step& step, Block& block, uint32_t offset) {
  Races& races = of(block);
  const uint32_t g = offset / kGranule;
  check_copy(step, block, g);
  if (races.granules[g].plain) {
    for (uint32_t cell = g * (kGranule / kCell); cell < (g + 1) * (kGranule / kCell); ++cell)
      check_write(step, block, cell);
  }
  const size_t groups = (block.warps.size() + 3) / 4;
  races.products[g * groups + static_cast<size_t>(step.warp.id / 4)] = static_cast<uint32_t>(step.warp.committed) + 1;
}

void store_reads(const Step& step, uint32_t offset, uint32_t bytes) {
  Block& block = *step.warp.block;
  Races& races = of(block);
  for_units(offset, bytes, kGranule, [&](uint32_t g) {
    check_copy(step, block, g);
    for (uint32_t cell = g * (kGranule / kCell); cell < (g + 1) * (kGranule / kCell); ++cell)
      check_write(step, block, cell);
    races.granules[g].store = static_cast<uint32_t>(step.warp.stores_committed) + 1;
    races.granules[g].store_warp = static_cast<uint32_t>(step.warp.id);
  });
}

void product_waited(Warp& warp) { warp.products_waited.push_back(next_epoch(warp)); }

void stores_waited(Warp& warp, uint64_t groups) {
  while (warp.stores_waited.size() < groups) warp.stores_waited.push_back(next_epoch(warp));
}

void barrier_made(Warp& warp, const Place& place) {
  Cluster& cluster = *place.block->cluster;
  const size_t warps = cluster.blocks.size() * warp.block->warps.size();
  barrier_of(*place.block, place.offset) = {warps + cluster.barriers++, 0, warp.number, next_epoch(warp), {}, {}, {}};
}

void made_barriers_are_fenced(Warp& warp) {
  for (const auto& [offset, maker] : warp.block->new_barriers) {
    if (maker == warp.id) merge_at(warp.made, barrier_of(*warp.block, offset).index, 1);
  }
}

void check_barrier(const Step& step, const Place& place) {
  const BarrierClock& clock = barrier_of(*place.block, place.offset);
  if (clock.maker == step.warp.number || seen_of(step.warp, clock.maker) >= clock.made) return;
  if (seen_of(step.warp, clock.index) >= 1) return;
  step.fail("a barrier is used, and nothing stands between that and its making by " +
            name_of(*place.block, clock.maker));
}

void arrives(const Step& step, const Place& place) {
  note_remote(step, *place.block);
  BarrierClock& clock = barrier_of(*place.block, place.offset);
  shadow::publish(step.warp, clock.arriving);
  if (std::find(clock.arrivals.begin(), clock.arrivals.end(), &step.in) == clock.arrivals.end()) {
    clock.arrivals.push_back(&step.in);
  }
}

void completed(Block& block, uint32_t barrier) {
  BarrierClock& clock = barrier_of(block, barrier);
  merge(clock.released, clock.arriving);
  merge_at(clock.released, clock.index, ++clock.phases + 1);
}

void acquire(Warp& warp, const Place& place) {
  BarrierClock& clock = barrier_of(*place.block, place.offset);
  merge(warp.seen, clock.released);
  for (const Instruction* arrival : clock.arrivals) ++arrival->effects;
  clock.arrivals.clear();
}

std::string fault_of_end(const Block& block) {
  Clock all;
  for (const Warp& warp : block.warps) merge(all, warp.seen);
  const auto unseen = [&](const Clock& needed) -> size_t {
    for (size_t i = 0; i < needed.size(); ++i) {
      if (needed[i] > (i < all.size() ? all[i] : 0)) return i;
    }
    return SIZE_MAX;
  };
  if (const size_t warp = unseen(block.races.remote); warp != SIZE_MAX) {
    return "a block may end before " + name_of(block, warp) + " is done with its shared memory";
  }
  return unseen(block.races.loads) == SIZE_MAX ? "" : "a block may end before a tensor copy to it is over";
}

}  // namespace ptx::races
