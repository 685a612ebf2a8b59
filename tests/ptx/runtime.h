// A stand-in for the CUDA runtime: what this project's host code, CUTLASS's adapters and nvcc's stubs call. It is
// linked in the place of libcudart. Device memory is the host's, kernels are the PTX of the program's own fat binaries,
// run to their end when they are launched; so a new kernel needs nothing but its launch. A fault of a kernel is a
// ptx::Error at its launch.
//
// The objects must hold PTX that is not compressed: `nvcc --no-compress` with code=compute_NN beside or instead of
// sm_NN.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "machine.h"

namespace ptx::runtime {

struct Device {  // the current one
  int number = 0;
  int major = 9, minor = 0;
  int multiprocessors = 4;
};
extern Device device;

// A call of this name gives this error instead of doing anything, until it is taken away; 0: none.
struct Refusal {
  std::string call;
  int error = 0;
};
extern Refusal refusal;

// How often each function of the runtime and the driver was called, by its name.
std::map<std::string, uint64_t>& calls();

// Called at each launch before the kernel runs: for what counts launches, and for what plants bugs.
struct Started {
  Kernel& kernel;
  Dim& grid;
  Dim& cluster;
  std::vector<char>& parameters;
};
extern std::function<void(const Started&)> on_launch;

// Kernels of the program whose name contains this, for the device as it is; decoded.
void for_kernels(const std::string& part_of_name, const std::function<void(Kernel&)>& body);

}  // namespace ptx::runtime
