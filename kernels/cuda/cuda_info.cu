// What cuda_info.h asks for. UMMRM_CUDA_ARCHITECTURES comes from CMakeLists.txt.
#include "ummrm/cuda_info.h"

#include <cuda_runtime.h>

#define UMMRM_TEXT_OF(x) #x
#define UMMRM_TEXT(x) UMMRM_TEXT_OF(x)

namespace ummrm::cuda {

const char* architectures() { return UMMRM_CUDA_ARCHITECTURES; }

const char* compiler_version() { return UMMRM_TEXT(__CUDACC_VER_MAJOR__) "." UMMRM_TEXT(__CUDACC_VER_MINOR__); }

const char* take_error(int status) {
  (void)cudaGetLastError();
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace ummrm::cuda
