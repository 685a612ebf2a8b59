// The CUDA kernels of activation.h on the emulator, against plain loops in double, with and without biases.
#include "activation.cu"

#include "emulated.h"

using namespace testing;
using ummrm::ActivationKind;

struct Case {
  DType type;
  ActivationKind kind;
  bool glu, weighted, biased, aligned;
  int64_t tokens, num_shared, width;
  std::vector<int32_t> offsets;  // by expert, then the number of sorted rows
  int64_t experts() const { return static_cast<int64_t>(offsets.size()) - 2; }
  int64_t rows() const { return num_shared * tokens + offsets.back(); }
  int64_t pre_width() const { return glu ? 2 * width : width; }
};

struct Value {
  double act, derivative;
};

static Value at(ActivationKind kind, double z) {
  const double c = std::sqrt(2 / M_PI);
  switch (kind) {
    case ActivationKind::silu: {
      const double s = 1 / (1 + std::exp(-z));
      return {z * s, s + z * s * (1 - s)};
    }
    case ActivationKind::gelu: {
      const double cdf = 0.5 * std::erfc(-z / std::sqrt(2.0));
      return {z * cdf, cdf + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI)};
    }
    case ActivationKind::gelu_tanh: {
      const double t = std::tanh(c * (z + 0.044715 * z * z * z));
      return {0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)};
    }
    case ActivationKind::relu: return {std::fmax(z, 0), z > 0 ? 1. : 0.};
    case ActivationKind::relu2: return {z > 0 ? z * z : 0, 2 * std::fmax(z, 0)};
  }
  return {};
}

struct Results {
  Array out, grad_pre, weighted, dots;
};

static void check(const Case& c) {
  Random random(c.width * 7 + static_cast<int64_t>(c.kind));
  const int64_t rows = c.rows(), pre_width = c.pre_width(), shared_rows = c.num_shared * c.tokens;
  const Array pre = random.array(c.type, rows * pre_width, 2), grad = random.array(c.type, rows * c.width);
  const Array weights = random.array(DType::f32, rows);
  const Array shared_bias = random.array(c.type, c.num_shared * pre_width),
              routed_bias = random.array(c.type, c.experts() * pre_width);
  const auto run = [&] {
    Placed z(pre, c.aligned), g(grad, c.aligned), sb(shared_bias, c.aligned), rb(routed_bias, c.aligned);
    Placed out(c.type, rows * c.width, c.aligned), grad_pre(c.type, rows * pre_width, c.aligned),
        weighted(c.type, rows * c.width, c.aligned);
    Array dots(DType::f32, rows);
    const ummrm::cuda::RowBias bias{c.biased ? sb.data() : nullptr,
                                    c.biased ? rb.data() : nullptr,
                                    c.offsets.data(),
                                    c.experts(),
                                    c.num_shared,
                                    c.tokens};
    check_launch(ummrm::cuda::activation({c.type, c.kind, c.glu, c.width, z.data(), out.data()}, rows, bias, nullptr),
                 "activation");
    const ummrm::ActivationBackward args{c.type,
                                         c.kind,
                                         c.glu,
                                         c.width,
                                         g.data(),
                                         z.data(),
                                         c.weighted ? weights.data() : nullptr,
                                         grad_pre.data(),
                                         c.weighted ? weighted.data() : nullptr,
                                         c.weighted ? dots.data() : nullptr};
    check_launch(ummrm::cuda::activation_backward(args, rows, bias, nullptr), "activation_backward");
    return Results{out.array(), grad_pre.array(), weighted.array(), dots};
  };
  const Results got = under_all_orders("activation", run, [](const Results& a, const Results& b) {
    return a.out.same_bits(b.out) && a.grad_pre.same_bits(b.grad_pre) && a.weighted.same_bits(b.weighted) &&
           a.dots.same_bits(b.dots);
  });
  const auto biased = [&](int64_t row, int64_t column) {
    double z = pre[row * pre_width + column];
    if (!c.biased) return z;
    if (row < shared_rows) return z + shared_bias[row / c.tokens * pre_width + column];
    for (int64_t e = 0; e < c.experts(); ++e) {
      const int64_t sorted = row - shared_rows;
      if (c.offsets[e] <= sorted && sorted < c.offsets[e + 1]) z += routed_bias[e * pre_width + column];
    }
    return z;
  };
  // fp32 arithmetic on values whose parts may cancel: an absolute part beside the rounding of the result.
  const auto close = [&](const Array& array, int64_t i, double want, double size, const char* what) {
    check_close(array, i, want, 2e-6 * (1 + size) + epsilon(c.type) * std::fabs(want), what);
  };
  for (int64_t row = 0; row < rows; ++row) {
    double dot = 0, dot_size = 0;
    const double weight = c.weighted ? weights[row] : 1;
    for (int64_t i = 0; i < c.width; ++i) {
      const double z = biased(row, i), up = c.glu ? biased(row, c.width + i) : 1, g = grad[row * c.width + i];
      const Value value = at(c.kind, z);
      const double a = value.act * up, size = std::fabs(up) * (1 + z * z) * (1 + std::fabs(weight * g));
      close(got.out, row * c.width + i, a, size, "activation");
      close(got.grad_pre, row * pre_width + i, weight * g * value.derivative * up, size, "grad of gate");
      if (c.glu)
        close(got.grad_pre, row * pre_width + c.width + i, weight * g * value.act,
              (1 + z * z) * (1 + std::fabs(weight * g)), "grad of up");
      if (c.weighted) close(got.weighted, row * c.width + i, weight * a, size, "weighted activation");
      dot += g * a;
      dot_size += size;
    }
    if (c.weighted) check_close(got.dots, row, dot, 2e-6 * dot_size, "row dot");
  }
}

int main() {
  // Experts with no rows first, amid and last; all rows on one; none at all. The last entry counts dead rows too.
  const std::vector<std::vector<int32_t>> offsets{{0, 0, 2, 2, 5, 5, 7}, {0, 4, 4}, {0, 0, 0, 3}};
  for (const DType type : kCudaTypes) {
    for (const auto kind : {ActivationKind::silu, ActivationKind::gelu, ActivationKind::gelu_tanh, ActivationKind::relu,
                            ActivationKind::relu2}) {
      for (int bits = 0; bits < 16; ++bits) {
        const bool glu = bits & 1, weighted = bits & 2, biased = bits & 4, aligned = bits & 8;
        check({type, kind, glu, weighted, biased, aligned, 3, 2, aligned ? 24 : 7, offsets[bits % 3]});
        if (kind == ActivationKind::silu && !kSmallOnly)
          check({type, kind, glu, weighted, biased, aligned, 1, 1, aligned ? 2112 : 300, offsets[0]});
      }
    }
    check({type, ActivationKind::silu, true, true, false, true, 0, 1, 8, {0, 0, 0}});
    check({type, ActivationKind::silu, true, true, false, true, 1, 1, 0, {0, 2, 2}});
  }
  return finish();
}
