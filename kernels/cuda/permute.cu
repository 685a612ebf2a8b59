// CUDA kernels of permute.h, bound by memory. Copies: a warp a row, 512 bytes a step, four steps in flight. Sums: a
// thread for eight elements of a token's output, which has those of two of its rows in flight. The backward: a warp for each
// gradient row, with its dot product; the token's rows are neighbours, so its gradient comes from the L1 cache after
// the first.
#include "ummrm/permute.h"

#include "numeric.cuh"

namespace ummrm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// Bytes moved: 2 * row_bytes a row, less what the cache saves of a token's other rows.
template <class Word>
__global__ void __launch_bounds__(kThreads, kResident)
    permute_kernel(const Word* x, const int32_t* sorted_to_slot, const int32_t* live_rows, int64_t rows, int64_t top_k,
                   int64_t words, Word* out) {
  constexpr int kSteps = 4;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const bool live = row < *live_rows;
  const Word* from = x + (live ? sorted_to_slot[row] / top_k : 0) * words;
  Word* to = out + row * words;
  for (int64_t first = lane; first < words; first += kSteps * kWarp) {
    Word step[kSteps];
    for (int i = 0; i < kSteps; ++i) {
      const int64_t at = first + i * kWarp;
      step[i] = live && at < words ? from[at] : Word{};
    }
    for (int i = 0; i < kSteps; ++i) {
      const int64_t at = first + i * kWarp;
      if (at < words) to[at] = step[i];
    }
  }
}

template <class Word>
int launch_permute(const Permute& args, int64_t rows, const int32_t* live_rows, Stream stream) {
  return launch(permute_kernel<Word>, ceil_div(rows, kWarps), kThreads, stream, static_cast<const Word*>(args.x),
                args.sorted_to_slot, live_rows, rows, args.top_k, args.row_bytes / static_cast<int64_t>(sizeof(Word)),
                static_cast<Word*>(args.out));
}

__device__ float shared_scale(const void* shared_weight, int64_t token, int64_t num_shared) {
  if (shared_weight == nullptr) return 1.f;
  return static_cast<const float*>(shared_weight)[token] / static_cast<float>(num_shared);
}

__device__ float weight_or_one(const void* weights, int64_t slot) {
  return weights == nullptr ? 1.f : static_cast<const float*>(weights)[slot];
}

constexpr int kSumRows = 2;  // of a token in flight at once: more take registers, and with them warps
template <int N>
constexpr int kSumSteps = N == 8 ? 1 : 2;

// sum += scale[r] * row[r] for each row, in their order, those that are null left out. A thread's columns lie `stride`
// apart. All loads come before the first sum.
template <int N, int rows, class T>
__device__ void add_scaled(const T* const (&row)[rows], const float (&scale)[rows], int64_t first, int64_t stride,
                           int64_t hidden, float (&sum)[kSumSteps<N>][N]) {
  float values[rows][kSumSteps<N>][N] = {};
#pragma unroll
  for (int r = 0; r < rows; ++r) {
#pragma unroll
    for (int step = 0; step < kSumSteps<N>; ++step) {
      const int64_t column = first + step * stride;
      if (row[r] != nullptr && column < hidden) load<N>(row[r] + column, values[r][step]);
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
#pragma unroll
    for (int step = 0; step < kSumSteps<N>; ++step) {
      for (int i = 0; i < N; ++i)
        if (row[r] != nullptr) sum[step][i] += scale[r] * values[r][step][i];
    }
  }
}

// Bytes moved: (S + K + 1) * row a token. `chunks` blocks share a token.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    unpermute_kernel(Unpermute args, const int32_t* live_rows, int chunks) {
  const int64_t token = blockIdx.x / chunks;
  const int64_t stride = static_cast<int64_t>(blockDim.x) * N, hidden = args.hidden;
  const int64_t first = blockIdx.x % chunks * kSumSteps<N> * stride + static_cast<int64_t>(threadIdx.x) * N;
  const T* rows = static_cast<const T*>(args.rows);
  const T* sorted = rows + args.num_shared * args.tokens * hidden;
  const int32_t live = *live_rows;
  const float scale[1] = {shared_scale(args.shared_weight, token, args.num_shared)};
  float sum[kSumSteps<N>][N] = {};
  for (int64_t s = 0; s < args.num_shared; ++s) {
    const T* row[1] = {rows + (s * args.tokens + token) * hidden};
    add_scaled<N>(row, scale, first, stride, hidden, sum);
  }
  for (int64_t from = 0; from < args.top_k; from += kSumRows) {
    const T* row[kSumRows];
    float weight[kSumRows];
#pragma unroll
    for (int r = 0; r < kSumRows; ++r) {
      const int64_t slot = token * args.top_k + from + r;
      const bool slots_row = from + r < args.top_k;
      const int64_t at = slots_row ? args.slot_to_sorted[slot] : live;
      weight[r] = slots_row ? weight_or_one(args.routed_weights, slot) : 0.f;
      row[r] = at < live ? sorted + at * hidden : nullptr;
    }
    add_scaled<N>(row, weight, first, stride, hidden, sum);
  }
#pragma unroll
  for (int step = 0; step < kSumSteps<N>; ++step) {
    const int64_t column = first + step * stride;
    if (column < hidden) store<N>(sum[step], static_cast<T*>(args.out) + token * hidden + column);
  }
}

