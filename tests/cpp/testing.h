// The few things the torch-free tests share: checks that count failures, random data, element types done the slow and
// obvious way (through double and ldexp, unlike the kernels), and launches over several threads.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "ummrm/types.h"

namespace testing {

inline int failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++testing::failures <= 20) {              \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

inline int finish() {
  std::printf(failures == 0 ? "passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}

using ummrm::DType;
inline constexpr DType kTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};

// Largest relative rounding error of a type.
inline double epsilon(DType type) {
  switch (type) {
    case DType::f64: return 0x1p-53;
    case DType::f32: return 0x1p-24;
    case DType::bf16: return 0x1p-8;
    case DType::f16: return 0x1p-11;
  }
  return 0;
}

// A 16-bit float with the given number of exponent and mantissa bits, by its definition.
inline double decode16(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const int exponent = (bits >> mantissa_bits) & top, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == top) return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

// The nearest such float, ties to the even mantissa; found in units of the value's own spacing.
inline uint16_t encode16(double value, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | (top << mantissa_bits) | (1 << (mantissa_bits - 1));
  const double magnitude = std::fabs(value);
  int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), 1 - bias) : 1 - bias;
  if (std::isinf(value) || exponent > bias) return sign | (top << mantissa_bits);
  // nearbyint rounds halves to even in the default mode; a carry moves into the exponent by itself.
  const auto units = static_cast<int64_t>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
  const int64_t bits = (static_cast<int64_t>(exponent + bias - 1) << mantissa_bits) + units;
  return sign | static_cast<uint16_t>(std::min<int64_t>(bits, static_cast<int64_t>(top) << mantissa_bits));
}

inline double at(DType type, const void* data, int64_t i) {
  switch (type) {
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::bf16: return decode16(static_cast<const uint16_t*>(data)[i], 8, 7);
    case DType::f16: return decode16(static_cast<const uint16_t*>(data)[i], 5, 10);
  }
  return 0;
}

inline void put(DType type, void* data, int64_t i, double value) {
  switch (type) {
    case DType::f64: static_cast<double*>(data)[i] = value; return;
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(value); return;
    case DType::bf16: static_cast<uint16_t*>(data)[i] = encode16(value, 8, 7); return;
    case DType::f16: static_cast<uint16_t*>(data)[i] = encode16(value, 5, 10); return;
  }
}

// Elements of one type, read as double. Fresh ones are poisoned with NaN, so that what a kernel leaves unwritten shows.
struct Array {
  DType type;
  int64_t size;
  std::vector<unsigned char> bytes;

  Array(DType type, int64_t size) : type(type), size(size), bytes(size * ummrm::element_bytes(type), 0xff) {}
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  double operator[](int64_t i) const { return at(type, bytes.data(), i); }
  void set(int64_t i, double value) { put(type, bytes.data(), i, value); }
  bool same_bits(const Array& other) const { return bytes == other.bytes; }
};

inline DType accumulator(DType type) { return type == DType::f64 ? DType::f64 : DType::f32; }

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }
  Array array(DType type, int64_t size, double scale = 1) {
    Array out(type, size);
    for (int64_t i = 0; i < size; ++i) out.set(i, scale * normal());
    return out;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// Exact if the tolerance is 0; else a subnormal f16, which rounds to multiples of 2^-24, is given that as well.
inline void check_close(const Array& got, int64_t i, double want, double tolerance, const char* what) {
  if (tolerance > 0 && got.type == DType::f16) tolerance += 0x1p-25;
  const bool both_nan = std::isnan(got[i]) && std::isnan(want);
  CHECK(both_nan || std::fabs(got[i] - want) <= tolerance, "%s[%lld] = %.9g, expected %.9g within %.3g (type %d)", what,
        static_cast<long long>(i), got[i], want, tolerance, static_cast<int>(got.type));
}

// body(begin, end) over [0, units) cut among threads, the way a thread pool would.
template <class Body>
void launch(int64_t units, int64_t threads, const Body& body) {
  std::vector<std::thread> pool;
  const int64_t each = (units + threads - 1) / threads;
  for (int64_t begin = 0; begin < units; begin += each) {
    pool.emplace_back([&body, begin, end = std::min(units, begin + each)] { body(begin, end); });
  }
  for (auto& thread : pool) thread.join();
}

}  // namespace testing
