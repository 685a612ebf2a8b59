// What is asked of the runtime once a device and then remembered: host time beside a launch is what a small product
// waits for.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace ummrm::cuda {

// `ask(device, &value)` returns a cudaError_t and gives a number above 0. Two threads may ask at once, for the same
// answer.
class PerDevice {
 public:
  // The number for the current device, or 0 with the error in `status`, which is asked for again next time.
  template <class Ask>
  int get(const Ask& ask, cudaError_t& status) {
    int device = 0, value = 0;
    status = cudaGetDevice(&device);
    if (status != cudaSuccess) return 0;
    const bool kept = 0 <= device && device < kKnown;
    if (kept && known_[device] != 0) return known_[device];
    status = ask(device, &value);
    if (status != cudaSuccess) return 0;
    if (kept) known_[device] = value;
    return value;
  }

  template <class Ask>
  int get(const Ask& ask) {
    cudaError_t status = cudaSuccess;
    return get(ask, status);
  }

 private:
  static constexpr int kKnown = 64;
  std::atomic<int> known_[kKnown] = {};
};

// An attribute of the current device; 0 where there is none.
template <cudaDeviceAttr attribute>
int device_attribute() {
  static PerDevice known;
  return known.get([](int device, int* value) { return cudaDeviceGetAttribute(value, attribute, device); });
}

}  // namespace ummrm::cuda
