// CPU kernels of permute.h. Memory-bound: each row is read once and each output written once; a token's sum is held in
// an L1-sized strip of columns.
#include "ummrm/permute.h"

#include <algorithm>

#include "dispatch.h"

namespace ummrm::cpu {

void permute(const Permute& args, int64_t begin, int64_t end) {
  const auto* x = static_cast<const char*>(args.x);
  auto* out = static_cast<char*>(args.out);
  for (int64_t row = begin; row < std::min(end, args.live_rows); ++row) {
    const auto* from = x + args.sorted_to_slot[row] / args.top_k * args.row_bytes;
    std::copy_n(from, args.row_bytes, out + row * args.row_bytes);
  }
  const int64_t dead = std::max(begin, args.live_rows);
  if (dead < end) std::fill_n(out + dead * args.row_bytes, (end - dead) * args.row_bytes, char{0});
}

namespace {

constexpr int64_t kStrip = 512;

template <class F>
UMMRM_INLINE F weight_or_one(const void* weights, int64_t i) {
  return weights == nullptr ? F(1) : static_cast<const F*>(weights)[i];
}

template <class F>
UMMRM_INLINE F shared_scale(const void* shared_weight, int64_t token, int64_t num_shared) {
  return shared_weight == nullptr ? F(1) : static_cast<const F*>(shared_weight)[token] / static_cast<F>(num_shared);
}

template <class T>
UMMRM_INLINE void add_scaled(const T* from, Accumulator<T> scale, int64_t count, Accumulator<T>* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += scale * load(from[i]);
}

template <class T>
UMMRM_INLINE void unpermute_body(const Unpermute& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  const auto* rows = static_cast<const T*>(args.rows);
  const T* sorted = rows + args.num_shared * args.tokens * args.hidden;
  F sum[kStrip];
  for (int64_t t = begin; t < end; ++t) {
    const F scale = shared_scale<F>(args.shared_weight, t, args.num_shared);
    T* out = static_cast<T*>(args.out) + t * args.hidden;
    for (int64_t column = 0; column < args.hidden; column += kStrip) {
      const int64_t count = std::min(kStrip, args.hidden - column);
      for (int64_t i = 0; i < count; ++i) sum[i] = 0;
      for (int64_t s = 0; s < args.num_shared; ++s) {
        add_scaled(rows + (s * args.tokens + t) * args.hidden + column, scale, count, sum);
      }
      for (int64_t slot = t * args.top_k; slot < (t + 1) * args.top_k; ++slot) {
        const int64_t row = args.slot_to_sorted[slot];
        if (row >= args.live_rows) continue;
        add_scaled(sorted + row * args.hidden + column, weight_or_one<F>(args.routed_weights, slot), count, sum);
      }
      store_many(sum, count, out + column);
    }
  }
}

// to = scale * g, and returns <g, rows> where the dot is wanted.
template <class T>
UMMRM_INLINE Accumulator<T> scaled_and_dot(const T* g, const T* rows, Accumulator<T> scale, bool dot, int64_t hidden,
                                           T* to) {
  using F = Accumulator<T>;
  F product[kStrip], total = 0;
  for (int64_t column = 0; column < hidden; column += kStrip) {
    const int64_t count = std::min(kStrip, hidden - column);
    for (int64_t i = 0; i < count; ++i) to[column + i] = store<T>(scale * load(g[column + i]));
    if (!dot) continue;
    for (int64_t i = 0; i < count; ++i) product[i] = load(g[column + i]) * load(rows[column + i]);
    total += lane_sum(product, count);
  }
  return total;
}

template <class T>
UMMRM_INLINE void unpermute_backward_body(const UnpermuteBackward& args, int64_t begin, int64_t end) {
  using F = Accumulator<T>;
  const int64_t hidden = args.hidden, first_sorted = args.num_shared * args.tokens;
  const auto* rows = static_cast<const T*>(args.rows);
  auto* grad_rows = static_cast<T*>(args.grad_rows);
  auto* grad_shared = static_cast<F*>(args.grad_shared_weight);
  auto* grad_routed = static_cast<F*>(args.grad_routed_weights);
  for (int64_t t = begin; t < end; ++t) {
    const T* g = static_cast<const T*>(args.grad_out) + t * hidden;
    const F scale = shared_scale<F>(args.shared_weight, t, args.num_shared);
    F total = 0;
    for (int64_t s = 0; s < args.num_shared; ++s) {
      const int64_t at = (s * args.tokens + t) * hidden;
      total += scaled_and_dot(g, rows + at, scale, grad_shared != nullptr, hidden, grad_rows + at);
    }
    if (grad_shared != nullptr) grad_shared[t] = args.num_shared > 0 ? total / static_cast<F>(args.num_shared) : F(0);
    for (int64_t slot = t * args.top_k; slot < (t + 1) * args.top_k; ++slot) {
      const int64_t row = args.slot_to_sorted[slot];
      const int64_t at = (first_sorted + row) * hidden;
      F dot = 0;
      if (row < args.live_rows) {
        const F weight = weight_or_one<F>(args.routed_weights, slot);
        dot = scaled_and_dot(g, rows + at, weight, grad_routed != nullptr, hidden, grad_rows + at);
      } else {
        std::fill_n(reinterpret_cast<char*>(grad_rows + at), hidden * sizeof(T), char{0});
      }
      if (grad_routed != nullptr) grad_routed[slot] = dot;
    }
  }
}

}  // namespace

UMMRM_DEFINE_LAUNCHER(unpermute, Unpermute, unpermute_body)
UMMRM_DEFINE_LAUNCHER(unpermute_backward, UnpermuteBackward, unpermute_backward_body)

int64_t first_out_of_range(const int32_t* values, int64_t begin, int64_t end, int64_t low, int64_t high) {
  for (int64_t i = begin; i < end; ++i) {
    if (values[i] < low || values[i] >= high) return i;
  }
  return -1;
}

}  // namespace ummrm::cpu
