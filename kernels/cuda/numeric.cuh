// Elements of the CUDA kernels: 16 bytes, or one element, to and from fp32 registers; and sums over lanes in a fixed
// order. Everything is computed in fp32; fp64 has no CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "launch.cuh"

namespace ummrm::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A 32-bit word of elements, lowest first.
template <class T>
inline constexpr int kPerWord = 4 / sizeof(T);
template <class T>
inline constexpr int kVector = 16 / sizeof(T);  // elements of the widest access

template <class T>
__device__ inline void unpack(unsigned word, float* to);
template <class T>
__device__ inline unsigned pack(const float* from);

template <>
__device__ inline void unpack<float>(unsigned word, float* to) {
  to[0] = __uint_as_float(word);
}
template <>
__device__ inline unsigned pack<float>(const float* from) {
  return __float_as_uint(from[0]);
}

template <>
__device__ inline void unpack<bf16>(unsigned word, float* to) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}
template <>
__device__ inline unsigned pack<bf16>(const float* from) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
  unsigned word;
  std::memcpy(&word, &pair, sizeof(word));
  return word;
}

template <>
__device__ inline void unpack<f16>(unsigned word, float* to) {
  __half2 pair;
  std::memcpy(&pair, &word, sizeof(word));
  const float2 values = __half22float2(pair);
  to[0] = values.x;
  to[1] = values.y;
}
template <>
__device__ inline unsigned pack<f16>(const float* from) {
  const __half2 pair = __floats2half2_rn(from[0], from[1]);
  unsigned word;
  std::memcpy(&word, &pair, sizeof(word));
  return word;
}

__device__ inline unsigned raw(float x) { return __float_as_uint(x); }
__device__ inline unsigned raw(bf16 x) { return x.bits; }
__device__ inline unsigned raw(f16 x) { return x.bits; }

// The elements of 16 bytes.
template <class T>
__device__ inline void unpack_all(const uint4& words, float (&to)[kVector<T>]) {
  unpack<T>(words.x, to);
  unpack<T>(words.y, to + kPerWord<T>);
  unpack<T>(words.z, to + 2 * kPerWord<T>);
  unpack<T>(words.w, to + 3 * kPerWord<T>);
}

template <class T>
__device__ inline uint4 pack_all(const float (&from)[kVector<T>]) {
  uint4 words;
  words.x = pack<T>(from);
  words.y = pack<T>(from + kPerWord<T>);
  words.z = pack<T>(from + 2 * kPerWord<T>);
  words.w = pack<T>(from + 3 * kPerWord<T>);
  return words;
}

// N elements from `at`: one, or kVector<T> with `at` aligned to 16 bytes.
template <int N, class T>
__device__ inline void load(const T* at, float (&to)[N]) {
  static_assert(N == 1 || N == kVector<T>);
  if constexpr (N == 1) {
    float pair[2];
    unpack<T>(raw(*at), pair);
    to[0] = pair[0];
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(at);
    unpack<T>(words.x, to);
    unpack<T>(words.y, to + kPerWord<T>);
    unpack<T>(words.z, to + 2 * kPerWord<T>);
    unpack<T>(words.w, to + 3 * kPerWord<T>);
  }
}

template <int N, class T>
__device__ inline void store(const float (&from)[N], T* at) {
  static_assert(N == 1 || N == kVector<T>);
  if constexpr (N == 1) {
    const float pair[2] = {from[0], 0.f};
    const unsigned word = pack<T>(pair);
    std::memcpy(at, &word, sizeof(T));  // little-endian: the low half is the element
  } else {
    *reinterpret_cast<uint4*>(at) = pack_all<T>(from);
  }
}

template <class T>
__device__ inline float load_one(const void* data, int64_t i) {
  float value[1];
  load<1>(static_cast<const T*>(data) + i, value);
  return value[0];
}
__device__ inline float load_one(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::f32) return load_one<float>(data, i);
  return dtype == DType::bf16 ? load_one<bf16>(data, i) : load_one<f16>(data, i);
}

template <class T>
__device__ inline void store_one(float value, void* data, int64_t i) {
  const float values[1] = {value};
  store<1>(values, static_cast<T*>(data) + i);
}
__device__ inline void store_one(DType dtype, float value, void* data, int64_t i) {
  if (dtype == DType::f32) return store_one<float>(value, data, i);
  if (dtype == DType::bf16) return store_one<bf16>(value, data, i);
  store_one<f16>(value, data, i);
}

// How functions of an element are computed. For 16-bit elements by the multiprocessor's own approximations, two ulp of
// fp32 off: a thousandth of what rounding the result costs, in a third of the instructions, which would otherwise take
// longer than the memory. Denormal numbers count as 0 there.
struct ExactMath {
  static __device__ float exp(float x) { return expf(x); }
  static __device__ float reciprocal(float x) { return 1.f / x; }
  // Of the standard normal distribution.
  static __device__ float density(float z) { return 0.39894228f * expf(-0.5f * z * z); }
  static __device__ float cumulative(float z) { return 0.5f * erfcf(-0.70710678f * z); }
};

struct FastMath {
  static __device__ float exp(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
#else
    return expf(x);
#endif
  }
  static __device__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.f / x;
#endif
  }
  static __device__ float density(float z) { return 0.39894228f * exp(-0.5f * z * z); }
  // Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: within 8e-8.
  static __device__ float cumulative(float z) {
    const float x = fabsf(z), t = reciprocal(1.f + 0.23164189f * x);
    const float series =
        t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
    const float tail = series * exp(-0.5f * z * z);
    return z < 0.f ? tail : 1.f - tail;
  }
};

template <class T>
struct MathOfType {
  using type = FastMath;
};
template <>
struct MathOfType<float> {
  using type = ExactMath;
};
template <class T>
using MathOf = typename MathOfType<T>::type;

// Over `lanes` neighbouring lanes; every lane of the warp must come, and each gets its group's result.
template <int lanes = kWarp, class T>
__device__ inline T lanes_sum(T value) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}
// The larger of two; NaN if either is, which fmaxf is not.
__device__ inline float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }
template <int lanes = kWarp>
__device__ inline float lanes_max(float value) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = max_or_nan(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// Calls body(T{}) with the element type of `dtype`; cudaErrorInvalidValue for fp64.
template <class Body>
int with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    case DType::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace ummrm::cuda
