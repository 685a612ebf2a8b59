// CPU kernels of routing.h. Tokens are taken kTile at a time with experts outermost ([experts][kTile] scratch), so that
// softmax and selection vectorise over tokens whatever the number of experts. Statistics are summed a block of tokens
// at a time and the blocks in order, so the bits depend on no thread count.
#include "ummrm/routing.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "dispatch.h"

namespace ummrm::cpu {
namespace {

constexpr int64_t kTile = 16;

// The live tokens of one tile. Dead lanes (masked, or past the end) hold zeros as logits and are never written out.
struct Lanes {
  int64_t first, count;
  bool live[kTile];
};

UMMRM_INLINE Lanes lanes_at(const bool* mask, int64_t first, int64_t end) {
  Lanes lanes{first, std::min(kTile, end - first), {}};
  for (int64_t l = 0; l < lanes.count; ++l) lanes.live[l] = mask == nullptr || mask[first + l];
  return lanes;
}

template <class T, class F>
UMMRM_INLINE void load_rows(const void* logits, const Lanes& lanes, int64_t experts, F* x) {
  for (int64_t l = 0; l < lanes.count; ++l) {
    if (!lanes.live[l]) continue;
    const T* row = static_cast<const T*>(logits) + (lanes.first + l) * experts;
    for (int64_t e = 0; e < experts; ++e) x[e * kTile + l] = load(row[e]);
  }
}

UMMRM_INLINE void load_tile(DType, const void* logits, const Lanes& lanes, int64_t experts, double* x) {
  std::fill(x, x + experts * kTile, 0.0);
  load_rows<double>(logits, lanes, experts, x);
}

UMMRM_INLINE void load_tile(DType dtype, const void* logits, const Lanes& lanes, int64_t experts, float* x) {
  std::fill(x, x + experts * kTile, 0.f);
  if (dtype == DType::f32) return load_rows<float>(logits, lanes, experts, x);
  if (dtype == DType::bf16) return load_rows<bf16>(logits, lanes, experts, x);
  load_rows<f16>(logits, lanes, experts, x);
}

// p = softmax(x) and lse = logsumexp(x) by lane. A NaN or +inf logit, or all -inf, makes the whole row of p NaN; a NaN
// is the largest of its row, so that lse is NaN beside an infinity too.
template <class F>
UMMRM_INLINE void softmax_tile(const F* x, int64_t experts, F* p, F* lse) {
  F largest[kTile], sum[kTile];
  for (int64_t l = 0; l < kTile; ++l) {
    largest[l] = x[l];
    sum[l] = 0;
  }
  for (int64_t e = 1; e < experts; ++e) {
    for (int64_t l = 0; l < kTile; ++l) {
      const F value = x[e * kTile + l];
      largest[l] = (value > largest[l]) | (value != value) ? value : largest[l];
    }
  }
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t l = 0; l < kTile; ++l) {
      p[e * kTile + l] = exp_of(x[e * kTile + l] - largest[l]);
      sum[l] += p[e * kTile + l];
    }
  }
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t l = 0; l < kTile; ++l) p[e * kTile + l] /= sum[l];
  }
  if (lse == nullptr) return;
  for (int64_t l = 0; l < kTile; ++l) lse[l] = std::isinf(largest[l]) ? largest[l] : largest[l] + std::log(sum[l]);
}

// The top_k largest logits by lane, descending, ties to the lower index; 0..K-1 in lanes whose p is NaN.
// Ranking logits, not p, keeps the choice free of how exp rounds.
template <class F>
UMMRM_INLINE void select_tile(const F* x, const F* p, int64_t experts, int64_t top_k, int32_t* taken, int32_t* chosen) {
  for (int64_t i = 0; i < experts * kTile; ++i) taken[i] = 0;
  for (int64_t k = 0; k < top_k; ++k) {
    F best[kTile];
    int32_t index[kTile];
    for (int64_t l = 0; l < kTile; ++l) {
      best[l] = -std::numeric_limits<F>::infinity();
      index[l] = -1;
    }
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t l = 0; l < kTile; ++l) {
        const F value = x[e * kTile + l];
        const bool better = (taken[e * kTile + l] == 0) & ((index[l] < 0) | (value > best[l]));
        best[l] = better ? value : best[l];
        index[l] = better ? static_cast<int32_t>(e) : index[l];
      }
    }
    for (int64_t l = 0; l < kTile; ++l) {
      index[l] = p[l] != p[l] ? static_cast<int32_t>(k) : index[l];  // a NaN row: p is NaN throughout
      taken[index[l] * kTile + l] = 1;
      chosen[k * kTile + l] = index[l];
    }
  }
}

