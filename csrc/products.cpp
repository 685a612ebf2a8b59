// See products.h. The pieces are dealt out by one counter; which thread takes which shows in no result.
#include "products.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

namespace ummrm {
namespace {

constexpr size_t kLine = 64;

struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{kLine}); }
};

// A thread's scratch, kept between calls: at most a few MB (see scratch_floats), of which new pages would cost as much
// as a small product.
float* scratch_of_thread(int64_t floats) {
  thread_local std::unique_ptr<float[], Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t{kLine})));
    size = floats;
  }
  return memory.get();
}

}  // namespace

void deal_out(int64_t count, int64_t floats, const std::function<void(int64_t, float*)>& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      float* scratch = scratch_of_thread(floats);
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) work(i, scratch);
    }
  });
}

void cut_for_threads(const cpu::Product& product, double share_of_all, std::vector<cpu::Product>* pieces) {
  constexpr double kPiecesAThread = 4;
  const int64_t threads = at::get_num_threads();
  const auto share = threads == 1 ? 1 : static_cast<int64_t>(kPiecesAThread * threads * share_of_all + 1);
  cpu::cut(product, share, pieces);
}

void multiply(const std::vector<cpu::Product>& pieces) {
  int64_t floats = 0;
  for (const auto& piece : pieces) floats = std::max(floats, cpu::scratch_floats(piece));
  deal_out(static_cast<int64_t>(pieces.size()), floats,
           [&](int64_t i, float* scratch) { cpu::multiply(pieces[i], scratch); });
}

}  // namespace ummrm
