// CPU kernels of activation.h. A strip of a row is widened into L1 buffers, the nonlinearity runs over the buffers in
// one vectorised loop per kind, and the results are rounded once. So a kind is written once, not once per element type.
#include "ummrm/activation.h"

#include <algorithm>

#include "dispatch.h"

namespace ummrm::cpu {
namespace {

constexpr int64_t kStrip = 512;

template <class F>
struct Value {
  F act, derivative;
};

struct Silu {
  template <class F>
  static UMMRM_INLINE Value<F> at(F z) {
    const F s = sigmoid_of(z);
    return {z * s, s * (F(1) + z * (F(1) - s))};
  }
};

struct Gelu {
  template <class F>
  static UMMRM_INLINE Value<F> at(F z) {
    const F e = exp_of(F(-0.5) * z * z);
    const F cdf = normal_cdf(z, e);
    return {z * cdf, cdf + z * e * F(0.39894228040143267794)};
  }
};

// 0.5 z (1 + tanh u) = z sigmoid(2u), which needs no tanh.
struct GeluTanh {
  template <class F>
  static UMMRM_INLINE Value<F> at(F z) {
    const F c = F(0.79788456080286535588), cubic = F(0.044715);
    const F s = sigmoid_of(F(2) * c * (z + cubic * z * z * z));
    return {z * s, s + z * s * (F(1) - s) * F(2) * c * (F(1) + F(3) * cubic * z * z)};
  }
};

struct Relu {  // NaN stays NaN, as in torch
  template <class F>
  static UMMRM_INLINE Value<F> at(F z) {
    return {z < F(0) ? F(0) : z, z > F(0) ? F(1) : F(0)};
  }
};

struct Relu2 {
  template <class F>
  static UMMRM_INLINE Value<F> at(F z) {
    const F positive = z < F(0) ? F(0) : z;
    return {positive * positive, F(2) * positive};
  }
};

template <class Kind, class F>
UMMRM_INLINE void apply(const F* z, int64_t count, F* act) {
  for (int64_t i = 0; i < count; ++i) act[i] = Kind::at(z[i]).act;
}

template <class Kind, class F>
UMMRM_INLINE void apply(const F* z, int64_t count, F* act, F* derivative) {
  for (int64_t i = 0; i < count; ++i) {
    const Value<F> value = Kind::at(z[i]);
    act[i] = value.act;
    derivative[i] = value.derivative;
  }
}

template <class... Buffers>
UMMRM_INLINE void apply_kind(ActivationKind kind, Buffers... buffers) {
  switch (kind) {
    case ActivationKind::silu: return apply<Silu>(buffers...);
    case ActivationKind::gelu: return apply<Gelu>(buffers...);
    case ActivationKind::gelu_tanh: return apply<GeluTanh>(buffers...);
    case ActivationKind::relu: return apply<Relu>(buffers...);
    case ActivationKind::relu2: return apply<Relu2>(buffers...);
  }
}

template <class T>
UMMRM_INLINE void activation_body(const Activation& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  const int64_t pre_width = args.glu ? 2 * args.width : args.width;
  F z[kStrip], act[kStrip];
  for (int64_t row = begin; row < end; ++row) {
    const T* pre = static_cast<const T*>(args.pre_activation) + row * pre_width;
    T* out = static_cast<T*>(args.out) + row * args.width;
    for (int64_t column = 0; column < args.width; column += kStrip) {
      const int64_t count = std::min(kStrip, args.width - column);
      load_many(pre + column, count, z);
      apply_kind(args.kind, static_cast<const F*>(z), count, static_cast<F*>(act));
      if (args.glu) {
        const T* up = pre + args.width + column;
        for (int64_t i = 0; i < count; ++i) act[i] *= load(up[i]);
      }
      store_many(act, count, out + column);
    }
  }
}

template <class T>
UMMRM_INLINE void activation_backward_body(const ActivationBackward& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  const int64_t pre_width = args.glu ? 2 * args.width : args.width;
  const auto* weights = static_cast<const F*>(args.row_weights);
  F z[kStrip], up[kStrip], g[kStrip], act[kStrip], derivative[kStrip];
  for (int64_t row = begin; row < end; ++row) {
    const T* pre = static_cast<const T*>(args.pre_activation) + row * pre_width;
    const T* grad = static_cast<const T*>(args.grad) + row * args.width;
    T* grad_pre = static_cast<T*>(args.grad_pre_activation) + row * pre_width;
    const F weight = weights == nullptr ? F(1) : weights[row];
    F dot = 0;
    for (int64_t column = 0; column < args.width; column += kStrip) {
      const int64_t count = std::min(kStrip, args.width - column);
      load_many(pre + column, count, z);
      load_many(grad + column, count, g);
      apply_kind(args.kind, static_cast<const F*>(z), count, static_cast<F*>(act), static_cast<F*>(derivative));
      if (args.glu) {
        load_many(pre + args.width + column, count, up);
        T* grad_up = grad_pre + args.width + column;
        for (int64_t i = 0; i < count; ++i) grad_up[i] = store<T>(weight * g[i] * act[i]);
        for (int64_t i = 0; i < count; ++i) derivative[i] *= up[i];
        for (int64_t i = 0; i < count; ++i) act[i] *= up[i];
      }
      for (int64_t i = 0; i < count; ++i) grad_pre[column + i] = store<T>(weight * g[i] * derivative[i]);
      if (weights == nullptr) continue;
      T* weighted = static_cast<T*>(args.weighted_activation) + row * args.width + column;
      for (int64_t i = 0; i < count; ++i) weighted[i] = store<T>(weight * act[i]);
      for (int64_t i = 0; i < count; ++i) g[i] *= act[i];
      dot += lane_sum(g, count);
    }
    if (weights != nullptr) static_cast<F*>(args.row_dots)[row] = dot;
  }
}

}  // namespace

UMMRM_DEFINE_LAUNCHER(activation, Activation, activation_body)
UMMRM_DEFINE_LAUNCHER(activation_backward, ActivationBackward, activation_backward_body)

}  // namespace ummrm::cpu
