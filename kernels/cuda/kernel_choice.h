// Which kernel serves a product: a pure function of its arguments and of the device's architecture, so that results
// repeat. Every candidate names its workspace, so that the one that is launched is the one that was provided for.
#pragma once

#include <iterator>

#include "per_device.h"
#include "tensor_cores.h"

namespace ummrm::cuda {

// The current device's major compute capability; 0 where there is none.
inline int device_major() { return device_attribute<cudaDevAttrComputeCapabilityMajor>(); }

inline constexpr int kAnyMajor = 0x7fffffff;

template <class Args>
struct Candidate {
  int first_major, last_major;
  bool (*serves)(const Args&);
  int64_t (*workspace)(const Args&);  // null: none
  int (*run)(const Args&, void* workspace, Stream stream);
};

// The first that serves; the last of the list serves everything.
template <class Candidates, class Args>
const auto& choose(const Candidates& candidates, const Args& args, int major) {
  for (const auto& candidate : candidates) {
    if (candidate.first_major <= major && major <= candidate.last_major && candidate.serves(args)) return candidate;
  }
  return *(std::end(candidates) - 1);
}

template <class Candidates, class Args>
int64_t chosen_workspace(const Candidates& candidates, const Args& args) {
  const auto& chosen = choose(candidates, args, device_major());
  return chosen.workspace == nullptr ? 0 : chosen.workspace(args);
}

}  // namespace ummrm::cuda
