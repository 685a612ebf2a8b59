// CUDA kernels of merge_experts.h, bound by memory: blocks of kMergeBytes of a tensor numbered through all tensors of
// the call, each expert read once. Dots are made in two stages, a number a block and expert, then their sum in double,
// both in an order that depends on the sizes alone.
#include "ummrm/merge_experts.h"

#include "numeric.cuh"

namespace ummrm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kMergeBytes = 16384;  // of one tensor, a block: four accesses of 16 bytes in flight a thread
constexpr int kExpertsAtOnce = 32;      // whose warps' sums wait in shared memory

template <class T>
constexpr int64_t kMergeBlock = kMergeBytes / sizeof(T);  // elements

int64_t merge_block(DType dtype) { return dtype == DType::f32 ? kMergeBlock<float> : kMergeBlock<bf16>; }

// What a kernel is given: the tensors with the number of each one's first block, and whether 16-byte accesses fit it.
template <class Args>
struct Plan {
  Args args;
  int64_t first_block[kMaxMergeTensors];
  bool wide[kMaxMergeTensors];
};

const void* result_of(const MergeTensor& tensor) { return tensor.merged; }
const void* result_of(const MergeGradTensor&) { return nullptr; }  // `shared` and `routed` are

template <class T, class Tensor>
bool fits_vectors(const Tensor& tensor) {
  return aligned16(tensor.shared) && aligned16(tensor.routed) && aligned16(result_of(tensor)) &&
         aligned16(tensor.grad) && tensor.shared_stride % kVector<T> == 0 && tensor.routed_stride % kVector<T> == 0;
}

// Returns the number of blocks.
template <class Args>
int64_t make_plan(const Args& args, Plan<Args>& plan) {
  plan.args = args;
  int64_t blocks = 0;
  for (int64_t i = 0; i < args.num_tensors; ++i) {
    plan.first_block[i] = blocks;
    plan.wide[i] =
        args.dtype == DType::f32 ? fits_vectors<float>(args.tensors[i]) : fits_vectors<bf16>(args.tensors[i]);
    blocks += ceil_div(args.tensors[i].elements, merge_block(args.dtype));
  }
  return blocks;
}

template <class Args>
__device__ inline int tensor_of(const Plan<Args>& plan, int64_t block) {
  int index = 0;
  while (index + 1 < plan.args.num_tensors && plan.first_block[index + 1] <= block) ++index;
  return index;
}

template <class T>
__device__ const T* expert_of(const MergeTensor& tensor, int64_t num_shared, int64_t e) {
  if (e < num_shared) return static_cast<const T*>(tensor.shared) + e * tensor.shared_stride;
  return static_cast<const T*>(tensor.routed) + (e - num_shared) * tensor.routed_stride;
}

// Elements [first, last) of one tensor, N a thread and step; returns where it stopped, short of a whole step of N.
template <int N, class T>
__device__ int64_t merge_range(const MergeTensor& tensor, const float* c, int64_t num_shared, int64_t experts,
                               int64_t first, int64_t last) {
  const int64_t whole = first + (last - first) / N * N;
  for (int64_t at = first + static_cast<int64_t>(threadIdx.x) * N; at < whole; at += kThreads * N) {
    float sum[N] = {};
#pragma unroll 4
    for (int64_t e = 0; e < experts; ++e) {
      float value[N];
      load<N>(expert_of<T>(tensor, num_shared, e) + at, value);
      for (int i = 0; i < N; ++i) sum[i] += c[e] * value[i];
    }
    store<N>(sum, static_cast<T*>(tensor.merged) + at);
  }
  return whole;
}

// Bytes moved: S + E + 1 elements an element.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident) merge_kernel(const __grid_constant__ Plan<MergeExperts> plan) {
  const int index = tensor_of(plan, blockIdx.x);
  const MergeTensor& tensor = plan.args.tensors[index];
  const int64_t num_shared = plan.args.num_shared, experts = num_shared + plan.args.num_routed;
  const float* c = plan.args.coefficients + index * experts;
  int64_t first = (blockIdx.x - plan.first_block[index]) * kMergeBlock<T>;
  const int64_t last = first + kMergeBlock<T> < tensor.elements ? first + kMergeBlock<T> : tensor.elements;
  if (plan.wide[index]) first = merge_range<kVector<T>, T>(tensor, c, num_shared, experts, first, last);
  merge_range<1, T>(tensor, c, num_shared, experts, first, last);
}

