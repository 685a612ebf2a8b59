// The nonlinearities of activation.h and their derivatives, in fp32 registers. The kind is a branch that all threads
// take alike, once for a vector.
#pragma once

#include "numeric.cuh"
#include "ummrm/activation.h"

namespace ummrm::cuda {

struct Value {
  float act, derivative;
};

template <class Math>
__device__ inline float sigmoid(float z) {
  return Math::reciprocal(1.f + Math::exp(-z));
}

struct Silu {
  template <class Math>
  static __device__ Value at(float z) {
    const float s = sigmoid<Math>(z);
    return {z * s, s * (1.f + z * (1.f - s))};
  }
};

struct Gelu {
  template <class Math>
  static __device__ Value at(float z) {
    const float cdf = Math::cumulative(z);
    return {z * cdf, cdf + z * Math::density(z)};
  }
};

// 0.5 z (1 + tanh u) = z sigmoid(2u), which needs no tanh.
struct GeluTanh {
  template <class Math>
  static __device__ Value at(float z) {
    constexpr float c = 0.79788456f, cubic = 0.044715f;
    const float s = sigmoid<Math>(2.f * c * (z + cubic * z * z * z));
    return {z * s, s + z * s * (1.f - s) * 2.f * c * (1.f + 3.f * cubic * z * z)};
  }
};

struct Relu {  // NaN stays NaN, as in torch
  template <class Math>
  static __device__ Value at(float z) {
    return {z < 0.f ? 0.f : z, z > 0.f ? 1.f : 0.f};
  }
};

struct Relu2 {
  template <class Math>
  static __device__ Value at(float z) {
    const float positive = z < 0.f ? 0.f : z;
    return {positive * positive, 2.f * positive};
  }
};

template <class Kind, class Math, int N>
__device__ void apply(const float (&z)[N], float (&act)[N], float (&derivative)[N]) {
  for (int i = 0; i < N; ++i) {
    const Value value = Kind::template at<Math>(z[i]);
    act[i] = value.act;
    derivative[i] = value.derivative;  // dropped by the compiler where it goes unused
  }
}

template <class Math, int N>
__device__ void apply(ActivationKind kind, const float (&z)[N], float (&act)[N], float (&derivative)[N]) {
  switch (kind) {
    case ActivationKind::silu: return apply<Silu, Math>(z, act, derivative);
    case ActivationKind::gelu: return apply<Gelu, Math>(z, act, derivative);
    case ActivationKind::gelu_tanh: return apply<GeluTanh, Math>(z, act, derivative);
    case ActivationKind::relu: return apply<Relu, Math>(z, act, derivative);
    case ActivationKind::relu2: return apply<Relu2, Math>(z, act, derivative);
  }
}

}  // namespace ummrm::cuda
