// Operators of the stem `activation`: activation, activation_backward.
#include "ummrm/activation.h"

#include <ATen/ops/empty_like.h>

#include "checks.h"
#include "device.h"

namespace ummrm {
namespace {

void check_pre_activation(const Checker& check, const Tensor& pre_activation, string_view kind, bool glu) {
  check.floating("pre_activation", pre_activation);
  check.shape("pre_activation", pre_activation, {-1, -1}, glu ? "[rows, 2*I]" : "[rows, I]",
              "flatten the leading dimensions first");
  TORCH_CHECK_VALUE(!glu || pre_activation.size(1) % 2 == 0, "ummrm.", check.op,
                    ": `pre_activation` must have an even width with glu=True (gate | up), got ",
                    pre_activation.size(1), "; concatenate gate and up, or pass glu=False.");
  check.activation(kind);
}

// The width of the activation, from the pre-activation's.
int64_t width_of(const Tensor& pre_activation, bool glu) { return pre_activation.size(1) / (glu ? 2 : 1); }

constexpr int64_t kCost = 8;  // element operations: an exponential and a division

}  // namespace

void checks::activation(const Tensor& pre_activation, string_view kind, bool glu) {
  check_pre_activation(Checker{"activation"}, pre_activation, kind, glu);
}

void checks::activation_backward(const Tensor& grad, const Tensor& pre_activation, const OptionalTensor& row_weights,
                                 string_view kind, bool glu) {
  const Checker check{"activation_backward"};
  check_pre_activation(check, pre_activation, kind, glu);
  const int64_t rows = pre_activation.size(0);
  check.device("grad", grad, pre_activation, "pre_activation");
  check.shape("grad", grad, {rows, width_of(pre_activation, glu)}, "[rows, I]",
              "pass the gradient of activation's result");
  check.dtype("grad", grad, pre_activation.scalar_type(), "give it the dtype of `pre_activation`");
  if (row_weights.has_value()) {
    check.device("row_weights", *row_weights, pre_activation, "pre_activation");
    check.shape("row_weights", *row_weights, {rows}, "[rows]", "give one weight a row");
    check.dtype("row_weights", *row_weights, accumulator(pre_activation),
                "gate weights stay in fp32 (fp64 for fp64 rows)");
  }
}

Tensor activation(const Tensor& pre_activation, string_view kind, bool glu) {
  checks::activation(pre_activation, kind, glu);
  const Checker check{"activation"};
  const int64_t width = width_of(pre_activation, glu);
  const ActivationKind chosen = check.activation(kind);
  const Tensor pre = pre_activation.contiguous();
  const Tensor out = at::empty({pre.size(0), width}, pre.options());
  const Activation args{
      check.element("pre_activation", pre), chosen, glu, width, pre.const_data_ptr(), out.mutable_data_ptr()};
  if (on_host(pre)) {
    parallel_over(pre.size(0), width * kCost, [&](int64_t begin, int64_t end) { cpu::activation(args, begin, end); });
  } else {
    on_cuda(check, pre, [&](auto stream) { return cuda::activation(args, pre.size(0), {}, stream); });
  }
  return out;
}

Tensor3 activation_backward(const Tensor& grad_in, const Tensor& pre_activation, const OptionalTensor& row_weights_in,
                            string_view kind, bool glu) {
  checks::activation_backward(grad_in, pre_activation, row_weights_in, kind, glu);
  const Checker check{"activation_backward"};
  const int64_t width = width_of(pre_activation, glu), rows = pre_activation.size(0);
  const ActivationKind chosen = check.activation(kind);
  const Tensor pre = pre_activation.contiguous(), grad = grad_in.contiguous();
  const OptionalTensor weights = contiguous(row_weights_in);
  const auto acc = pre.options().dtype(accumulator(pre));
  const Tensor grad_pre = at::empty_like(pre);
  const Tensor weighted = weights.has_value() ? at::empty_like(grad) : at::empty({0}, pre.options());
  const Tensor dots = at::empty({weights.has_value() ? rows : 0}, acc);
  const ActivationBackward args{check.element("pre_activation", pre),
                                chosen,
                                glu,
                                width,
                                grad.const_data_ptr(),
                                pre.const_data_ptr(),
                                data_or_null(weights),
                                grad_pre.mutable_data_ptr(),
                                weights.has_value() ? weighted.mutable_data_ptr() : nullptr,
                                weights.has_value() ? dots.mutable_data_ptr() : nullptr};
  if (on_host(pre)) {
    parallel_over(rows, width * 2 * kCost,
                  [&](int64_t begin, int64_t end) { cpu::activation_backward(args, begin, end); });
  } else {
    on_cuda(check, pre, [&](auto stream) { return cuda::activation_backward(args, rows, {}, stream); });
  }
  return {grad_pre, weighted, dots};
}

UMMRM_REGISTER(m) {
  m.impl("activation", &activation);
  m.impl("activation_backward", &activation_backward);
}

}  // namespace ummrm
