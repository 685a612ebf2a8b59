// How launchers start kernels: an explicit stream, a checked grid and no synchronisation, so that every launcher can be
// captured in a CUDA graph. Only the runtime's own names are used, which the host emulator of the tests offers too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ummrm/types.h"

namespace ummrm::cuda {

inline constexpr int64_t kMaxGrid = 0x7fffffff;
inline constexpr int kWarp = 32;
// Blocks a multiprocessor that a kernel's registers must allow, for its launch bounds. Unasked, ptxas aims at eight and
// spills to get there.
inline constexpr int kResident = 2;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Returns the cudaError_t of the launch. Nothing to do is no launch.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  const cudaLaunchConfig_t config = {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0,
                                     stream};
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Threads for `units` of work side by side: whole warps, at most `most`, and no more than it takes to be through in as
// few steps: 352 units are two steps of 192 threads, not of 256 with most of the second idle.
inline int threads_for(int64_t units, int most) {
  const int64_t some = units < 1 ? 1 : units;
  return static_cast<int>(ceil_div(ceil_div(some, ceil_div(some, most)), kWarp) * kWarp);
}

// True in the block that comes here last, for all its threads; that block then sees what the others wrote before they
// came (read it by __ldcg, past the L1 cache). `ticket` starts at 0. So one launch can end with a sum over its blocks.
__device__ inline bool last_to_finish(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) + 1 == gridDim.x;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

}  // namespace ummrm::cuda
