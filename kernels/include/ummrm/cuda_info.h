// What the CUDA kernels were compiled for, and the runtime's words for its errors.
#pragma once

namespace ummrm::cuda {

// The architectures as CMake names them, separated by spaces: "80 90a-real 100a-real".
const char* architectures();

// Version of the nvcc that compiled them, as "13.0".
const char* compiler_version();

// Name and description of a cudaError_t.
const char* error_text(int status);

}  // namespace ummrm::cuda