// q = softmax of the chosen probabilities top[K][kTile], whose first is the largest.
template <class F>
UMMRM_INLINE void softmax_of_top(const F* top, int64_t top_k, F* q) {
  F sum[kTile] = {};
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t l = 0; l < kTile; ++l) {
      q[k * kTile + l] = exp_of(top[k * kTile + l] - top[l]);
      sum[l] += q[k * kTile + l];
    }
  }
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t l = 0; l < kTile; ++l) q[k * kTile + l] /= sum[l];
  }
}

template <class F>
UMMRM_INLINE void sum_of_top(const F* top, int64_t top_k, F* sum) {
  for (int64_t l = 0; l < kTile; ++l) sum[l] = 0;
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t l = 0; l < kTile; ++l) sum[l] += top[k * kTile + l];
  }
}

template <class F>
UMMRM_INLINE void gather_top(const F* p, const int32_t* chosen, int64_t top_k, F* top) {
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t l = 0; l < kTile; ++l) top[k * kTile + l] = p[chosen[k * kTile + l] * kTile + l];
  }
}

template <class F>
UMMRM_INLINE void route_body(const Route& args, int64_t begin, int64_t end) {
  const int64_t experts = args.experts, top_k = args.top_k;
  std::vector<F> x(experts * kTile), p(experts * kTile), top(top_k * kTile), q(top_k * kTile);
  std::vector<int32_t> taken(experts * kTile), chosen(top_k * kTile);
  F lse[kTile], total[kTile];
  const F fixed = static_cast<F>(args.fixed_shared_weight);
  auto* shared_weight = static_cast<F*>(args.shared_weight);
  auto* routed_weights = static_cast<F*>(args.routed_weights);

  for (int64_t block = begin; block < end; ++block) {
    double* sum_p = args.block_prob + block * experts;
    int32_t* count = args.block_count + block * experts;
    double sum_z = 0;
    int64_t live = 0;
    std::fill(sum_p, sum_p + experts, 0.0);
    std::fill(count, count + experts, 0);
    const int64_t last = std::min((block + 1) * kRouteBlock, args.tokens);
    for (int64_t first = block * kRouteBlock; first < last; first += kTile) {
      const Lanes lanes = lanes_at(args.mask, first, last);
      load_tile(args.dtype, args.logits, lanes, experts, x.data());
      softmax_tile(x.data(), experts, p.data(), lse);
      select_tile(x.data(), p.data(), experts, top_k, taken.data(), chosen.data());
      gather_top(p.data(), chosen.data(), top_k, top.data());
      if (args.gate == Gate::shared_complement) {
        softmax_of_top(top.data(), top_k, q.data());
      } else {
        sum_of_top(top.data(), top_k, total);
      }
      for (int64_t l = 0; l < lanes.count; ++l) {
        const int64_t t = first + l;
        shared_weight[t] = !lanes.live[l] ? F(1) : args.gate == Gate::fixed ? fixed : F(1) - top[l];
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t at = k * kTile + l;
          const F weight = args.gate == Gate::fixed ? (F(1) - fixed) * top[at] / total[l] : top[l] * q[at];
          routed_weights[t * top_k + k] = lanes.live[l] ? weight : F(0);
          args.expert_indices[t * top_k + k] = lanes.live[l] ? chosen[at] : -1;
          if (lanes.live[l]) ++count[chosen[at]];
        }
      }
      if (args.clean != nullptr) {
        load_tile(args.dtype, args.clean, lanes, experts, x.data());
        softmax_tile(x.data(), experts, p.data(), lse);
      }
      for (int64_t l = 0; l < lanes.count; ++l) {
        if (!lanes.live[l]) continue;
        ++live;
        sum_z += static_cast<double>(lse[l]) * lse[l];
        for (int64_t e = 0; e < experts; ++e) sum_p[e] += p[e * kTile + l];
      }
    }
    args.block_z[block] = sum_z;
    args.block_live[block] = live;
  }
}

