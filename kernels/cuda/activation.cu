// CUDA kernels of activation.h, bound by memory: a block a row, 16 bytes a thread and step. The kind of nonlinearity is
// a branch that all threads take alike, once for a vector, which costs nothing beside the memory and keeps the number
// of kernels small. Dots of a row are summed by lanes, then warps, in a fixed order.
#include "ummrm/activation.h"

#include "activation_math.cuh"

namespace ummrm::cuda {
namespace {

constexpr int kThreads = 256;

// The bias of a row of the combined buffer, or null.
template <class T>
__device__ const T* bias_of(const RowBias& bias, int64_t row, int64_t pre_width) {
  const int64_t shared_rows = bias.num_shared * bias.tokens;
  if (row < shared_rows) {
    return bias.shared == nullptr ? nullptr : static_cast<const T*>(bias.shared) + row / bias.tokens * pre_width;
  }
  const int64_t sorted = row - shared_rows;
  if (bias.routed == nullptr || sorted >= bias.expert_offsets[bias.experts]) return nullptr;
  int64_t low = 0, high = bias.experts;  // offsets[low] <= sorted < offsets[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (bias.expert_offsets[middle] <= sorted ? low : high) = middle;
  }
  return static_cast<const T*>(bias.routed) + low * pre_width;
}

template <int N, class T>
__device__ void load_biased(const T* row, const T* bias, int64_t column, float (&z)[N]) {
  load<N>(row + column, z);
  if (bias == nullptr) return;
  float b[N];
  load<N>(bias + column, b);
  for (int i = 0; i < N; ++i) z[i] += b[i];
}

// Bytes moved, a row of width I: 3 I elements with glu, else 2 I.
template <class T, int N, bool glu>
__global__ void __launch_bounds__(kThreads, kResident) activation_kernel(Activation args, RowBias row_bias) {
  const int64_t row = blockIdx.x, width = args.width, pre_width = glu ? 2 * width : width;
  const T* pre = static_cast<const T*>(args.pre_activation) + row * pre_width;
  const T* bias = bias_of<T>(row_bias, row, pre_width);
  T* out = static_cast<T*>(args.out) + row * width;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < width;
       column += static_cast<int64_t>(blockDim.x) * N) {
    float z[N], act[N], derivative[N];
    load_biased<N>(pre, bias, column, z);
    apply<MathOf<T>>(args.kind, z, act, derivative);
    if constexpr (glu) {
      float up[N];
      load_biased<N>(pre, bias, width + column, up);
      for (int i = 0; i < N; ++i) act[i] *= up[i];
    }
    store<N>(act, out + column);
  }
}

// Sum over the block, in thread 0.
__device__ float block_sum(float value) {
  __shared__ float warps[kThreads / kWarp];
  value = lanes_sum(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += warps[w];
  return total;
}

// Bytes moved, a row of width I: with glu 5 I elements, and I more for the weighted activation.
template <class T, int N, bool glu, bool weighted>
__global__ void __launch_bounds__(kThreads, kResident)
    activation_backward_kernel(ActivationBackward args, RowBias row_bias) {
  const int64_t row = blockIdx.x, width = args.width, pre_width = glu ? 2 * width : width;
  const T* pre = static_cast<const T*>(args.pre_activation) + row * pre_width;
  const T* bias = bias_of<T>(row_bias, row, pre_width);
  const T* grad = static_cast<const T*>(args.grad) + row * width;
  T* grad_pre = static_cast<T*>(args.grad_pre_activation) + row * pre_width;
  const float weight = weighted ? static_cast<const float*>(args.row_weights)[row] : 1.f;
  float dot = 0;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * N; column < width;
       column += static_cast<int64_t>(blockDim.x) * N) {
    float z[N], g[N], act[N], derivative[N];
    load_biased<N>(pre, bias, column, z);
    load<N>(grad + column, g);
    apply<MathOf<T>>(args.kind, z, act, derivative);
    if constexpr (glu) {
      float up[N], grad_up[N];
      load_biased<N>(pre, bias, width + column, up);
      for (int i = 0; i < N; ++i) {
        grad_up[i] = weight * g[i] * act[i];
        act[i] *= up[i];
        derivative[i] *= up[i];
      }
      store<N>(grad_up, grad_pre + width + column);
    }
    for (int i = 0; i < N; ++i) {
      dot += g[i] * act[i];
      derivative[i] *= weight * g[i];
      act[i] *= weight;
    }
    store<N>(derivative, grad_pre + column);
    if constexpr (weighted) store<N>(act, static_cast<T*>(args.weighted_activation) + row * width + column);
  }
  if constexpr (weighted) {
    dot = block_sum(dot);
    if (threadIdx.x == 0) static_cast<float*>(args.row_dots)[row] = dot;
  }
}

template <class T>
bool wide(int64_t width, const RowBias& bias) {
  return width % kVector<T> == 0 && aligned16(bias.shared) && aligned16(bias.routed);
}

}  // namespace

int activation(const Activation& args, int64_t rows, const RowBias& bias, Stream stream) {
  if (args.width == 0) return cudaSuccess;
  return with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kVector<T>;
    const bool vectors = wide<T>(args.width, bias) && aligned16(args.pre_activation) && aligned16(args.out);
    const auto kernel = vectors ? (args.glu ? activation_kernel<T, N, true> : activation_kernel<T, N, false>)
                                : (args.glu ? activation_kernel<T, 1, true> : activation_kernel<T, 1, false>);
    return launch(kernel, rows, threads_for(args.width / (vectors ? N : 1), kThreads), stream, args, bias);
  });
}

int activation_backward(const ActivationBackward& args, int64_t rows, const RowBias& bias, Stream stream) {
  return with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kVector<T>;
    const bool weighted = args.row_weights != nullptr;
    const bool vectors = wide<T>(args.width, bias) && aligned16(args.pre_activation) && aligned16(args.grad) &&
                         aligned16(args.grad_pre_activation) && aligned16(args.weighted_activation);
    const auto pick = [&](auto gated, auto plain, auto gated_weighted, auto plain_weighted) {
      return weighted ? (args.glu ? gated_weighted : plain_weighted) : (args.glu ? gated : plain);
    };
    const auto kernel =
        vectors ? pick(activation_backward_kernel<T, N, true, false>, activation_backward_kernel<T, N, false, false>,
                       activation_backward_kernel<T, N, true, true>, activation_backward_kernel<T, N, false, true>)
                : pick(activation_backward_kernel<T, 1, true, false>, activation_backward_kernel<T, 1, false, false>,
                       activation_backward_kernel<T, 1, true, true>, activation_backward_kernel<T, 1, false, true>);
    return launch(kernel, rows, threads_for(args.width / (vectors ? N : 1), kThreads), stream, args, bias);
  });
}

}  // namespace ummrm::cuda
