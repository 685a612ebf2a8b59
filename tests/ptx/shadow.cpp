// See shadow.h.
#include "shadow.h"

#include <algorithm>

namespace ptx::shadow {
namespace {

constexpr uint32_t kGranule = 16;  // no asynchronous access is finer
constexpr uint16_t kFenced = 0, kPublished = 0xffff;

std::string unwritten(uint32_t offset) {
  return "shared memory at " + std::to_string(offset) + " is read, and nothing has written it or a copy under way will";
}

uint16_t mark_of(const Warp& warp) { return static_cast<uint16_t>(warp.id + 1); }

}  // namespace

void wrote(Warp& warp, const Place& place, int bytes) {
  if (place.block == nullptr) return;
  Block& block = *place.block;
  std::fill_n(block.written.begin() + place.offset, bytes, 1);
  const uint16_t mark = place.block == warp.block ? mark_of(warp) : kPublished;  // from afar: a barrier must follow
  const uint32_t last = (place.offset + static_cast<uint32_t>(bytes) - 1) / kGranule;
  for (uint32_t granule = place.offset / kGranule; granule <= last; ++granule) {
    if (block.unfenced[granule] == mark) continue;
    block.unfenced[granule] = mark;
    if (mark == kPublished) {
      block.published.push_back({granule, warp.number, warp.seen[warp.number] + 1});
    } else {
      warp.wrote.push_back(granule);
    }
  }
}

void arrived(Block& block, uint32_t offset, int bytes) {
  std::fill_n(block.written.begin() + offset, bytes, 1);
  for (uint32_t g = offset / kGranule; g <= (offset + static_cast<uint32_t>(bytes) - 1) / kGranule; ++g) {
    block.unfenced[g] = kFenced, block.fence[g] = nullptr;
  }
}

void will_write(Block& block, uint32_t offset, int bytes) { std::fill_n(block.written.begin() + offset, bytes, 0); }

bool written(const Block& block, uint32_t offset, int bytes) {
  const unsigned char* marks = block.written.data() + offset;
  if (bytes == 16) {
    constexpr uint64_t kOnes = 0x0101010101010101;
    uint64_t both[2];
    std::memcpy(both, marks, 16);
    return both[0] == kOnes && both[1] == kOnes;
  }
  return std::all_of(marks, marks + bytes, [](unsigned char mark) { return mark != 0; });
}

void check_written(const Step& step, const Block& block, uint32_t offset, int bytes) {
  if (!written(block, offset, bytes)) step.fail(unwritten(offset));
}

void check_written(const Step& step, const Place& place, int bytes) {
  if (place.block != nullptr) check_written(step, *place.block, place.offset, bytes);
}

std::string fault_of_async_read(const Block& block, uint32_t offset, int bytes) {
  if (offset < kSharedBase || offset + static_cast<size_t>(bytes) > block.shared.size()) {
    return "shared memory out of bounds at " + std::to_string(offset);
  }
  const uint32_t last = (offset + static_cast<uint32_t>(bytes) - 1) / kGranule;
  for (uint32_t g = offset / kGranule; g <= last; ++g) {
    if (block.unfenced[g] != kFenced) {
      const int by = block.unfenced[g] - 1;
      return "what " + (block.unfenced[g] == kPublished ? "another warp" : "warp " + std::to_string(by)) +
             " wrote to shared memory at " + std::to_string(g * kGranule) + " is read without fence.proxy.async";
    }
    if (block.fence[g] != nullptr) ++block.fence[g]->effects;
  }
  return written(block, offset, bytes) ? std::string() : unwritten(offset);
}

void fence_async(const Step& step) {
  Warp& warp = step.warp;
  Block& block = *warp.block;
  const auto fence = [&](uint32_t granule) { block.unfenced[granule] = kFenced, block.fence[granule] = &step.in; };
  for (const uint32_t granule : warp.wrote) {
    if (block.unfenced[granule] == mark_of(warp)) fence(granule);
  }
  warp.wrote.clear();
  std::erase_if(block.published, [&](const Published& entry) {
    if (warp.seen[entry.writer] < entry.arrival) return false;
    if (block.unfenced[entry.granule] == kPublished) fence(entry.granule);
    return true;
  });
}

void publish(Warp& warp, Clock& barrier) {
  Block& block = *warp.block;
  const uint32_t arrival = ++warp.seen[warp.number];
  for (const uint32_t granule : warp.wrote) {
    if (block.unfenced[granule] != mark_of(warp)) continue;
    block.unfenced[granule] = kPublished;
    block.published.push_back({granule, warp.number, arrival});
  }
  warp.wrote.clear();
  merge(barrier, warp.seen);
}

void barrier_made(Warp& warp, const Place& place) { place.block->new_barriers[place.offset] = warp.id; }

void fence_barriers(Warp& warp) {
  std::erase_if(warp.block->new_barriers, [&](const auto& made) { return made.second == warp.id; });
}

void check_barrier(const Step& step, const Place& place) {
  if (place.block->new_barriers.contains(place.offset)) {
    step.fail("a barrier is used that was made without fence.mbarrier_init since");
  }
}

void map_written(Launch& launch, uint64_t map) { launch.released[map] = ++launch.clock; }

void map_fenced(const Step& step, uint64_t map) { step.launch.acquired[{&step.warp, map}] = ++step.launch.clock; }

void check_map(const Step& step, uint64_t map) {
  const auto released = step.launch.released.find(map);
  if (released == step.launch.released.end()) return;  // from the host
  const auto acquired = step.launch.acquired.find({&step.warp, map});
  if (acquired == step.launch.acquired.end() || acquired->second < released->second) {
    step.fail("a tensor map that was written on the device is used without fence.proxy.tensormap by this warp since");
  }
}

void touch_accumulators(const Step& step) {
  Warp& warp = step.warp;
  const auto touch = [&](int reg) {
    if (reg < 0) return;
    if (warp.owners[static_cast<size_t>(reg)] != 0) {
      step.fail("an accumulator of a wgmma is touched before wgmma.wait_group");
    }
    warp.touched_at[static_cast<size_t>(reg)] = ++warp.now;
  };
  for (const Operand& operand : step.in.operands) {
    touch(operand.reg);
    for (const Operand& item : operand.items) touch(item.reg);
  }
}

void fence_accumulators(Warp& warp) { warp.fenced_at = ++warp.now; }

void own_accumulators(const Step& step, const Operand& registers) {
  Warp& warp = step.warp;
  if (warp.fenced_at == 0) step.fail("the first wgmma of a warp without wgmma.fence before it");
  for (const Operand& item : registers.items) {
    const auto reg = static_cast<size_t>(item.reg);
    if (warp.touched_at[reg] > warp.fenced_at) step.fail("an accumulator was touched since the last wgmma.fence");
    ++warp.owners[reg];
  }
}

void release_accumulators(Warp& warp, const Operand& registers) {
  for (const Operand& item : registers.items) --warp.owners[static_cast<size_t>(item.reg)];
}

}  // namespace ptx::shadow
