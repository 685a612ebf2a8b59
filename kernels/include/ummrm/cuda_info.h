// What the CUDA kernels were compiled for, and the runtime's words for its errors.
#pragma once

namespace ummrm::cuda {

// The architectures as CMake names them, separated by spaces: "80 90a-real 100a-real".
const char* architectures();

// Version of the nvcc that compiled them, as "13.0".
const char* compiler_version();

// Description of the cudaError_t that a launcher returned. The runtime forgets the error, so that whoever asks it next
// (torch, after its own launches) is not told of it a second time.
const char* take_error(int status);

}  // namespace ummrm::cuda
