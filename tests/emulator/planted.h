// Small kernels with one bug each, and beside each the same kernel without it (`planted` false): what the emulator must
// catch, and what it must let pass. All run one or two blocks of kThreads threads from `in` to `out`.
#pragma once

#include <cuda_runtime.h>

namespace planted {

inline constexpr unsigned kThreads = 128, kAll = 0xffffffffu;

// The sum over the block through shared memory.
template <bool first_barrier, bool last_barrier>
__device__ float block_sum(float value) {
  __shared__ float part[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
  if constexpr (first_barrier) __syncthreads();
  value = 0;
  for (unsigned i = 0; i < kThreads / 32; ++i) value += part[i];
  if constexpr (last_barrier) __syncthreads();  // before the array is used again
  return value;
}

template <bool planted>
__global__ void no_barrier_before_reading(const float* in, float* out) {
  out[threadIdx.x] = block_sum<!planted, true>(in[threadIdx.x]);
}

template <bool planted>
__global__ void no_barrier_before_reuse(const float* in, float* out) {
  const float once = block_sum<true, !planted>(in[threadIdx.x]);
  out[threadIdx.x] = once + block_sum<true, !planted>(2 * in[threadIdx.x]);
}

// Four steps through two buffers, the next one filled while this one is read.
template <bool planted>
__global__ void no_barrier_between_stages(const float* in, float* out) {
  __shared__ float stages[2][kThreads];
  float sum = 0;
  stages[0][threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  for (unsigned step = 0; step < 4; ++step) {
    sum += stages[step % 2][threadIdx.x ^ 64];
    stages[(step + 1) % 2][threadIdx.x] = in[(threadIdx.x + step + 1) % kThreads];
    if (!planted || step % 2 == 0) __syncthreads();  // one in two is not enough
  }
  out[threadIdx.x] = sum;
}

template <bool planted>
__global__ void shuffle_in_a_branch(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (!planted || threadIdx.x < 20) value += __shfl_xor_sync(kAll, value, 1);
  out[threadIdx.x] = value;
}

template <bool planted>
__global__ void shuffle_after_some_left(const float* in, float* out) {
  if (planted && threadIdx.x == 40) return;
  out[threadIdx.x] = __shfl_sync(kAll, in[threadIdx.x], 0);
}

template <bool planted>
__global__ void barrier_in_both_branches(const float* in, float* out) {
  if (planted && threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool planted>
__global__ void barrier_in_one_branch(const float* in, float* out) {
  if (!planted || threadIdx.x < 64) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
  __shfl_sync(kAll, 0, 0);
  if (planted && threadIdx.x >= 64) {
    __syncthreads();
  }
}

template <bool planted>
__global__ void lane_outside_its_mask(const float* in, float* out) {
  const unsigned even = 0x55555555u, mask = threadIdx.x % 2 == 0 || planted ? even : ~even;
  out[threadIdx.x] = __shfl_sync(mask, in[threadIdx.x], planted ? 0 : threadIdx.x % 2);
}

template <bool planted>
__global__ void source_outside_the_mask(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffu, in[threadIdx.x], planted ? 16 : 15);
}

template <bool planted>
__global__ void different_collectives(const float* in, float* out) {
  if (planted && threadIdx.x % 2 == 0) {
    out[threadIdx.x] = static_cast<float>(__ballot_sync(kAll, in[threadIdx.x] > 0));
  } else {
    out[threadIdx.x] = __shfl_sync(kAll, in[threadIdx.x], 3);
  }
}

template <bool planted>
__global__ void shared_read_unwritten(const float* in, float* out) {
  __shared__ float copy[kThreads];
  if (!planted || threadIdx.x != 5) copy[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = copy[threadIdx.x];
}

template <bool planted>
__global__ void no_syncwarp(const float* in, float* out) {
  __shared__ float copy[kThreads];
  copy[threadIdx.x] = in[threadIdx.x];
  if constexpr (!planted) __syncwarp();
  out[threadIdx.x] = copy[threadIdx.x ^ 1];
}

template <bool planted>
__global__ void shared_overrun(const float* in, float* out) {
  __shared__ float copy[kThreads];
  volatile unsigned at = threadIdx.x + (planted ? 1 : 0);
  copy[at] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = copy[at];
}

template <bool planted>
__global__ void global_overrun(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + (planted ? 1 : 0)];
}

template <bool planted>
__global__ void misaligned_vector(const float* in, float* out) {
  if (threadIdx.x >= kThreads / 4 - 1) return;
  const unsigned shift = planted ? 1 : 0;
  reinterpret_cast<uint4*>(out)[threadIdx.x] = *reinterpret_cast<const uint4*>(in + 4 * threadIdx.x + shift);
}

template <bool planted>
__global__ void index_overflow(const float* in, float* out) {
  const int row = 70000 + static_cast<int>(threadIdx.x), width = 70000;
  const int64_t at = planted ? row * width : int64_t{row} * width;
  out[threadIdx.x] = in[threadIdx.x] + static_cast<float>(at % 2);
}

template <bool planted>
__global__ void last_row_unwritten(const float* in, float* out) {
  if (!planted || threadIdx.x + 1 < kThreads) out[threadIdx.x] = in[threadIdx.x];
}

template <bool planted>
__global__ void lost_update(const float* in, int* count) {
  if (in[threadIdx.x] < 0) return;
  if constexpr (planted) {
    *count += 1;
  } else {
    atomicAdd(count, 1);
  }
}

// Two blocks: the second takes for granted that the first has run.
template <bool planted>
__global__ void order_of_blocks(const float* in, float* out) {
  const unsigned at = blockIdx.x * kThreads / 2 + threadIdx.x;
  if (threadIdx.x >= kThreads / 2) return;
  out[at] = planted && blockIdx.x == 1 ? out[threadIdx.x] - in[threadIdx.x] + in[at] : in[at];
}

// Two blocks: whoever comes last adds up the parts of both.
template <bool planted>
__global__ void last_block_sums(const float* in, float* parts, unsigned* ticket, float* out) {
  __shared__ bool last;
  const float sum = block_sum<true, true>(in[threadIdx.x] * static_cast<float>(blockIdx.x + 1));
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sum;
    __threadfence();
    last = planted ? blockIdx.x + 1 == gridDim.x : atomicAdd(ticket, 1u) + 1 == gridDim.x;
  }
  __syncthreads();
  if (last) out[threadIdx.x] = parts[0] + parts[1];
}

}  // namespace planted
