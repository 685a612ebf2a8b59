// Element types of the kernels. Plain C++, no torch: csrc/ translates its dtypes to these.
#pragma once

#include <cstdint>

namespace ummrm {

enum class DType : int8_t { f64, f32, bf16, f16 };

// Sums, statistics and gate weights are double where the elements are, else float.
constexpr int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }
constexpr int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace ummrm
