// See expert_products.h. The pieces are dealt out by one counter; which thread takes which shows in no result.
#include "expert_products.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

#include "large_empty.h"

namespace ummrm {
namespace {

// A thread's scratch, kept between calls, since new pages would cost as much as a small product: some MB of packed
// operands (see scratch_floats), and what the layer keeps of a piece's rows there. Large pages, since a tile's rows lie
// on more small ones than a core's first table of addresses holds.
float* scratch_of_thread(int64_t floats) {
  thread_local at::Tensor memory;
  if (!memory.defined() || memory.numel() < floats) {
    memory = at::Tensor();
    memory = large_empty({floats}, at::TensorOptions().dtype(at::kFloat));
  }
  return memory.mutable_data_ptr<float>();
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

at::Tensor host_product(const at::Tensor& rows_in, const at::Tensor& other_in, const std::string& kind) {
  const bool forward = kind == "forward", weight_grad = kind == "weight_grad";
  TORCH_CHECK_VALUE(forward || weight_grad || kind == "input_grad",
                    "`kind` must be 'forward', 'input_grad' or 'weight_grad', got '", kind, "'.");
  for (const at::Tensor* of : {&rows_in, &other_in}) {
    TORCH_CHECK_VALUE(of->is_cpu() && of->scalar_type() == at::kFloat && of->dim() == 2,
                      "`rows` and `other` must be 2-D tensors of float32 on a CPU, got ", of->toString(), " of ",
                      of->sizes(), ".");
  }
  TORCH_CHECK_VALUE(rows_in.size(weight_grad ? 0 : 1) == other_in.size(forward ? 1 : 0),
                    "`rows` and `other` must have one size in common to sum over, got ", rows_in.sizes(), " and ",
                    other_in.sizes(), " for '", kind, "'.");
  TORCH_CHECK_VALUE(cpu::has_products(), "there are no kernels of fp32 products for this processor; use torch.mm");
  const at::Tensor rows = rows_in.contiguous(), other = other_in.contiguous();
  const int64_t height = weight_grad ? other.size(1) : rows.size(0);
  const int64_t width = weight_grad ? rows.size(1) : other.size(forward ? 0 : 1);
  const at::Tensor out = at::empty({height, width}, rows.options());
  const cpu::Rows first{rows.const_data_ptr<float>(), nullptr, rows.size(1)};
  const cpu::Rows second{other.const_data_ptr<float>(), nullptr, other.size(1)};
  auto* to = out.mutable_data_ptr<float>();
  std::vector<cpu::Product> pieces;
  if (weight_grad) {
    cut_for_threads({cpu::ProductKind::weight_grad, height, width, rows.size(0), first, second, nullptr, 0, nullptr, to,
                     width, false},
                    1.0, &pieces);
  } else {
    const auto as = forward ? cpu::ProductKind::forward : cpu::ProductKind::input_grad;
    cut_for_threads({as, height, width, rows.size(1), first, {}, second.data, second.stride, nullptr, to, width, false},
                    1.0, &pieces);
  }
  multiply(pieces);
  return out;
}

}  // namespace ummrm
