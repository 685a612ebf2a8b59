// Stands in for the toolkit's header of this name: the conversions that kernels/cuda uses, through the CPU kernels'
// own, which tests/cpp/test_numeric.cpp holds to the definition of the type.
#pragma once

#include "../../kernels/cpu/numeric.h"
#include "cuda_runtime.h"

struct __half2 {
  uint16_t x, y;
};

inline __half2 __floats2half2_rn(float x, float y) {
  return {ummrm::cpu::store<ummrm::cpu::f16>(x).bits, ummrm::cpu::store<ummrm::cpu::f16>(y).bits};
}
inline float2 __half22float2(__half2 h) {
  return {ummrm::cpu::load(ummrm::cpu::f16{h.x}), ummrm::cpu::load(ummrm::cpu::f16{h.y})};
}
