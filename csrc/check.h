// What every operator file needs of torch: argument checks whose messages name the argument, what was expected, what
// came and the remedy; and the translation of torch's types to the kernels'. Checks of shape, dtype and device cost no
// synchronisation; checks of index values do, off the CPU, and run there only when asked for.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string>
#include <vector>

#include "ummrm/activation.h"
#include "ummrm/routing.h"
#include "ummrm/types.h"

namespace ummrm {

// The operator whose arguments are being checked, for the head of its messages.
struct Checker {
  const char* op;

  // `shape` has -1 where any size will do; `words` spells it out, as "[T, H]".
  void shape(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const char* words,
             const char* remedy) const;
  void dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected, const char* remedy) const;
  // The dtype asked for, by default that of `like`: no other than it and its accumulator's.
  at::ScalarType result(const char* name, const std::optional<at::ScalarType>& asked, const at::Tensor& like) const;
  void floating(const char* name, const at::Tensor& tensor) const;  // one of the four element types
  // int32 [size], beside `like`.
  void index(const char* name, const at::Tensor& tensor, int64_t size, const char* words, const at::Tensor& like,
             const char* like_name) const;
  void device(const char* name, const at::Tensor& tensor, const at::Tensor& like, const char* like_name) const;
  // A number of something: at least `least` and below 2^31, so that sizes made of two of them fit in 64 bits.
  void count(const char* name, int64_t value, int64_t least) const;
  // T * top_k slots: both at least 0 and 1, and their product below 2^31, which indices count in.
  void slots(const char* tokens_name, int64_t tokens, int64_t top_k) const;
  // int32 [E + 1] beside `like`, starting at 0, never falling, ending at or below `slots`. Values are read on CPU,
  // elsewhere under check_indices_on_devices.
  void offsets(const at::Tensor& expert_offsets, int64_t slots, const at::Tensor& like, const char* like_name) const;
  // Every value in [low, high). Read likewise.
  void values(const char* name, const at::Tensor& indices, int64_t low, int64_t high, const char* remedy) const;
  // `expert_indices` [T, K] that a backward was given: in [-1, experts), and -1 under a mask alone. Read likewise.
  void routed_indices(const at::Tensor& expert_indices, const std::optional<at::Tensor>& mask, int64_t experts) const;

  // That the build has kernels where `tensor` lies, as it has not for a meta tensor that has come so far.
  void served(const at::Tensor& tensor) const;
  // The kernels' name of the element type, which is one of the four, and on CUDA not float64; of a served tensor.
  DType element(const char* name, const at::Tensor& tensor) const;
  Gate gate(c10::string_view name) const;
  ActivationKind activation(c10::string_view name) const;
};

// What `activation` knows, as Python spells it.
std::vector<std::string> activation_names();

// `ummrm.check(True)`: also read index values on devices where that waits for the device.
void check_indices_on_devices(bool enabled);

// dtype of sums, statistics and gate weights.
inline at::ScalarType accumulator(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline const void* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(tensor->contiguous()) : std::nullopt;
}

// Autocast off for a scope: what is called inside has settled its dtypes.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{
      c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})};
};

// Gradients before any is known to be needed: `count` empty tensors, each its own, since results may not alias.
inline std::vector<at::Tensor> empty_grads(size_t count, const at::Tensor& like) {
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < count; ++i) grads.push_back(at::empty({0}, like.options()));
  return grads;
}

// at::parallel_for over units of about `cost` element operations each, in pieces worth a thread.
template <class Body>
void parallel_over(int64_t units, int64_t cost, const Body& body) {
  constexpr int64_t kWorth = 32768;
  at::parallel_for(0, units, std::max<int64_t>(1, kWorth / std::max<int64_t>(cost, 1)), body);
}

}  // namespace ummrm
