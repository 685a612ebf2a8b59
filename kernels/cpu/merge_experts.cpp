// CPU kernels of merge_experts.h, bound by memory: the experts stream past side by side, a few cache lines of each at a
// time, and sums stay in registers. That many streams defeat the hardware prefetcher, so lines are fetched ahead by
// hand; on Zen 3, one thread, nine experts, that takes fp32 from 13 to 20 GB/s and bf16 from 6 to 14.
#include "ummrm/merge_experts.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ummrm::cpu {
namespace {

// The tensor that a block belongs to, searched onwards from `tensor` since blocks are visited in order.
template <class Args>
UMMRM_INLINE int64_t tensor_of(const Args& args, int64_t block, int64_t tensor) {
  while (tensor + 1 < args.num_tensors && args.tensors[tensor + 1].first_block <= block) ++tensor;
  return tensor;
}

constexpr int64_t kPiece = 64;   // elements taken of each expert at a time
constexpr int64_t kAhead = 512;  // bytes

// Fetching past the end of an array is allowed: a prefetch of an unmapped address does nothing.
template <class T>
UMMRM_INLINE void prefetch(const T* piece) {
#if defined(__GNUC__)
  const auto address = reinterpret_cast<uintptr_t>(piece) + kAhead;
  for (uintptr_t line = 0; line < kPiece * sizeof(T); line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(address + line));
#endif
}

// Results of 4 MB and more go past the caches: a store into them would read every line first, a tenth of all that is
// moved with nine experts.
constexpr int64_t kStreamed = int64_t{4} << 20;

template <class T>
UMMRM_INLINE bool streams([[maybe_unused]] const MergeTensor& tensor) {
#if defined(__SSE2__)
  const auto bytes = tensor.elements * static_cast<int64_t>(sizeof(T));
  return bytes >= kStreamed && reinterpret_cast<uintptr_t>(tensor.merged) % 16 == 0;
#else
  return false;
#endif
}

// As store_many, of kPiece elements to an aligned address.
template <class T>
UMMRM_INLINE void stream_piece(const Accumulator<T>* sum, T* to) {
#if defined(__SSE2__)
  alignas(64) T rounded[kPiece];
  store_many(sum, kPiece, rounded);
  constexpr int64_t kCount = kPiece * static_cast<int64_t>(sizeof(T)) / 16;
  const auto* from = reinterpret_cast<const __m128i*>(rounded);
  auto* out = reinterpret_cast<__m128i*>(to);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kCount; ++i) _mm_stream_si128(out + i, _mm_load_si128(from + i));
#else
  store_many(sum, kPiece, to);
#endif
}

template <class T>
UMMRM_INLINE void merge_piece(const MergeTensor& tensor, const Accumulator<T>* c, int64_t num_experts, int64_t first,
                              int64_t count, bool stream) {
  Accumulator<T> sum[kPiece] = {};
  for (int64_t e = 0; e < num_experts; ++e) {
    const T* expert = static_cast<const T*>(tensor.experts[e]) + first;
    prefetch(expert);
    for (int64_t i = 0; i < count; ++i) sum[i] += c[e] * load(expert[i]);
  }
  T* to = static_cast<T*>(tensor.merged) + first;
  stream ? stream_piece(sum, to) : store_many(sum, count, to);
}

template <class T>
UMMRM_INLINE void merge_body(const MergeExperts& args, int64_t begin, int64_t end) {
  int64_t index = 0;
  for (int64_t block = begin; block < end; ++block) {
    index = tensor_of(args, block, index);
    const MergeTensor& tensor = args.tensors[index];
    const auto* c = static_cast<const Accumulator<T>*>(args.coefficients) + index * args.num_experts;
    int64_t first = (block - tensor.first_block) * kMergeBlock;
    const int64_t last = std::min(first + kMergeBlock, tensor.elements);
    const bool stream = streams<T>(tensor);
    for (; first + kPiece <= last; first += kPiece) merge_piece<T>(tensor, c, args.num_experts, first, kPiece, stream);
    merge_piece<T>(tensor, c, args.num_experts, first, last - first, false);
  }
#if defined(__SSE2__)
  _mm_sfence();  // streamed stores are ordered with nothing else
#endif
}

