// For launches that CUTLASS makes.
#pragma once

#include <cuda_runtime.h>

namespace ummrm::cuda {

// What is wrong with a kernel that was not launched. CUTLASS takes the runtime's error for itself; that the device has
// no image of the kernel, or that an earlier kernel broke the context, the runtime says when asked again.
inline int error_of(const void* kernel, int otherwise) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
  return status == cudaSuccess ? otherwise : status;
}

}  // namespace ummrm::cuda
