// Weighted sums of experts, several FFN tensors in one call, each expert read once; and their backward: the dot
// products of a gradient with every expert, which are the coefficients' gradient, and that gradient times every
// coefficient, which are the experts'. Work is cut into fixed blocks of elements, numbered through all tensors: a block
// belongs to one tensor, and results do not depend on how blocks are spread over threads.
#pragma once

#include <cstdint>

#include "ummrm/types.h"

namespace ummrm {

struct MergeTensor {
  const void* const* experts;  // [experts] pointers to `elements` contiguous elements each, shared experts first
  int64_t elements;
  int64_t first_block;  // number of the tensor's first block
  void* merged;         // out of merge_experts, [elements]
  const void* grad;     // input of merge_experts_dots, [elements]
};

struct MergeExperts {
  DType dtype;
  int64_t num_tensors, num_experts;
  const MergeTensor* tensors;
  const void* coefficients;  // of merge_experts: accumulator type [num_tensors, num_experts]
  double* block_dots;        // workspace of merge_experts_dots, [blocks, num_experts]
};

struct MergeGradTensor {
  void* const* expert_grads;  // out, [experts] pointers to `elements` elements each; a null one is not wanted
  int64_t elements;
  int64_t first_block;
  const void* grad;  // of the merged tensor, [elements]
};

struct MergeExpertsGrads {
  DType dtype;
  int64_t num_tensors, num_experts;
  const MergeGradTensor* tensors;
  const void* coefficients;  // accumulator type [num_tensors, num_experts]
};

namespace cpu {

inline constexpr int64_t kMergeBlock = 4096;  // elements

constexpr int64_t merge_blocks(int64_t elements) { return (elements + kMergeBlock - 1) / kMergeBlock; }

void merge_experts(const MergeExperts& args, int64_t begin_block, int64_t end_block);
void merge_experts_dots(const MergeExperts& args, int64_t begin_block, int64_t end_block);
// dots: accumulator type [num_tensors, num_experts], summed in block order.
void merge_experts_dots_finish(const MergeExperts& args, void* dots);
void merge_experts_grads(const MergeExpertsGrads& args, int64_t begin_block, int64_t end_block);

}  // namespace cpu

namespace cuda {

inline constexpr int64_t kMaxMergeTensors = 8;  // a gated FFN has six, biases included; they are kernel arguments

struct MergeTensor {
  const void* shared;  // expert s starts at shared + s * shared_stride elements and is contiguous
  const void* routed;
  int64_t shared_stride, routed_stride, elements;
  void* merged;      // out of merge_experts, [elements]
  const void* grad;  // input of merge_experts_dots, [elements]
};

struct MergeExperts {
  DType dtype;
  int64_t num_tensors, num_shared, num_routed;
  MergeTensor tensors[kMaxMergeTensors];
  const float* coefficients;  // of merge_experts: [num_tensors, num_shared + num_routed], shared experts first
};

struct MergeGradTensor {
  void* shared;  // out, laid out as in MergeTensor; null: not wanted
  void* routed;
  int64_t shared_stride, routed_stride, elements;
  const void* grad;  // of the merged tensor, [elements]
};

struct MergeExpertsGrads {
  DType dtype;
  int64_t num_tensors, num_shared, num_routed;
  MergeGradTensor tensors[kMaxMergeTensors];
  const float* coefficients;  // [num_tensors, num_shared + num_routed], shared experts first
};

int merge_experts(const MergeExperts& args, Stream stream);
int merge_experts_grads(const MergeExpertsGrads& args, Stream stream);
// dots: [num_tensors, num_shared + num_routed].
int64_t merge_experts_dots_workspace(const MergeExperts& args);  // bytes
int merge_experts_dots(const MergeExperts& args, float* dots, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace ummrm
