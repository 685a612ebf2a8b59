// Addresses and what lies there (PTX ISA 5.1). Device memory is the host's: allocations are known to the byte, and what
// lies outside is an error. A shared address is an offset into one's own block, or has the block's rank in its cluster
// plus one in its upper byte; a generic address of shared memory has a mark above that no pointer has.
#pragma once

#include "machine.h"

namespace ptx {

// ---- device memory

void add_memory(const void* at, size_t bytes);
void remove_memory(const void* at);
bool known_memory(uint64_t at, size_t bytes);
// Asked about what was not told here: whether an address lies in a block, and where that begins and ends. Answers are
// kept for a launch, while which nothing is freed.
void ask_for_memory(bool (*block_of)(uint64_t at, uint64_t* begin, uint64_t* end));
void forget_answers();

// A variable of a program.
class Global {
 public:
  Global(size_t bytes, size_t alignment);
  Global(const Global&) = delete;
  ~Global();
  unsigned char* data() { return at_; }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  unsigned char* at_;
};

// ---- addresses

inline constexpr uint64_t kSharedWindow = 0x5348ull << 48;
inline constexpr uint32_t kRankShift = 24, kOffsetMask = (1u << kRankShift) - 1;

struct Place {
  unsigned char* at;
  Block* block = nullptr;  // whose shared memory; null: device memory or parameters
  uint32_t offset = 0;
};

// Checked for bounds and alignment. Throws with the line of the PTX.
Place place_of(const Step& step, Space space, uint64_t address, int bytes, int alignment);
inline Place place_of(const Step& step, Space space, uint64_t address, int bytes) {
  return place_of(step, space, address, bytes, bytes);
}

}  // namespace ptx
