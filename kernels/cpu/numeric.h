// Elements and elementary functions of the CPU kernels. Everything here is branch-free, inlined into the loops of the
// dispatched clones (dispatch.h) and vectorised there; std:: functions are calls and would keep a loop scalar.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "ummrm/types.h"

#if defined(__GNUC__)
#define UMMRM_INLINE inline __attribute__((always_inline))
#else
#define UMMRM_INLINE inline
#endif

namespace ummrm::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

UMMRM_INLINE double load(double x) { return x; }
UMMRM_INLINE float load(float x) { return x; }
UMMRM_INLINE float load(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

UMMRM_INLINE float load(f16 x) {
  // The exponent and mantissa shifted into place are the value times 2^-112; the product is exact, subnormals too.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // inf and NaN keep the largest exponent
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  return std::bit_cast<float>((magnitude >= 0x0f800000u ? special : finite) | sign);
}

template <class T>
UMMRM_INLINE T store(Accumulator<T> x);

template <>
UMMRM_INLINE double store<double>(double x) {
  return x;
}
template <>
UMMRM_INLINE float store<float>(float x) {
  return x;
}

// Round to nearest even; a NaN stays one (its payload could round to infinity).
template <>
UMMRM_INLINE bf16 store<bf16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
UMMRM_INLINE f16 store<f16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  // Normal: rebias the exponent (127 - 15 = 112), round the 13 lost bits to even. A carry out of the mantissa is right.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal (below 2^-14): the addition aligns the value to a spacing of 2^-24 and rounds it in hardware.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN; infinity from 65520 on
  return {static_cast<uint16_t>((magnitude >= 0x477ff000u ? large : finite) | sign)};
}

// exp to about 1 ulp. x = n ln2 + r with |r| <= ln2/2, exp(r) = 1 + r + r^2 q(r); q is a minimax fit (Remez, relative
// error of exp 3e-9). 2^n is applied in two halves, so that subnormal results and overflow to infinity are exact.
UMMRM_INLINE float exp_of(float x) {
  x = x < -104.f ? -104.f : x;  // false for NaN, which passes through
  x = x > 89.f ? 89.f : x;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln2 in two parts, the first exact in 16 bits
  float q = 0.00138131409779f;
  q = q * r + 0.00836941893593f;
  q = q * r + 0.0416684568591f;
  q = q * r + 0.166665147904f;
  q = q * r + 0.499999930504f;
  const float p = (q * r) * r + r + 1.f;
  const uint32_t k = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(magic);
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(k) >> 1);
  const float scale_a = std::bit_cast<float>((half + 127u) << 23);
  const float scale_b = std::bit_cast<float>((k - half + 127u) << 23);
  return p * scale_a * scale_b;
}
UMMRM_INLINE double exp_of(double x) { return std::exp(x); }

template <class F>
UMMRM_INLINE F sigmoid_of(F z) {
  return F(1) / (F(1) + exp_of(-z));
}

// The normal distribution function, given e = exp(-z^2/2): Phi(z) = erfc(-z/sqrt 2) / 2 and erfc(a) = exp(-a^2) g(t),
// t = 1/(1 + a/2), for a >= 0; g is a minimax fit (Remez, relative error 3.2e-8 for a <= 10; e underflows beyond).
UMMRM_INLINE float normal_cdf(float z, float e) {
  const float a = (z < 0.f ? -z : z) * 0.707106781f;
  const float t = 1.f / (1.f + 0.5f * a);
  float g = -0.0550496731558f;
  g = g * t + 0.263894696085f;
  g = g * t + -0.441458935393f;
  g = g * t + 0.221167518533f;
  g = g * t + 0.0170958221541f;
  g = g * t + 0.18124091271f;
  g = g * t + 0.249796316457f;
  g = g * t + 0.281097890136f;
  g = g * t + 0.282221433972f;
  g = g * t + -6.0138500144e-6f;
  const float tail = 0.5f * e * g;
  return z < 0.f ? tail : 1.f - tail;
}
UMMRM_INLINE double normal_cdf(double z, double) { return 0.5 * std::erfc(-z * 0.70710678118654752440); }

// Sum in a fixed order, whatever the vector width: kLanes running sums, then a tree.
inline constexpr int64_t kLanes = 32;

template <class F>
UMMRM_INLINE F lane_sum(const F* values, int64_t count) {
  F lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += values[i + l];
  }
  for (int64_t l = 0; i + l < count; ++l) lanes[l] += values[i + l];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

template <class T>
UMMRM_INLINE void load_many(const T* from, int64_t count, Accumulator<T>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}
template <class T>
UMMRM_INLINE void store_many(const Accumulator<T>* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = store<T>(from[i]);
}

}  // namespace ummrm::cpu
