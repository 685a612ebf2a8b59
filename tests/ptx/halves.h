// bf16 and f16 to fp32 and back, rounded to the nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

inline float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// By bits, since a compiler without the instruction calls a function: exponents move from 15 to 127 by a factor, which
// makes subnormal numbers right too.
inline float from_f16(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  bits |= (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity and NaN
  bits |= static_cast<uint32_t>(half & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const auto rounded = static_cast<_Float16>(value);
  uint16_t half;
  std::memcpy(&half, &rounded, 2);
  return half;
}

// TF32 is an fp32 whose last 13 bits nobody reads; rounded to it, ties go away from zero (PTX ISA 9.7.9.21, .rna).
inline constexpr uint32_t kTf32Unread = (1u << 13) - 1;
inline uint32_t to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + (kTf32Unread + 1) / 2 : bits) & ~kTf32Unread;
}
inline float from_tf32(uint32_t bits) {
  bits &= ~kTf32Unread;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace ptx
