// Stands in for the toolkit's header of this name when kernels/cuda is compiled for the emulator: the part of CUDA C++
// and of its runtime that those kernels use. A name that is missing here is one that they have not needed yet. Shared
// memory is static (`__shared__ T name[size]`); `extern __shared__` is not offered.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define __shared__ static  // the sanitizer puts red zones around each array
#else
#define __shared__ static thread_local  // poisoned before each block: emulator.cpp
#endif

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100
};

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "refused by the emulator, as a GPU would";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const auto body = [&] { kernel(Parameters(arguments)...); };  // each thread its own copies
  const bool legal =
      config->dynamicSmemBytes == 0 && emulator::launch({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, body);
  return legal ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// No error outlives the call that returned it.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

// The emulated device: of the capability that all architectures built for have at least, with few multiprocessors.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 8;
  return cudaSuccess;
}

// Only from here on: the launch configuration has members of these names.
#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

// Barriers and warp collectives. The defaulted argument is the caller's line: threads must meet at one place.

#define UMMRM_HERE int line = __builtin_LINE()

inline void __syncthreads(UMMRM_HERE) { emulator::barrier(0, line); }
inline int __syncthreads_or(int predicate, UMMRM_HERE) { return emulator::barrier(predicate != 0, line) != 0; }
inline int __syncthreads_count(int predicate, UMMRM_HERE) { return emulator::barrier(predicate != 0, line); }

inline void __syncwarp(unsigned mask = ~0u, UMMRM_HERE) { emulator::exchange(mask, 0, true, "__syncwarp", line); }

namespace emulator {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<uint32_t>(value);
  } else {
    return std::bit_cast<uint64_t>(value);
  }
}

template <class T>
T from_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(static_cast<uint32_t>(bits));
  } else {
    return std::bit_cast<T>(bits);
  }
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* what, int line) {
  const uint64_t* values = exchange(mask, to_bits(value), false, what, line);
  if ((mask >> source & 1) == 0) fail("reads a lane outside the mask", what, line);
  return from_bits<T>(values[source]);
}

}  // namespace emulator

// Lanes are shuffled within aligned segments of `width`; where the source lies outside, a lane keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, UMMRM_HERE) {
  const unsigned segment = emulator::lane() & ~static_cast<unsigned>(width - 1);
  return emulator::shuffle(mask, value, segment | (static_cast<unsigned>(source) & (width - 1)), "__shfl_sync", line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, UMMRM_HERE) {
  const unsigned self = emulator::lane(), source = self ^ static_cast<unsigned>(bits);
  const bool beyond = source / width > self / width;
  return emulator::shuffle(mask, value, beyond ? self : source, "__shfl_xor_sync", line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, UMMRM_HERE) {
  const unsigned self = emulator::lane();
  return emulator::shuffle(mask, value, self % width < distance ? self : self - distance, "__shfl_up_sync", line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, UMMRM_HERE) {
  const unsigned self = emulator::lane();
  return emulator::shuffle(mask, value,
                           self % width + distance >= static_cast<unsigned>(width) ? self : self + distance,
                           "__shfl_down_sync", line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, UMMRM_HERE) {
  const uint64_t* values = emulator::exchange(mask, predicate != 0, false, "__ballot_sync", line);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) result |= (mask >> i & 1 & static_cast<unsigned>(values[i])) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate, UMMRM_HERE) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, UMMRM_HERE) { return __ballot_sync(mask, predicate, line) == mask; }

template <class T>
unsigned __match_any_sync(unsigned mask, T value, UMMRM_HERE) {
  const uint64_t mine = emulator::to_bits(value),
                 *values = emulator::exchange(mask, mine, false, "__match_any_sync", line);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) result |= static_cast<unsigned>((mask >> i & 1) != 0 && values[i] == mine) << i;
  return result;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, UMMRM_HERE) {
  const uint64_t* values = emulator::exchange(mask, emulator::to_bits(value), false, "__reduce_add_sync", line);
  T sum = 0;
  for (unsigned i = 0; i < 32; ++i) sum += (mask >> i & 1) != 0 ? emulator::from_bits<T>(values[i]) : T(0);
  return sum;
}

#undef UMMRM_HERE

// Atomics, on integers only: sums of floats would depend on the order.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}

inline void __threadfence() {}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
