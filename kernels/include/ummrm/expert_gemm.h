// The grouped expert GEMM: every expert's product with its own rows, shared experts as groups beside the routed ones.
// On a CPU the products of this operator belong to the BLAS behind at::mm (csrc/expert_gemm.cpp; expert_products.h has
// those of a whole layer), and only bias gradients are left; on CUDA all groups run in one launch, since only the device
// knows their sizes.
#pragma once

#include <cstdint>

#include "ummrm/types.h"

namespace ummrm {

// out[c] = sum over the group's rows of row_weights[r] * rows[r, c], accumulated wide, rounded once.
struct ColumnSums {
  DType dtype;              // of rows and out
  const void* rows;         // the group's first row, [count, width]
  const void* row_weights;  // accumulator type, the group's first weight; null: ones
  int64_t count, width;
  void* out;  // [width]
};

namespace cpu {

inline constexpr int64_t kColumnBlock = 128;

void column_sums(const ColumnSums& args, int64_t begin_block, int64_t end_block);

}  // namespace cpu

// Combined buffers have the shared experts' rows first: expert s, token t at s*tokens + t, then `slots` sorted rows, of
// which those of routed expert e are expert_offsets[e] to expert_offsets[e + 1]; rows past the last offset belong to
// none. Rows and projections are contiguous; `num_shared` or `num_experts` may be 0, and any group may be empty.
namespace cuda {

// out = rows @ proj^T + bias, or with `transpose` out = rows @ proj; accumulated in fp32; fp32 products are exact but
// under allow_tf32.
struct ExpertGemm {
  DType dtype;  // of all tensors: f32, bf16 or f16
  int64_t tokens, num_shared, num_experts, slots;
  int64_t in, out_width;          // of a row; a projection is [out_width, in], with transpose [in, out_width]
  bool transpose;                 //
  bool one_row_a_token;           // shared_rows is [tokens, in], read by every shared expert; else [S*tokens, in]
  const void* shared_rows;        //
  const void* routed_rows;        // [slots, in]; rows of no group are not read
  const void* shared_proj;        // [S, ...]
  const void* routed_proj;        // [E, ...]
  const void* shared_bias;        // [S, out_width], or null
  const void* routed_bias;        // [E, out_width], or null
  const int32_t* expert_offsets;  // [E + 1], on the device
  void* out;                      // [S*tokens + slots, out_width]; rows of no group become zero
  int spare_multiprocessors = 0;  // that kernels which would take all of the device leave to others, as NCCL's
  bool allow_tf32 = false;        // fp32 operands may be rounded to TF32's 10 bits of fraction
};

// grad_proj = grad_rows^T @ rows of each group; zero for a group without rows. With `add` the sum with what is there,
// rounded once.
struct ExpertGemmWgrad {
  DType dtype;       // of rows and their gradients: f32, bf16 or f16
  DType grad_dtype;  // of the results: dtype or f32
  int64_t tokens, num_shared, num_experts, slots;
  int64_t width, grad_width;      // a result is [grad_width, width]
  bool one_row_a_token;           // of shared_rows, as above
  bool one_grad_row_a_token;      // of grad_shared_rows
  const void* shared_rows;        //
  const void* routed_rows;        // [slots, width]
  const void* grad_shared_rows;   //
  const void* grad_routed_rows;   // [slots, grad_width]
  const int32_t* expert_offsets;  // [E + 1], on the device
  void* shared_grad;              // out, [S, grad_width, width], or null: not needed
  void* routed_grad;              // out, [E, grad_width, width], or null: not needed
  int spare_multiprocessors = 0;  // as above
  bool allow_tf32 = false;
  bool add = false;  // results are added to what is there; a group without rows leaves it
};

// Column sums of every group's rows, times row_weights: the gradient of biases.
struct ExpertBiasGrad {
  DType dtype;  // of rows and results
  int64_t tokens, num_shared, num_experts, slots, width;
  bool one_row_a_token;
  const void* shared_rows;
  const void* routed_rows;        // [slots, width]
  const float* row_weights;       // [S*tokens + slots], or null: ones
  const int32_t* expert_offsets;  // [E + 1], on the device
  void* shared_grad;              // out, [S, width], or null: not needed
  void* routed_grad;              // out, [E, width], or null: not needed
};

// A workspace is in bytes, aligned to 256, and for arguments with their addresses: those too choose the kernel.
int64_t expert_gemm_workspace(const ExpertGemm& args);
int expert_gemm(const ExpertGemm& args, void* workspace, Stream stream);
int64_t expert_gemm_wgrad_workspace(const ExpertGemmWgrad& args);
int expert_gemm_wgrad(const ExpertGemmWgrad& args, void* workspace, Stream stream);
// Whether `add` may be set, on the current device: there is a kernel for it, and it is taken (use_fusions).
bool expert_gemm_wgrad_adds(const ExpertGemmWgrad& args);
int64_t expert_bias_grad_workspace(const ExpertBiasGrad& args);
int expert_bias_grad(const ExpertBiasGrad& args, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace ummrm
