// Barriers in shared memory (mbarrier, PTX ISA 9.7.13.15), which tensor copies complete too.
#pragma once

#include "machine.h"

namespace ptx {

// The 64 bits of one: arrivals that are left and that a phase expects, bytes that are left, and the phase's parity.
struct MemoryBarrier {
  uint32_t left, expected;
  int32_t bytes;
  bool parity;
  static MemoryBarrier at(const unsigned char* memory);
  void put(unsigned char* memory) const;
};

// Arrivals and bytes come in (bytes that are awaited are positive, those that arrived negative). Returns what is wrong.
std::string update_barrier(Launch& launch, Block& block, uint32_t offset, int arrivals, int bytes);

// A warp of the block has ended: a barrier for all of them may be complete.
void complete_barriers(Launch& launch, Block& block);

}  // namespace ptx
