// The expert's nonlinearity: act(gate) * up on rows (gate | up), or act(z); and its backward, which also yields the
// gate-weighted activation (for the down projection's gradient) and <grad, A> of each row (the gate's gradient).
#pragma once

#include <cstdint>

#include "ummrm/types.h"

namespace ummrm {

enum class ActivationKind : int8_t { silu, gelu, gelu_tanh, relu, relu2 };

struct Activation {
  DType dtype;
  ActivationKind kind;
  bool glu;
  int64_t width;               // of the output; the pre-activation is twice as wide if glu
  const void* pre_activation;  // [rows, width or 2*width]
  void* out;                   // [rows, width]
};

struct ActivationBackward {
  DType dtype;
  ActivationKind kind;
  bool glu;
  int64_t width;
  const void* grad;  // [rows, width], without the gate weight
  const void* pre_activation;
  const void* row_weights;    // accumulator type [rows], or null: ones
  void* grad_pre_activation;  // out, like pre_activation
  void* weighted_activation;  // out, [rows, width]; null with row_weights
  void* row_dots;             // out, accumulator type [rows]; null with row_weights
};

namespace cpu {

void activation(const Activation& args, int64_t begin_row, int64_t end_row);
void activation_backward(const ActivationBackward& args, int64_t begin_row, int64_t end_row);

}  // namespace cpu

namespace cuda {

// The bias of the projection before the activation, where the GEMM has left it out: added in fp32 as the pre-activation
// is read, which stays as it is in memory. Rows are the combined buffer's: shared expert s, token t at s*tokens + t,
// then the sorted rows; those past expert_offsets[experts] get none.
struct RowBias {
  const void* shared;             // the pre-activation's dtype, [num_shared, its width], or null
  const void* routed;             // [experts, its width], or null
  const int32_t* expert_offsets;  // [experts + 1]
  int64_t experts, num_shared, tokens;
};

int activation(const Activation& args, int64_t rows, const RowBias& bias, Stream stream);
int activation_backward(const ActivationBackward& args, int64_t rows, const RowBias& bias, Stream stream);

}  // namespace cuda
}  // namespace ummrm
