// See memory.h.
#include "memory.h"

#include <cstdio>

namespace ptx {
namespace {

std::map<uint64_t, uint64_t> allocations;  // begin to end
struct {
  uint64_t begin = 1, end = 0;
} latest;  // found, since accesses come in runs
bool (*ask)(uint64_t, uint64_t*, uint64_t*) = nullptr;

std::string hexadecimal(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
  return text;
}

Place shared_place(const Step& step, uint64_t address, int bytes, int alignment) {
  Block* block = step.warp.block;
  const auto at = static_cast<uint32_t>(address);
  const uint32_t offset = at & kOffsetMask;
  if (at >> kRankShift != 0) {
    const uint32_t rank = (at >> kRankShift) - 1;
    if (rank >= block->cluster->blocks.size()) step.fail("a shared address of no block, " + hexadecimal(address));
    block = &block->cluster->blocks[rank];
    if (block->ended) step.fail("shared memory of block rank " + std::to_string(rank) + ", which has ended");
  }
  const uint32_t end_of_static = kSharedBase + static_cast<uint32_t>(step.launch.kernel.static_shared);
  const bool between = offset + static_cast<size_t>(bytes) > end_of_static && offset < dynamic_base(step.launch.kernel);
  if (offset < kSharedBase || between || offset + static_cast<size_t>(bytes) > block->shared.size()) {
    step.fail("shared memory out of bounds, " + std::to_string(bytes) + " bytes at " + hexadecimal(offset) + " of " +
              hexadecimal(block->shared.size()));
  }
  if (offset % static_cast<uint32_t>(alignment) != 0) step.fail("a misaligned shared address, " + hexadecimal(offset));
  return {block->shared.data() + offset, block, offset};
}

}  // namespace

void add_memory(const void* at, size_t bytes) {
  allocations[reinterpret_cast<uint64_t>(at)] = reinterpret_cast<uint64_t>(at) + bytes;
}
void remove_memory(const void* at) {
  allocations.erase(reinterpret_cast<uint64_t>(at));
  latest = {};
}
void ask_for_memory(bool (*block_of)(uint64_t at, uint64_t* begin, uint64_t* end)) { ask = block_of; }
void forget_answers() { latest = {}; }

bool known_memory(uint64_t at, size_t bytes) {
  if (at >= latest.begin && at + bytes <= latest.end) return true;
  const auto after = allocations.upper_bound(at);
  if (after != allocations.begin() && at + bytes <= std::prev(after)->second) {
    latest = {std::prev(after)->first, std::prev(after)->second};
    return true;
  }
  uint64_t begin, end;
  if (ask == nullptr || !ask(at, &begin, &end)) return false;
  latest = {begin, end};
  return at + bytes <= end;
}

Global::Global(size_t bytes, size_t alignment)
    : memory_(std::make_unique<unsigned char[]>(bytes + alignment)), at_(memory_.get()) {
  while (reinterpret_cast<uint64_t>(at_) % alignment != 0) ++at_;
  add_memory(at_, bytes);
}
Global::~Global() { remove_memory(at_); }

Place place_of(const Step& step, Space space, uint64_t address, int bytes, int alignment) {
  if (space == Space::generic && address >> 48 == kSharedWindow >> 48) space = Space::shared;
  if (space == Space::shared || space == Space::cluster) return shared_place(step, address, bytes, alignment);
  const auto first = reinterpret_cast<uint64_t>(step.launch.parameters.data());
  const uint64_t end = first + static_cast<uint64_t>(step.launch.kernel.parameter_bytes);
  if (address >= first && address + static_cast<uint64_t>(bytes) <= end)
    return {reinterpret_cast<unsigned char*>(address)};
  if (space == Space::parameter) step.fail("parameters out of bounds");
  if (address % static_cast<uint64_t>(alignment) != 0) step.fail("a misaligned address, " + hexadecimal(address));
  if (!known_memory(address, static_cast<size_t>(bytes))) {
    step.fail("device memory out of bounds, " + std::to_string(bytes) + " bytes at " + hexadecimal(address));
  }
  return {reinterpret_cast<unsigned char*>(address)};
}

}  // namespace ptx
