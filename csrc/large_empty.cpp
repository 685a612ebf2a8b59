// See large_empty.h. Linux alone is asked for large pages; elsewhere, and for small tensors, all of it is at::empty.
#include "large_empty.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ummrm {
namespace {

constexpr size_t kPage = size_t{2} << 20, kLeast = 2 * kPage;

size_t bytes_of(at::IntArrayRef sizes, const at::TensorOptions& options) {
  size_t bytes = options.dtype().itemsize();
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  return bytes;
}

// Whole large pages, or null where there are none to be had.
void* take_pages([[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  void* memory = std::aligned_alloc(kPage, bytes);
  if (memory != nullptr) madvise(memory, bytes, MADV_HUGEPAGE);  // refused, the pages stay small
  return memory;
#else
  return nullptr;
#endif
}

// Bytes that may be kept: a sixteenth of the machine's memory, within bounds.
size_t kept_at_most() {
  constexpr size_t kLow = size_t{256} << 20, kHigh = size_t{2} << 30;
#if defined(__linux__)
  const auto memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return std::clamp(memory / 16, kLow, kHigh);
#else
  return kLow;
#endif
}

// Blocks that no call uses at present.
class Kept {
 public:
  void* take(size_t bytes, size_t* got) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = blocks_.lower_bound(bytes);
      if (found != blocks_.end() && found->first <= 2 * bytes) {
        void* memory = found->second;
        *got = found->first;
        total_ -= *got;
        blocks_.erase(found);
        return memory;
      }
    }
    *got = bytes;
    return take_pages(bytes);
  }
  void give_back(void* memory, size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      if (total_ + bytes <= most_) {
        blocks_.emplace(bytes, memory);
        total_ += bytes;
        return;
      }
    }
    std::free(memory);
  }

 private:
  const size_t most_ = kept_at_most();
  std::mutex mutex_;
  std::multimap<size_t, void*> blocks_;
  size_t total_ = 0;
};

Kept& kept() {
  static auto* const blocks = new Kept;  // outlives every tensor
  return *blocks;
}

size_t rounded(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

bool is_large(const at::TensorOptions& options, size_t bytes) {
  // where torch fills new memory, to show what reads it too early, at::empty does
  return options.device().is_cpu() && bytes >= kLeast && !at::globalContext().deterministicAlgorithms();
}

}  // namespace

at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = bytes_of(sizes, options);
  if (void* memory = is_large(options, bytes) ? take_pages(rounded(bytes)) : nullptr) {
    return at::from_blob(
        memory, sizes, [](void* given) { std::free(given); }, options);
  }
  return at::empty(sizes, options);
}

at::Tensor workspace_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = bytes_of(sizes, options);
  size_t got = 0;
  if (void* memory = is_large(options, bytes) ? kept().take(rounded(bytes), &got) : nullptr) {
    return at::from_blob(
        memory, sizes, [got](void* given) { kept().give_back(given, got); }, options);
  }
  return at::empty(sizes, options);
}

}  // namespace ummrm