// A thread's share of a block, as it lies in memory: kept in half the registers that fp32 would take, so that one
// expert's is under way while another's is multiplied.
constexpr int kSteps = kMergeBytes / kThreads / 16;
struct Share {
  uint4 words[kSteps];
};

template <class T>
__device__ Share load_share(const T* from) {
  Share share;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    share.words[step] = reinterpret_cast<const uint4*>(from)[step * kThreads + threadIdx.x];
  return share;
}

template <class T>
__device__ float dot_of(const Share& a, const Share& b) {
  float dot = 0;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    float left[kVector<T>], right[kVector<T>];
    unpack_all<T>(a.words[step], left);
    unpack_all<T>(b.words[step], right);
    for (int i = 0; i < kVector<T>; ++i) dot += left[i] * right[i];
  }
  return dot;
}

// Of `count` elements, one at a time: not aligned, or a tensor's ragged end.
template <class T>
__device__ float slow_dot(const T* a, const T* b, int64_t count) {
  float dot = 0;
  for (int64_t at = threadIdx.x; at < count; at += kThreads) dot += load_one<T>(a, at) * load_one<T>(b, at);
  return dot;
}

template <bool whole, class T>
__device__ void block_dots(const Plan<MergeExperts>& plan, int index, int64_t count, int64_t blocks,
                           float (&sums)[kWarps][kExpertsAtOnce], float* partial) {
  const MergeTensor& tensor = plan.args.tensors[index];
  const int64_t num_shared = plan.args.num_shared, experts = num_shared + plan.args.num_routed;
  const int64_t first = (blockIdx.x - plan.first_block[index]) * kMergeBlock<T>;
  const auto share_of = [&](int64_t e) { return expert_of<T>(tensor, num_shared, e) + first; };
  const T* grad = static_cast<const T*>(tensor.grad) + first;
  Share grads, next;
  if constexpr (whole) grads = load_share(grad);
  for (int64_t from = 0; from < experts; from += kExpertsAtOnce) {
    const int some = static_cast<int>(experts - from < kExpertsAtOnce ? experts - from : kExpertsAtOnce);
    if constexpr (whole) next = load_share(share_of(from));
#pragma unroll 1
    for (int e = 0; e < some; ++e) {
      float dot;
      if constexpr (whole) {
        const Share values = next;
        if (e + 1 < some) next = load_share(share_of(from + e + 1));
        dot = dot_of<T>(grads, values);
      } else {
        dot = slow_dot(grad, share_of(from + e), count);
      }
      dot = lanes_sum(dot);
      if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp][e] = dot;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < some; e += kThreads) {
      float total = 0;
      for (int w = 0; w < kWarps; ++w) total += sums[w][e];
      partial[(from + e) * blocks + blockIdx.x] = total;
    }
    __syncthreads();  // before the next experts' sums
  }
}

// Stage one. Bytes moved: S + E + 1 elements an element. partial: [experts, blocks].
template <class T>
__global__ void __launch_bounds__(kThreads, kResident + 1)
    dots_kernel(const __grid_constant__ Plan<MergeExperts> plan, int64_t blocks, float* partial) {
  __shared__ float sums[kWarps][kExpertsAtOnce];
  const int index = tensor_of(plan, blockIdx.x);
  const int64_t left = plan.args.tensors[index].elements - (blockIdx.x - plan.first_block[index]) * kMergeBlock<T>;
  if (plan.wide[index] && left >= kMergeBlock<T>) {
    block_dots<true, T>(plan, index, kMergeBlock<T>, blocks, sums, partial);
  } else {
    block_dots<false, T>(plan, index, left < kMergeBlock<T> ? left : kMergeBlock<T>, blocks, sums, partial);
  }
}

// Stage two: a block a dot.
__global__ void __launch_bounds__(kThreads, kResident)
    dots_finish_kernel(const __grid_constant__ Plan<MergeExperts> plan, int64_t blocks, const float* partial,
                       float* dots) {
  __shared__ double warps[kWarps];
  const int64_t experts = plan.args.num_shared + plan.args.num_routed;
  const int64_t index = blockIdx.x / experts, expert = blockIdx.x % experts;
  const int64_t first = plan.first_block[index],
                last = index + 1 < plan.args.num_tensors ? plan.first_block[index + 1] : blocks;
  double sum = 0;
  for (int64_t block = first + threadIdx.x; block < last; block += kThreads) sum += partial[expert * blocks + block];
  sum = lanes_sum(sum);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += warps[w];
  dots[blockIdx.x] = static_cast<float>(total);
}