// Adds grad * expert over one piece to that expert's kLanes running sums.
template <class T>
UMMRM_INLINE void dots_piece(const Accumulator<T>* grad, const T* expert, int64_t count, Accumulator<T>* lanes) {
  prefetch(expert);
  Accumulator<T> product[kPiece] = {};
  for (int64_t i = 0; i < count; ++i) product[i] = grad[i] * load(expert[i]);
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] += product[l] + product[kLanes + l];
}
static_assert(kPiece == 2 * kLanes);

template <class T>
UMMRM_INLINE void dots_body(const MergeExperts& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  F grad[kPiece];
  std::vector<F> lanes(args.num_experts * kLanes);
  int64_t index = 0;
  for (int64_t block = begin; block < end; ++block) {
    index = tensor_of(args, block, index);
    const MergeTensor& tensor = args.tensors[index];
    std::fill(lanes.begin(), lanes.end(), F(0));
    int64_t first = (block - tensor.first_block) * kMergeBlock;
    const int64_t last = std::min(first + kMergeBlock, tensor.elements);
    for (; first < last; first += kPiece) {
      const int64_t count = std::min(kPiece, last - first);
      const T* from = static_cast<const T*>(tensor.grad) + first;
      prefetch(from);
      load_many(from, count, grad);
      for (int64_t e = 0; e < args.num_experts; ++e) {
        const T* expert = static_cast<const T*>(tensor.experts[e]) + first;
        if (count == kPiece) {
          dots_piece(grad, expert, kPiece, &lanes[e * kLanes]);
        } else {
          dots_piece(grad, expert, count, &lanes[e * kLanes]);
        }
      }
    }
    for (int64_t e = 0; e < args.num_experts; ++e) {
      args.block_dots[block * args.num_experts + e] = lane_sum(&lanes[e * kLanes], kLanes);
    }
  }
}

// The gradient is read once and stays in registers while each expert's share of it is written.
template <class T>
UMMRM_INLINE void grads_piece(const MergeGradTensor& tensor, const Accumulator<T>* c, int64_t num_experts,
                              int64_t first, int64_t count) {
  Accumulator<T> grad[kPiece], scaled[kPiece];
  const T* from = static_cast<const T*>(tensor.grad) + first;
  prefetch(from);
  load_many(from, count, grad);
  for (int64_t e = 0; e < num_experts; ++e) {
    if (tensor.expert_grads[e] == nullptr) continue;
    for (int64_t i = 0; i < count; ++i) scaled[i] = c[e] * grad[i];
    store_many(scaled, count, static_cast<T*>(tensor.expert_grads[e]) + first);
  }
}

template <class T>
UMMRM_INLINE void grads_body(const MergeExpertsGrads& args, int64_t begin, int64_t end) {
  int64_t index = 0;
  for (int64_t block = begin; block < end; ++block) {
    index = tensor_of(args, block, index);
    const MergeGradTensor& tensor = args.tensors[index];
    const auto* c = static_cast<const Accumulator<T>*>(args.coefficients) + index * args.num_experts;
    int64_t first = (block - tensor.first_block) * kMergeBlock;
    const int64_t last = std::min(first + kMergeBlock, tensor.elements);
    for (; first + kPiece <= last; first += kPiece) grads_piece<T>(tensor, c, args.num_experts, first, kPiece);
    grads_piece<T>(tensor, c, args.num_experts, first, last - first);
  }
}

}  // namespace

UMMRM_DEFINE_LAUNCHER(merge_experts, MergeExperts, merge_body)
UMMRM_DEFINE_LAUNCHER(merge_experts_grads, MergeExpertsGrads, grads_body)
UMMRM_DEFINE_LAUNCHER(merge_experts_dots, MergeExperts, dots_body)

void merge_experts_dots_finish(const MergeExperts& args, void* dots) {
  for (int64_t index = 0; index < args.num_tensors; ++index) {
    const MergeTensor& tensor = args.tensors[index];
    const int64_t end = tensor.first_block + merge_blocks(tensor.elements);
    for (int64_t e = 0; e < args.num_experts; ++e) {
      double total = 0;
      for (int64_t block = tensor.first_block; block < end; ++block)
        total += args.block_dots[block * args.num_experts + e];
      const int64_t at = index * args.num_experts + e;
      if (args.dtype == DType::f64) {
        static_cast<double*>(dots)[at] = total;
      } else {
        static_cast<float*>(dots)[at] = static_cast<float>(total);
      }
    }
  }
}

}  // namespace ummrm::cpu
