// Where an operator runs, and the one place that knows whether this build has CUDA kernels. An operator's function
// checks and allocates alike for all devices and is registered for each; then it launches on the tensors' own: on the
// CPU if on_host, else through on_cuda. In the tests' emulated build CPU tensors take the way of CUDA tensors, to
// kernels that the host emulator runs.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "check.h"
#include "ummrm/cuda_info.h"

#if defined(UMMRM_EMULATED)
#define UMMRM_FOR_CUDA(implement)
namespace ummrm {
inline constexpr bool kHasCuda = true;
inline bool on_host(const at::Tensor&) { return false; }
inline bool has_kernels(const at::Tensor& tensor) { return tensor.is_cpu(); }
inline int launch_on(const at::Tensor&, const auto& launch) { return launch(cuda::Stream{}); }
}  // namespace ummrm
#elif defined(UMMRM_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define UMMRM_FOR_CUDA(implement) \
  TORCH_LIBRARY_IMPL(ummrm, CUDA, library) { implement(library); }
namespace ummrm {
inline constexpr bool kHasCuda = true;
inline bool on_host(const at::Tensor& tensor) { return tensor.is_cpu(); }
inline bool has_kernels(const at::Tensor& tensor) { return tensor.is_cpu() || tensor.is_cuda(); }
inline int launch_on(const at::Tensor& tensor, const auto& launch) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  return launch(c10::cuda::getCurrentCUDAStream().stream());
}
}  // namespace ummrm
#else
#define UMMRM_FOR_CUDA(implement)
namespace ummrm {
inline constexpr bool kHasCuda = false;
inline bool on_host(const at::Tensor& tensor) { return tensor.is_cpu(); }
inline bool has_kernels(const at::Tensor& tensor) { return tensor.is_cpu(); }
}  // namespace ummrm
#endif

// UMMRM_REGISTER(m) { m.impl("op", &op); } registers kernels on every device that this build serves.
#define UMMRM_REGISTER(m)                                         \
  static void implement(torch::Library& m);                       \
  TORCH_LIBRARY_IMPL(ummrm, CPU, library) { implement(library); } \
  UMMRM_FOR_CUDA(implement)                                       \
  static void implement(torch::Library& m)

namespace ummrm {

// Calls launch(stream), which returns a cudaError_t, on the device of `tensor` and its current stream. `launch` is a
// generic lambda, `[&](auto stream)`, so that a build without CUDA never asks for the kernels that it names.
inline void on_cuda([[maybe_unused]] const Checker& check, [[maybe_unused]] const at::Tensor& tensor,
                    [[maybe_unused]] const auto& launch) {
  if constexpr (kHasCuda) {
    const int status = launch_on(tensor, launch);
    TORCH_CHECK(status == 0, "ummrm.", check.op, ": the launch failed on ", tensor.device(), ": ",
                cuda::take_error(status));
  }
}

// Device memory for a launcher's workspace, aligned to at least 256 bytes.
inline at::Tensor workspace(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

}  // namespace ummrm