// Elements [first, last) of one tensor's gradient, times each coefficient; returns where it stopped, as merge_range.
template <int N, class T>
__device__ int64_t grads_range(const MergeGradTensor& tensor, const float* c, int64_t num_shared, int64_t num_routed,
                               int64_t first, int64_t last) {
  const int64_t whole = first + (last - first) / N * N;
  for (int64_t at = first + static_cast<int64_t>(threadIdx.x) * N; at < whole; at += kThreads * N) {
    float grad[N];
    load<N>(static_cast<const T*>(tensor.grad) + at, grad);
    const auto write = [&](void* to, int64_t stride, const float* coefficients, int64_t count) {
      for (int64_t e = 0; to != nullptr && e < count; ++e) {
        float scaled[N];
        for (int i = 0; i < N; ++i) scaled[i] = coefficients[e] * grad[i];
        store<N>(scaled, static_cast<T*>(to) + e * stride + at);
      }
    };
    write(tensor.shared, tensor.shared_stride, c, num_shared);
    write(tensor.routed, tensor.routed_stride, c + num_shared, num_routed);
  }
  return whole;
}

// Bytes moved: S + E + 1 elements an element.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    grads_kernel(const __grid_constant__ Plan<MergeExpertsGrads> plan) {
  const int index = tensor_of(plan, blockIdx.x);
  const MergeGradTensor& tensor = plan.args.tensors[index];
  const int64_t num_shared = plan.args.num_shared, num_routed = plan.args.num_routed;
  const float* c = plan.args.coefficients + index * (num_shared + num_routed);
  int64_t first = (blockIdx.x - plan.first_block[index]) * kMergeBlock<T>;
  const int64_t last = first + kMergeBlock<T> < tensor.elements ? first + kMergeBlock<T> : tensor.elements;
  if (plan.wide[index]) first = grads_range<kVector<T>, T>(tensor, c, num_shared, num_routed, first, last);
  grads_range<1, T>(tensor, c, num_shared, num_routed, first, last);
}

template <class Args>
bool bad(const Args& args) {
  return args.num_tensors > kMaxMergeTensors;
}

}  // namespace

int merge_experts(const MergeExperts& args, Stream stream) {
  if (bad(args)) return cudaErrorInvalidValue;
  Plan<MergeExperts> plan;
  const int64_t blocks = make_plan(args, plan);
  return with_type(args.dtype,
                   [&](auto type) { return launch(merge_kernel<decltype(type)>, blocks, kThreads, stream, plan); });
}

int merge_experts_grads(const MergeExpertsGrads& args, Stream stream) {
  if (bad(args)) return cudaErrorInvalidValue;
  Plan<MergeExpertsGrads> plan;
  const int64_t blocks = make_plan(args, plan);
  return with_type(args.dtype,
                   [&](auto type) { return launch(grads_kernel<decltype(type)>, blocks, kThreads, stream, plan); });
}

int64_t merge_experts_dots_workspace(const MergeExperts& args) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < args.num_tensors && i < kMaxMergeTensors; ++i)
    blocks += ceil_div(args.tensors[i].elements, merge_block(args.dtype));
  return blocks * (args.num_shared + args.num_routed) * static_cast<int64_t>(sizeof(float));
}

int merge_experts_dots(const MergeExperts& args, float* dots, void* workspace, Stream stream) {
  if (bad(args)) return cudaErrorInvalidValue;
  Plan<MergeExperts> plan;
  const int64_t blocks = make_plan(args, plan);
  auto* partial = static_cast<float*>(workspace);
  const int status = with_type(args.dtype, [&](auto type) {
    return launch(dots_kernel<decltype(type)>, blocks, kThreads, stream, plan, blocks, partial);
  });
  if (status != cudaSuccess) return status;
  return launch(dots_finish_kernel, args.num_tensors * (args.num_shared + args.num_routed), kThreads, stream, plan,
                blocks, partial, dots);
}

}  // namespace ummrm::cuda
