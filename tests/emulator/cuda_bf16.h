// Stands in for the toolkit's header of this name: the conversions that kernels/cuda uses, through the CPU kernels'
// own, which tests/cpp/test_numeric.cpp holds to the definition of the type.
#pragma once

#include "../../kernels/cpu/numeric.h"
#include "cuda_runtime.h"

struct __nv_bfloat162 {
  uint16_t x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {ummrm::cpu::store<ummrm::cpu::bf16>(x).bits, ummrm::cpu::store<ummrm::cpu::bf16>(y).bits};
}