// to = scale * g; returns this lane's part of <g, row> where the dot is wanted. One warp.
template <int N, class T>
__device__ float scale_and_dot(const T* g, const T* row, float scale, bool dot, int64_t hidden, T* to) {
  float total = 0;
  for (int64_t column = threadIdx.x % kWarp * N; column < hidden; column += kWarp * N) {
    float grad[N], value[N], scaled[N];
    load<N>(g + column, grad);
    for (int i = 0; i < N; ++i) scaled[i] = scale * grad[i];
    if (dot) {
      load<N>(row + column, value);
      for (int i = 0; i < N; ++i) total += grad[i] * value[i];
    }
    store<N>(scaled, to + column);
  }
  return total;
}

// Bytes moved: 2 * (S + K) + 1 rows a token. K + 1 warps a token: one for all shared rows, whose dots are one number.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    unpermute_backward_kernel(UnpermuteBackward args, const int32_t* live_rows) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t token = unit / (args.top_k + 1), k = unit % (args.top_k + 1) - 1, hidden = args.hidden;
  if (token >= args.tokens) return;
  const bool first_lane = threadIdx.x % kWarp == 0;
  const T* g = static_cast<const T*>(args.grad_out) + token * hidden;
  const auto* rows = static_cast<const T*>(args.rows);
  auto* grad_rows = static_cast<T*>(args.grad_rows);
  float total = 0;
  if (k < 0) {
    auto* grad_shared = static_cast<float*>(args.grad_shared_weight);
    const float scale = shared_scale(args.shared_weight, token, args.num_shared);
    for (int64_t s = 0; s < args.num_shared; ++s) {
      const int64_t at = (s * args.tokens + token) * hidden;
      total += scale_and_dot<N>(g, rows + at, scale, grad_shared != nullptr, hidden, grad_rows + at);
    }
    total = lanes_sum(total);
    if (first_lane && grad_shared != nullptr) {
      grad_shared[token] = args.num_shared > 0 ? total / static_cast<float>(args.num_shared) : 0.f;
    }
    return;
  }
  auto* grad_routed = static_cast<float*>(args.grad_routed_weights);
  const int64_t slot = token * args.top_k + k, row = args.slot_to_sorted[slot];
  const int64_t at = (args.num_shared * args.tokens + row) * hidden;
  if (row < *live_rows) {
    const float weight = weight_or_one(args.routed_weights, slot);
    total = scale_and_dot<N>(g, rows + at, weight, grad_routed != nullptr, hidden, grad_rows + at);
  } else {
    const float zeros[N] = {};
    for (int64_t column = threadIdx.x % kWarp * N; column < hidden; column += kWarp * N)
      store<N>(zeros, grad_rows + at + column);
  }
  total = lanes_sum(total);
  if (first_lane && grad_routed != nullptr) grad_routed[slot] = total;
}

}  // namespace

int permute(const Permute& args, int64_t rows, const int32_t* live_rows, Stream stream) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.out) |
                        static_cast<uint64_t>(args.row_bytes);
  if (bits % 16 == 0) return launch_permute<uint4>(args, rows, live_rows, stream);
  if (bits % 4 == 0) return launch_permute<unsigned>(args, rows, live_rows, stream);
  return launch_permute<uint16_t>(args, rows, live_rows, stream);
}

int unpermute(const Unpermute& args, const int32_t* live_rows, Stream stream) {
  return with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel, int64_t per_thread) {
      const int64_t units = ceil_div(args.hidden, per_thread);
      const int threads = threads_for(units, kThreads);
      const int64_t chunks = ceil_div(units, threads);
      return launch(kernel, args.tokens * chunks, threads, stream, args, live_rows, static_cast<int>(chunks));
    };
    const bool wide = args.hidden % kVector<T> == 0 && aligned16(args.rows) && aligned16(args.out);
    constexpr int N = kVector<T>;
    return wide ? run(unpermute_kernel<T, N>, N * kSumSteps<N>) : run(unpermute_kernel<T, 1>, kSumSteps<1>);
  });
}

int unpermute_backward(const UnpermuteBackward& args, const int32_t* live_rows, Stream stream) {
  return with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide =
        args.hidden % kVector<T> == 0 && aligned16(args.rows) && aligned16(args.grad_out) && aligned16(args.grad_rows);
    return launch(wide ? unpermute_backward_kernel<T, kVector<T>> : unpermute_backward_kernel<T, 1>,
                  ceil_div(args.tokens * (args.top_k + 1), kWarps), kThreads, stream, args, live_rows);
  });
}

}  // namespace ummrm::cuda
