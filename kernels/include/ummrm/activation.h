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
}  // namespace ummrm
