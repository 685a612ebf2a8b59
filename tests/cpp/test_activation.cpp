// activation.h against the textbook formulas in double.
#include "ummrm/activation.h"

#include "testing.h"

using namespace testing;
using ummrm::ActivationKind;

static double act(ActivationKind kind, double z) {
  const double c = std::sqrt(2 / std::acos(-1.0));
  switch (kind) {
    case ActivationKind::silu: return z / (1 + std::exp(-z));
    case ActivationKind::gelu: return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case ActivationKind::gelu_tanh: return 0.5 * z * (1 + std::tanh(c * (z + 0.044715 * z * z * z)));
    case ActivationKind::relu: return std::max(z, 0.0);
    case ActivationKind::relu2: return z > 0 ? z * z : 0;
  }
  return NAN;
}

// A central difference is enough: the tolerances below are coarser than its error of about 1e-9.
static double derivative(ActivationKind kind, double z) {
  if (kind == ActivationKind::relu) return z > 0 ? 1 : 0;
  const double h = 1e-5;
  return (act(kind, z + h) - act(kind, z - h)) / (2 * h);
}

static void compare(DType type, ActivationKind kind, bool glu, bool weighted, int64_t rows, int64_t width) {
  Random random(rows * 31 + width);
  const int64_t pre_width = glu ? 2 * width : width;
  const Array pre = random.array(type, rows * pre_width, 2), grad = random.array(type, rows * width);
  const Array weights = random.array(accumulator(type), rows);
  Array out(type, rows * width), grad_pre(type, rows * pre_width), weighted_act(type, rows * width),
      dots(accumulator(type), rows);
  const ummrm::Activation forward{type, kind, glu, width, pre.data(), out.data()};
  launch(rows, 3, [&](int64_t begin, int64_t end) { ummrm::cpu::activation(forward, begin, end); });
  const ummrm::ActivationBackward backward{type,
                                           kind,
                                           glu,
                                           width,
                                           grad.data(),
                                           pre.data(),
                                           weighted ? weights.data() : nullptr,
                                           grad_pre.data(),
                                           weighted ? weighted_act.data() : nullptr,
                                           weighted ? dots.data() : nullptr};
  launch(rows, 3, [&](int64_t begin, int64_t end) { ummrm::cpu::activation_backward(backward, begin, end); });

  const double unit = std::max(epsilon(type), type == DType::f64 ? 1e-8 : 4 * 0x1p-24);
  for (int64_t r = 0; r < rows; ++r) {
    const double w = weighted ? weights[r] : 1;
    double dot = 0, magnitude = 0;
    for (int64_t i = 0; i < width; ++i) {
      const double z = pre[r * pre_width + i], up = glu ? pre[r * pre_width + width + i] : 1, g = grad[r * width + i];
      const double a = act(kind, z) * up,
                   scale = (1 + z * z) * (1 + std::fabs(up)) * (1 + std::fabs(g)) * (1 + std::fabs(w));
      check_close(out, r * width + i, a, unit * (std::fabs(a) + 0.1 * scale), "activation");
      check_close(grad_pre, r * pre_width + i, w * g * up * derivative(kind, z), unit * scale, "grad of gate");
      if (glu) check_close(grad_pre, r * pre_width + width + i, w * g * act(kind, z), unit * scale, "grad of up");
      if (weighted) check_close(weighted_act, r * width + i, w * a, unit * scale, "weighted activation");
      dot += g * a;
      magnitude += std::fabs(g * a);
    }
    if (weighted) check_close(dots, r, dot, 64 * epsilon(accumulator(type)) * (magnitude + 1), "row dot");
  }
}

int main() {
  for (const DType type : kTypes) {
    for (const auto kind : {ActivationKind::silu, ActivationKind::gelu, ActivationKind::gelu_tanh, ActivationKind::relu,
                            ActivationKind::relu2}) {
      for (const bool glu : {true, false}) {
        for (const bool weighted : {true, false}) {
          compare(type, kind, glu, weighted, 5, 515);
          compare(type, kind, glu, weighted, 1, 1);
          compare(type, kind, glu, weighted, 0, 8);
        }
      }
    }
  }
  return finish();
}
