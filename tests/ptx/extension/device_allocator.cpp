// Loaded before torch (LD_PRELOAD) where its CPU tensors stand in for a GPU's: they begin at multiples of 512 bytes, as
// on CUDA, and what was allocated is known to the byte, so that the machine sees what passes a tensor's end.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace {

constexpr size_t kAlignment = 512;

struct Blocks {
  std::mutex mutex;
  std::map<uint64_t, uint64_t> ends;  // begin to end
};
Blocks& blocks() {
  static auto* all = new Blocks;  // outlives whoever frees last
  return *all;
}
thread_local bool within = false;  // the table allocates and frees too

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

int posix_memalign(void** to, size_t alignment, size_t bytes) {
  static auto* real = next<int(void**, size_t, size_t)>("posix_memalign");
  const int status = real(to, alignment < kAlignment ? kAlignment : alignment, bytes);
  if (status != 0 || within) return status;
  within = true;
  {
    const std::lock_guard lock(blocks().mutex);
    const auto begin = reinterpret_cast<uint64_t>(*to);
    blocks().ends[begin] = begin + bytes;
  }
  within = false;
  return status;
}

void free(void* memory) {
  static auto* real = next<void(void*)>("free");
  const auto at = reinterpret_cast<uint64_t>(memory);
  if (memory != nullptr && at % kAlignment == 0 && !within) {
    within = true;
    {
      const std::lock_guard lock(blocks().mutex);
      blocks().ends.erase(at);
    }
    within = false;
  }
  real(memory);
}

// For the extension, which finds it by name.
bool ummrm_block_of(uint64_t at, uint64_t* begin, uint64_t* end) {
  const std::lock_guard lock(blocks().mutex);
  const auto after = blocks().ends.upper_bound(at);
  if (after == blocks().ends.begin()) return false;
  *begin = std::prev(after)->first, *end = std::prev(after)->second;
  return at < *end;
}

}  // extern "C"
