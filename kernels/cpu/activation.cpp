// CPU kernels of activation.h. The nonlinearity of a strip of a row goes into L1 buffers by one vectorised loop per
// kind; one more loop, the same for all kinds, makes every output of the strip and rounds once.
#include "ummrm/activation.h"

#include <algorithm>

#include "dispatch.h"

namespace ummrm::cpu {
namespace {

constexpr int64_t kStrip = 512;

// What a strip's last loop reads and writes comes to L1 while its nonlinearity is computed: on an AVX-512 Xeon that
// takes a strip's backward from 3.1 to 1.8 ns an element, since stores to lines far away wait for each of them.
template <class T>
UMMRM_INLINE void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}
template <class T>
UMMRM_INLINE void fetch_to_write(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(to + i, 1);
}

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

template <class Kind, class T, class F>
UMMRM_INLINE void apply(const T* z, int64_t count, F* act) {
  for (int64_t i = 0; i < count; ++i) act[i] = Kind::at(load(z[i])).act;
}

template <class Kind, class T, class F>
UMMRM_INLINE void apply(const T* z, int64_t count, F* act, F* derivative) {
  for (int64_t i = 0; i < count; ++i) {
    const Value<F> value = Kind::at(load(z[i]));
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
  const int64_t width = args.width, pre_width = args.glu ? 2 * width : width;
  F act[kStrip];
  for (int64_t row = begin; row < end; ++row) {
    const T* pre = static_cast<const T*>(args.pre_activation) + row * pre_width;
    T* out = static_cast<T*>(args.out) + row * width;
    for (int64_t column = 0; column < width; column += kStrip) {
      const int64_t count = std::min(kStrip, width - column);
      fetch(pre + width + column, args.glu ? count : 0);
      fetch_to_write(out + column, count);
      apply_kind(args.kind, pre + column, count, static_cast<F*>(act));
      if (args.glu) {
        const T* up = pre + width + column;
        for (int64_t i = 0; i < count; ++i) act[i] *= load(up[i]);
      }
      store_many(act, count, out + column);
    }
  }
}

// The products of one strip, in one pass over it: gradients, w*A, and g*A for the row's dot. Without glu `up` and
// `grad_up` are unused; without weights, weighted and product are.
template <bool glu, bool weighted, class T, class F>
UMMRM_INLINE void combine(const F* act, const F* derivative, const T* __restrict grad, const T* __restrict up, F weight,
                          int64_t count, T* __restrict grad_gate, T* __restrict grad_up, T* __restrict weighted_act,
                          F* __restrict product) {
  for (int64_t i = 0; i < count; ++i) {
    const F g = load(grad[i]), u = glu ? load(up[i]) : F(1), a = act[i] * u;
    grad_gate[i] = store<T>(weight * g * (derivative[i] * u));
    if constexpr (glu) grad_up[i] = store<T>(weight * g * act[i]);
    if constexpr (weighted) {
      weighted_act[i] = store<T>(weight * a);
      product[i] = g * a;
    }
  }
}

template <class T>
UMMRM_INLINE void activation_backward_body(const ActivationBackward& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  const int64_t width = args.width, pre_width = args.glu ? 2 * width : width;
  const auto* weights = static_cast<const F*>(args.row_weights);
  F act[kStrip], derivative[kStrip], product[kStrip];
  for (int64_t row = begin; row < end; ++row) {
    const T* pre = static_cast<const T*>(args.pre_activation) + row * pre_width;
    const T* grad = static_cast<const T*>(args.grad) + row * width;
    T* grad_pre = static_cast<T*>(args.grad_pre_activation) + row * pre_width;
    const F weight = weights == nullptr ? F(1) : weights[row];
    F dot = 0;
    for (int64_t column = 0; column < width; column += kStrip) {
      const int64_t count = std::min(kStrip, width - column);
      const T *g = grad + column, *up = pre + width + column;
      T *grad_gate = grad_pre + column, *grad_up = grad_pre + width + column;
      T* weighted = weights == nullptr ? nullptr : static_cast<T*>(args.weighted_activation) + row * width + column;
      fetch(g, count);
      fetch_to_write(grad_gate, count);
      fetch(up, args.glu ? count : 0);
      fetch_to_write(grad_up, args.glu ? count : 0);
      fetch_to_write(weighted, weights == nullptr ? 0 : count);
      apply_kind(args.kind, pre + column, count, static_cast<F*>(act), static_cast<F*>(derivative));
      if (args.glu && weights != nullptr) {
        combine<true, true>(act, derivative, g, up, weight, count, grad_gate, grad_up, weighted, product);
      } else if (args.glu) {
        combine<true, false>(act, derivative, g, up, weight, count, grad_gate, grad_up, weighted, product);
      } else if (weights != nullptr) {
        combine<false, true>(act, derivative, g, up, weight, count, grad_gate, grad_up, weighted, product);
      } else {
        combine<false, false>(act, derivative, g, up, weight, count, grad_gate, grad_up, weighted, product);
      }
      if (weights != nullptr) dot += lane_sum(product, count);
    }
    if (weights != nullptr) static_cast<F*>(args.row_dots)[row] = dot;
  }
}

}  // namespace

UMMRM_DEFINE_LAUNCHER(activation, Activation, activation_body)
UMMRM_DEFINE_LAUNCHER(activation_backward, ActivationBackward, activation_backward_body)

}  // namespace ummrm::cpu
