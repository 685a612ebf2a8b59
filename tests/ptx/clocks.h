// Vector clocks of a cluster, and what races.h keeps of accesses to a block's shared memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace ptx {

struct Instruction;

// What happened before: for each warp of a cluster, up to which of its arrivals at barriers, and behind the warps for
// each barrier in shared memory, up to which phase.
using Clock = std::vector<uint32_t>;
inline void merge(Clock& into, const Clock& other) {
  if (into.size() < other.size()) into.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) into[i] = std::max(into[i], other[i]);
}
inline void merge_at(Clock& into, size_t index, uint32_t value) {
  if (into.size() <= index) into.resize(index + 1);
  into[index] = std::max(into[index], value);
}

struct BarrierClock {
  size_t index = 0;  // in clocks, where 1 is that it was made, and one more each phase
  uint32_t phases = 0;
  size_t maker = 0;
  uint32_t made = 0;
  Clock arriving, released;
  std::vector<const Instruction*> arrivals;  // that nobody has waited for yet
};

struct Write {  // of a warp; epoch 0: none
  uint32_t epoch = 0, warp = 0;
};

struct Granule {
  bool plain = false;               // warps have read or written it
  uint32_t barrier = 0, phase = 0;  // of the tensor copy to it
  uint32_t store = 0,
           store_warp = 0;  // of the tensor store that reads it: its group and one, and the warp in its block
};

struct Races {
  std::vector<Write> writes;       // of 4 bytes each
  std::vector<uint32_t> reads;     // of these, the last by each warp of the block
  std::vector<Granule> granules;   // of 16 bytes each
  std::vector<uint32_t> products;  // of these, the last group of wgmma of each warp group that reads it, and one
  std::map<uint32_t, BarrierClock> barriers;
  Clock remote, loads;  // what other blocks' warps did here, and tensor copies
};

}  // namespace ptx
