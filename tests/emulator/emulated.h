// What the tests of the CUDA kernels share: the element types that have such kernels, runs under every order of the
// schedule whose results must be equal to the bit, and arrays that start off a 16-byte boundary.
#pragma once

#include <cuda_runtime.h>

#include "testing.h"

namespace testing {

// TSan takes some hundred times as long as a plain run; it gets the small cases only, of one type, and two orders.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kSmallOnly = true;
inline constexpr DType kCudaTypes[] = {DType::bf16};
#else
inline constexpr bool kSmallOnly = false;
inline constexpr DType kCudaTypes[] = {DType::f32, DType::bf16, DType::f16};
#endif

// `run()` under every order; the first result, after checking by `same(a, b)` that they are all equal.
template <class Run, class Same>
auto under_all_orders(const char* what, const Run& run, const Same& same) {
  emulator::set_order(emulator::kOrders[0]);
  auto first = run();
  for (const auto order : emulator::kOrders) {
    if (kSmallOnly && order != emulator::Order::shuffled) continue;
    emulator::set_order(order);
    CHECK(same(first, run()), "%s depends on the order of threads (%d)", what, static_cast<int>(order));
  }
  return first;
}

// Elements at a chosen distance from a 16-byte boundary, within an allocation of exactly their size, so that ASan sees
// an access just past either end.
class Placed {
 public:
  Placed(const Array& from, bool aligned)
      : type_(from.type), size_(from.size), skip_(aligned ? 0 : ummrm::element_bytes(from.type)) {
    const auto bytes = static_cast<int64_t>(from.bytes.size());
    memory_ = static_cast<unsigned char*>(::operator new(static_cast<size_t>(skip_ + bytes), std::align_val_t{16}));
    std::memset(memory_, 0xff, static_cast<size_t>(skip_));
    if (bytes > 0) std::memcpy(memory_ + skip_, from.bytes.data(), from.bytes.size());
  }
  Placed(DType type, int64_t size, bool aligned) : Placed(Array(type, size), aligned) {}
  Placed(const Placed&) = delete;
  Placed& operator=(const Placed&) = delete;
  ~Placed() { ::operator delete(memory_, std::align_val_t{16}); }

  void* data() { return memory_ + skip_; }
  Array array() const {
    Array out(type_, size_);
    if (!out.bytes.empty()) std::memcpy(out.bytes.data(), memory_ + skip_, out.bytes.size());
    return out;
  }

 private:
  DType type_;
  int64_t size_, skip_;
  unsigned char* memory_;
};

inline void check_launch(int status, const char* what) { CHECK(status == 0, "%s returned error %d", what, status); }

}  // namespace testing
