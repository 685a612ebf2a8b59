// CPU kernels of merge_experts.h. At the memory wall: a block's sum (or widened gradient) stays in L1 while each
// expert's block streams past once.
#include "ummrm/merge_experts.h"

#include <algorithm>

#include "dispatch.h"

namespace ummrm::cpu {
namespace {

// The tensor that a block belongs to, searched onwards from `tensor` since blocks are visited in order.
UMMRM_INLINE int64_t tensor_of(const MergeExperts& args, int64_t block, int64_t tensor) {
  while (tensor + 1 < args.num_tensors && args.tensors[tensor + 1].first_block <= block) ++tensor;
  return tensor;
}

template <class T>
UMMRM_INLINE void merge_body(const MergeExperts& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  F sum[kMergeBlock];
  int64_t index = 0;
  for (int64_t block = begin; block < end; ++block) {
    index = tensor_of(args, block, index);
    const MergeTensor& tensor = args.tensors[index];
    const F* c = static_cast<const F*>(args.coefficients) + index * args.num_experts;
    const int64_t first = (block - tensor.first_block) * kMergeBlock;
    const int64_t count = std::min(kMergeBlock, tensor.elements - first);
    for (int64_t i = 0; i < count; ++i) sum[i] = 0;
    for (int64_t e = 0; e < args.num_experts; ++e) {
      const T* expert = static_cast<const T*>(tensor.experts[e]) + first;
      for (int64_t i = 0; i < count; ++i) sum[i] += c[e] * load(expert[i]);
    }
    store_many(sum, count, static_cast<T*>(tensor.merged) + first);
  }
}

template <class T>
UMMRM_INLINE void dots_body(const MergeExperts& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  constexpr int64_t kPiece = 512;
  F grad[kMergeBlock], product[kPiece];
  int64_t index = 0;
  for (int64_t block = begin; block < end; ++block) {
    index = tensor_of(args, block, index);
    const MergeTensor& tensor = args.tensors[index];
    const int64_t first = (block - tensor.first_block) * kMergeBlock;
    const int64_t count = std::min(kMergeBlock, tensor.elements - first);
    load_many(static_cast<const T*>(tensor.grad) + first, count, grad);
    for (int64_t e = 0; e < args.num_experts; ++e) {
      const T* expert = static_cast<const T*>(tensor.experts[e]) + first;
      double total = 0;
      for (int64_t piece = 0; piece < count; piece += kPiece) {
        const int64_t width = std::min(kPiece, count - piece);
        for (int64_t i = 0; i < width; ++i) product[i] = grad[piece + i] * load(expert[piece + i]);
        total += lane_sum(product, width);
      }
      args.block_dots[block * args.num_experts + e] = total;
    }
  }
}

}  // namespace

UMMRM_DEFINE_LAUNCHER(merge_experts, MergeExperts, merge_body)
UMMRM_DEFINE_LAUNCHER(merge_experts_dots, MergeExperts, dots_body)

void merge_experts_dots_finish(const MergeExperts& args, void* dots) {
  for (int64_t index = 0; index < args.num_tensors; ++index) {
    const MergeTensor& tensor = args.tensors[index];
    const int64_t end = tensor.first_block + merge_blocks(tensor.elements);
    for (int64_t e = 0; e < args.num_experts; ++e) {
      double total = 0;
      for (int64_t block = tensor.first_block; block < end; ++block) total += args.block_dots[block * args.num_experts + e];
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