template <class F>
void finish(const Route& args, int32_t* tokens_per_expert, F* mean_prob, F* mean_z) {
  const int64_t blocks = (args.tokens + kRouteBlock - 1) / kRouteBlock;
  int64_t live = 0;
  double sum_z = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    live += args.block_live[b];
    sum_z += args.block_z[b];
  }
  const auto count = static_cast<double>(std::max<int64_t>(live, 1));
  *mean_z = static_cast<F>(sum_z / count);
  for (int64_t e = 0; e < args.experts; ++e) {
    double sum = 0;
    int32_t slots = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      sum += args.block_prob[b * args.experts + e];
      slots += args.block_count[b * args.experts + e];
    }
    mean_prob[e] = static_cast<F>(sum / count);
    tokens_per_expert[e] = slots;
  }
}

// grad[e] = p_e * (grad_p_e - <grad_p, p>), the backward of softmax, by lane; `grad_p` is overwritten by the result.
template <class F>
UMMRM_INLINE void softmax_backward_tile(const F* p, int64_t experts, F* grad_p) {
  F inner[kTile] = {};
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t l = 0; l < kTile; ++l) inner[l] += grad_p[e * kTile + l] * p[e * kTile + l];
  }
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t l = 0; l < kTile; ++l) grad_p[e * kTile + l] = p[e * kTile + l] * (grad_p[e * kTile + l] - inner[l]);
  }
}

template <class T, class F>
UMMRM_INLINE void store_rows(const F* grad, const Lanes& lanes, int64_t experts, void* out) {
  for (int64_t l = 0; l < lanes.count; ++l) {
    T* row = static_cast<T*>(out) + (lanes.first + l) * experts;
    for (int64_t e = 0; e < experts; ++e) row[e] = store<T>(lanes.live[l] ? grad[e * kTile + l] : F(0));
  }
}

UMMRM_INLINE void store_tile(DType, const double* grad, const Lanes& lanes, int64_t experts, void* out) {
  store_rows<double>(grad, lanes, experts, out);
}

UMMRM_INLINE void store_tile(DType dtype, const float* grad, const Lanes& lanes, int64_t experts, void* out) {
  if (dtype == DType::f32) return store_rows<float>(grad, lanes, experts, out);
  if (dtype == DType::bf16) return store_rows<bf16>(grad, lanes, experts, out);
  store_rows<f16>(grad, lanes, experts, out);
}

// grad_p[e] of the gates: nonzero for the chosen experts only. `top` holds their p; grads are read in their own layout.
template <class F>
UMMRM_INLINE void gate_backward_tile(const RouteBackward& args, const Lanes& lanes, const int32_t* chosen, const F* top,
                                     F* q, F* g, F* grad_p) {
  const int64_t top_k = args.top_k;
  const auto* grad_shared = static_cast<const F*>(args.grad_shared_weight);
  const auto* grad_routed = static_cast<const F*>(args.grad_routed_weights);
  F inner[kTile] = {}, total[kTile];
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t l = 0; l < kTile; ++l) {
      g[k * kTile + l] = l < lanes.count && lanes.live[l] ? grad_routed[(lanes.first + l) * top_k + k] : F(0);
    }
  }
  if (args.gate == Gate::shared_complement) {
    softmax_of_top(top, top_k, q);
  } else {
    sum_of_top(top, top_k, total);
    for (int64_t i = 0; i < top_k * kTile; ++i) q[i] = top[i] / total[i % kTile];
  }
  for (int64_t i = 0; i < top_k * kTile; ++i) inner[i % kTile] += g[i] * q[i];
  const F remaining = F(1) - static_cast<F>(args.fixed_shared_weight);
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t l = 0; l < lanes.count; ++l) {
      if (!lanes.live[l]) continue;
      const int64_t at = k * kTile + l;
      F grad = args.gate == Gate::shared_complement ? top[l] * q[at] * (g[at] - inner[l])
                                                    : remaining / total[l] * (g[at] - inner[l]);
      if (args.gate == Gate::shared_complement && k == 0) grad += inner[l] - grad_shared[lanes.first + l];
      grad_p[chosen[at] * kTile + l] += grad;
    }
  }
}

