// Element types of the kernels, and what a CUDA launcher runs on. Plain C++, without torch and without CUDA's headers:
// csrc/ translates its dtypes to these.
#pragma once

#include <cstdint>

struct CUstream_st;  // a cudaStream_t points to it

namespace ummrm {

enum class DType : int8_t { f64, f32, bf16, f16 };

// Sums, statistics and gate weights are double where the elements are, else float.
constexpr int64_t accumulator_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }
constexpr int64_t element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// CUDA launchers take device pointers, return the cudaError_t of the launch (0: well), never wait for the device, and
// serve f32, bf16 and f16. A workspace is device memory of the size that the function beside the launcher gives.
namespace cuda {
using Stream = ::CUstream_st*;
}

}  // namespace ummrm