template <class F>
UMMRM_INLINE void route_backward_body(const RouteBackward& args, int64_t begin, int64_t end) {
  const int64_t experts = args.experts, top_k = args.top_k;
  std::vector<F> x(experts * kTile), p(experts * kTile), grad(experts * kTile), stat(experts * kTile);
  std::vector<F> top(top_k * kTile), q(top_k * kTile), g(top_k * kTile);
  std::vector<int32_t> chosen(top_k * kTile);
  F lse[kTile];
  const auto* grad_prob = static_cast<const F*>(args.grad_mean_prob);
  const F scale = F(1) / static_cast<F>(std::max<int64_t>(args.live_tokens, 1));
  const F grad_z = *static_cast<const F*>(args.grad_mean_z) * F(2) * scale;

  for (int64_t first = begin; first < end; first += kTile) {
    const Lanes lanes = lanes_at(args.mask, first, end);
    for (int64_t k = 0; k < top_k; ++k) {
      for (int64_t l = 0; l < kTile; ++l) {
        const bool live = l < lanes.count && lanes.live[l];
        chosen[k * kTile + l] = live ? args.expert_indices[(first + l) * top_k + k] : 0;
      }
    }
    load_tile(args.dtype, args.logits, lanes, experts, x.data());
    softmax_tile(x.data(), experts, p.data(), lse);
    gather_top(p.data(), chosen.data(), top_k, top.data());
    std::fill(grad.begin(), grad.end(), F(0));
    gate_backward_tile(args, lanes, chosen.data(), top.data(), q.data(), g.data(), grad.data());
    softmax_backward_tile(p.data(), experts, grad.data());

    if (args.clean != nullptr) {
      load_tile(args.dtype, args.clean, lanes, experts, x.data());
      softmax_tile(x.data(), experts, p.data(), lse);
    }
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t l = 0; l < kTile; ++l) stat[e * kTile + l] = grad_prob[e] * scale;
    }
    softmax_backward_tile(p.data(), experts, stat.data());
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t l = 0; l < kTile; ++l) stat[e * kTile + l] += grad_z * lse[l] * p[e * kTile + l];
    }
    if (args.clean != nullptr) {
      store_tile(args.dtype, stat.data(), lanes, experts, args.grad_clean);
    } else {
      for (int64_t i = 0; i < experts * kTile; ++i) grad[i] += stat[i];
    }
    store_tile(args.dtype, grad.data(), lanes, experts, args.grad_logits);
  }
}

}  // namespace

UMMRM_DEFINE_WIDE_LAUNCHER(route, Route, route_body)
UMMRM_DEFINE_WIDE_LAUNCHER(route_backward, RouteBackward, route_backward_body)

void route_finish(const Route& args, int32_t* tokens_per_expert, void* mean_prob, void* mean_z) {
  if (args.dtype == DType::f64) {
    finish(args, tokens_per_expert, static_cast<double*>(mean_prob), static_cast<double*>(mean_z));
  } else {
    finish(args, tokens_per_expert, static_cast<float*>(mean_prob), static_cast<float*>(mean_z));
  }
}

// The sort is a counting sort: slots by (expert, block), -1 as the expert after the last.

void sort_slots_count(const SortSlots& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t* count = args.block_next + block * (args.experts + 1);
    std::fill(count, count + args.experts + 1, 0);
    for (int64_t slot = block * kSortBlock; slot < std::min((block + 1) * kSortBlock, args.slots); ++slot) {
      const int64_t expert = args.expert_indices[slot];
      ++count[expert < 0 ? args.experts : expert];
    }
  }
}

void sort_slots_scan(const SortSlots& args) {
  const int64_t blocks = (args.slots + kSortBlock - 1) / kSortBlock;
  int64_t next = 0;
  for (int64_t expert = 0; expert <= args.experts; ++expert) {
    args.expert_offsets[expert] = static_cast<int32_t>(next);
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t& entry = args.block_next[block * (args.experts + 1) + expert];
      const int64_t count = entry;
      entry = next;
      next += count;
    }
  }
}

void sort_slots_scatter(const SortSlots& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int64_t* next = args.block_next + block * (args.experts + 1);
    for (int64_t slot = block * kSortBlock; slot < std::min((block + 1) * kSortBlock, args.slots); ++slot) {
      const int64_t expert = args.expert_indices[slot];
      const int64_t row = next[expert < 0 ? args.experts : expert]++;
      args.slot_to_sorted[slot] = static_cast<int32_t>(row);
      args.sorted_to_slot[row] = static_cast<int32_t>(slot);
    }
  }
}

}  // namespace ummrm::cpu
