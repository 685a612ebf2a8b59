// CUDA kernels of routing.h but the sort (routing_sort.cu). A token is served by `lanes` neighbouring lanes, lane l
// holding the experts l, l + lanes, ...: logits are read once, coalesced, and softmax and selection are exchanges among
// lanes. Statistics are summed by lane, then block, then over blocks by the block that finishes last, always in the
// same order: the cut into blocks depends on the number of tokens alone.
#include "ummrm/routing.h"

#include <climits>

#include "numeric.cuh"

namespace ummrm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kTokensPerBlock = 128;

int64_t route_blocks(int64_t tokens) { return tokens == 0 ? 1 : ceil_div(tokens, kTokensPerBlock); }

// The softmax of one token's row, spread over its lanes.
template <int lanes, int held>
struct Row {
  float x[held], p[held];
  float lse;
  bool nan;  // a NaN or +inf logit, or all -inf: all of p is NaN
  int lane, experts;

  __device__ Row(int64_t experts) : lane(threadIdx.x % lanes), experts(static_cast<int>(experts)) {}
  __device__ int expert(int i) const { return lane + i * lanes; }
  __device__ bool holds(int i) const { return expert(i) < experts; }

  // Tokens that are not live are not read; their row is zeros.
  __device__ void read(DType dtype, const void* logits, int64_t token, bool live) {
    float largest = -INFINITY, sum = 0;
    for (int i = 0; i < held; ++i) {
      x[i] = 0;
      if (live && holds(i)) x[i] = load_one(dtype, logits, token * experts + expert(i));
      if (holds(i)) largest = max_or_nan(largest, x[i]);
    }
    largest = lanes_max<lanes>(largest);
    for (int i = 0; i < held; ++i) {
      p[i] = holds(i) ? expf(x[i] - largest) : 0.f;
      sum += p[i];
    }
    sum = lanes_sum<lanes>(sum);
    nan = sum != sum;
    for (int i = 0; i < held; ++i) p[i] /= sum;
    lse = fabsf(largest) == INFINITY ? largest : largest + logf(sum);
  }

  // rank[i]: the place of expert(i) among the top_k largest logits, ties to the lower index, or -1. Logits are ranked,
  // not p, so that the choice is free of how exp rounds. A NaN row takes the experts 0 to top_k - 1.
  __device__ void select(int top_k, int (&rank)[held]) const {
    for (int i = 0; i < held; ++i) rank[i] = -1;
    for (int k = 0; k < top_k; ++k) {
      float best = -INFINITY;
      int chosen = INT_MAX;
      for (int i = 0; i < held; ++i) {
        if (holds(i) && rank[i] < 0 && (chosen == INT_MAX || x[i] > best)) {
          best = x[i];
          chosen = expert(i);
        }
      }
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
        const float value = __shfl_xor_sync(kAllLanes, best, offset);
        const int index = __shfl_xor_sync(kAllLanes, chosen, offset);
        const bool better = chosen == INT_MAX || value > best || (value == best && index < chosen);
        if (index != INT_MAX && better) {
          best = value;
          chosen = index;
        }
      }
      if (nan) chosen = k;
      for (int i = 0; i < held; ++i) {
        if (expert(i) == chosen) rank[i] = k;
      }
    }
  }
};

// Both gates: routed_j = scale * share_j, where share sums to one over the chosen experts.
template <int lanes, int held>
struct Gates {
  float top;          // the largest probability
  float share[held];  // softmax of the chosen probabilities, or they over their sum; 0 elsewhere
  float scale;        // top, or 1 - fixed_shared_weight
  float total;        // of the chosen probabilities (fixed)

  __device__ Gates(const Row<lanes, held>& row, const int (&rank)[held], Gate gate, float fixed) {
    float first = 0, sum = 0;
    for (int i = 0; i < held; ++i) first += rank[i] == 0 ? row.p[i] : 0.f;
    top = lanes_sum<lanes>(first);
    for (int i = 0; i < held; ++i) {
      share[i] = rank[i] < 0 ? 0.f : gate == Gate::fixed ? row.p[i] : expf(row.p[i] - top);
      sum += share[i];
    }
    total = lanes_sum<lanes>(sum);
    for (int i = 0; i < held; ++i) share[i] /= total;
    scale = gate == Gate::fixed ? 1.f - fixed : top;
  }
};

// The blocks' statistics, one row each, and who has come last.
struct Statistics {
  double *prob, *z;       // [blocks, experts], [blocks]
  int32_t *slots, *live;  // likewise
  unsigned* ticket;
};

Statistics statistics_in(void* workspace, int64_t tokens, int64_t experts) {
  const int64_t blocks = route_blocks(tokens);
  Statistics s;
  s.prob = static_cast<double*>(workspace);
  s.z = s.prob + blocks * experts;
  s.slots = reinterpret_cast<int32_t*>(s.z + blocks);
  s.live = s.slots + blocks * experts;
  s.ticket = reinterpret_cast<unsigned*>(s.live + blocks);
  return s;
}

struct Means {
  int32_t* tokens_per_expert;
  float *prob, *z;
};

// Sums the rows of all blocks: `width` neighbouring threads for the experts, the rest striding over blocks.
template <int width>
__device__ void finish(const Statistics& statistics, int experts, const Means& means) {
  constexpr int kStrips = kThreads / width;
  __shared__ double prob[kThreads], z[kThreads];
  __shared__ int32_t slots[kThreads], live[kThreads];
  const int self = threadIdx.x, expert = self % width, blocks = gridDim.x;
  prob[self] = z[self] = 0;
  slots[self] = live[self] = 0;
  for (int b = self; b < blocks; b += kThreads) {
    z[self] += __ldcg(statistics.z + b);
    live[self] += __ldcg(statistics.live + b);
  }
  if (expert < experts) {
#pragma unroll 4
    for (int64_t b = self / width; b < blocks; b += kStrips) {
      prob[self] += __ldcg(statistics.prob + b * experts + expert);
      slots[self] += __ldcg(statistics.slots + b * experts + expert);
    }
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (self < half) {
      z[self] += z[self + half];
      live[self] += live[self + half];
    }
    if (self < half && half >= width) {
      prob[self] += prob[self + half];
      slots[self] += slots[self + half];
    }
  }
  __syncthreads();
  const double count = live[0] > 0 ? live[0] : 1;
  if (self == 0) *means.z = static_cast<float>(z[0] / count);
  if (self < experts) {
    means.prob[self] = static_cast<float>(prob[self] / count);
    means.tokens_per_expert[self] = slots[self];
  }
}

template <int lanes, int held>
__global__ void __launch_bounds__(kThreads, kResident) route_kernel(Route args, Statistics statistics, Means means) {
  constexpr int kGroups = kThreads / lanes, kWidth = lanes * held;
  __shared__ float block_prob[kGroups][kWidth], block_z[kGroups];
  __shared__ int32_t block_slots[kGroups][kWidth], block_live[kGroups];
  const int group = threadIdx.x / lanes, top_k = static_cast<int>(args.top_k), experts = static_cast<int>(args.experts);
  const auto fixed = static_cast<float>(args.fixed_shared_weight);
  auto* shared_weight = static_cast<float*>(args.shared_weight);
  auto* routed_weights = static_cast<float*>(args.routed_weights);
  Row<lanes, held> row(args.experts);
  float sum_p[held] = {}, sum_z = 0;
  int32_t sum_slots[held] = {}, sum_live = 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock;
  const int64_t last = first + kTokensPerBlock < args.tokens ? first + kTokensPerBlock : args.tokens;
  // All lanes of a warp make every step, since they meet in shuffles.
  for (int64_t step = first; step < last; step += kGroups) {
    const int64_t token = step + group;
    const bool exists = token < last, live = exists && (args.mask == nullptr || args.mask[token]);
    int rank[held];
    row.read(args.dtype, args.logits, token, live);
    row.select(top_k, rank);
    const Gates<lanes, held> gates(row, rank, args.gate, fixed);
    if (exists && row.lane == 0) {
      shared_weight[token] = !live ? 1.f : args.gate == Gate::fixed ? fixed : 1.f - gates.top;
    }
    for (int i = 0; i < held; ++i) {
      if (!exists || rank[i] < 0) continue;
      const int64_t slot = token * top_k + rank[i];
      routed_weights[slot] = live ? gates.scale * gates.share[i] : 0.f;
      args.expert_indices[slot] = live ? row.expert(i) : -1;
      sum_slots[i] += live;
    }
    if (args.clean != nullptr) row.read(args.dtype, args.clean, token, live);
    if (!live) continue;
    for (int i = 0; i < held; ++i) sum_p[i] += row.p[i];
    sum_z += row.lse * row.lse;
    ++sum_live;
  }
  for (int i = 0; i < held; ++i) {
    block_prob[group][row.expert(i)] = sum_p[i];
    block_slots[group][row.expert(i)] = sum_slots[i];
  }
  if (row.lane == 0) {
    block_z[group] = sum_z;
    block_live[group] = sum_live;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < experts) {
    double prob = 0;
    int32_t slots = 0;
    for (int g = 0; g < kGroups; ++g) {
      prob += block_prob[g][threadIdx.x];
      slots += block_slots[g][threadIdx.x];
    }
    statistics.prob[static_cast<int64_t>(blockIdx.x) * experts + threadIdx.x] = prob;
    statistics.slots[static_cast<int64_t>(blockIdx.x) * experts + threadIdx.x] = slots;
  }
  if (threadIdx.x == 0) {
    double z = 0;
    int32_t live = 0;
    for (int g = 0; g < kGroups; ++g) {
      z += block_z[g];
      live += block_live[g];
    }
    statistics.z[blockIdx.x] = z;
    statistics.live[blockIdx.x] = live;
  }
  if (last_to_finish(statistics.ticket)) finish<kWidth>(statistics, experts, means);
}

// p * (grad_p - <grad_p, p>), the backward of softmax.
template <int lanes, int held>
__device__ void softmax_backward(const Row<lanes, held>& row, float (&grad)[held]) {
  float inner = 0;
  for (int i = 0; i < held; ++i) inner += grad[i] * row.p[i];
  inner = lanes_sum<lanes>(inner);
  for (int i = 0; i < held; ++i) grad[i] = row.p[i] * (grad[i] - inner);
}

template <int lanes, int held>
__global__ void __launch_bounds__(kThreads, kResident)
    route_backward_kernel(RouteBackward args, const int32_t* tokens_per_expert) {
  constexpr int kGroups = kThreads / lanes;
  const int top_k = static_cast<int>(args.top_k), experts = static_cast<int>(args.experts);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / lanes;
  const bool exists = token < args.tokens, live = exists && (args.mask == nullptr || args.mask[token]);
  const auto fixed = static_cast<float>(args.fixed_shared_weight);
  Row<lanes, held> row(args.experts);

  int64_t slots = 0;
  for (int i = 0; i < held; ++i) slots += row.holds(i) ? tokens_per_expert[row.expert(i)] : 0;
  slots = lanes_sum<lanes>(slots);
  const float scale = 1.f / static_cast<float>(slots > top_k ? slots / top_k : 1);

  // Each lane finds its own experts among the chosen ones.
  int rank[held];
  float g[held], inner = 0;
  for (int i = 0; i < held; ++i) {
    rank[i] = -1;
    g[i] = 0;
  }
  for (int k = 0; live && k < top_k; ++k) {
    const int chosen = args.expert_indices[token * top_k + k];
    for (int i = 0; i < held; ++i) {
      if (row.expert(i) != chosen) continue;
      rank[i] = k;
      g[i] = static_cast<const float*>(args.grad_routed_weights)[token * top_k + k];
    }
  }
  row.read(args.dtype, args.logits, token, live);
  const Gates<lanes, held> gates(row, rank, args.gate, fixed);
  for (int i = 0; i < held; ++i) inner += rank[i] < 0 ? 0.f : g[i] * gates.share[i];
  inner = lanes_sum<lanes>(inner);
  float grad[held], of_statistics[held];
  for (int i = 0; i < held; ++i) {
    grad[i] = 0;
    if (rank[i] < 0) continue;
    grad[i] = (g[i] - inner) * (args.gate == Gate::fixed ? gates.scale / gates.total : gates.scale * gates.share[i]);
    if (args.gate == Gate::shared_complement && rank[i] == 0) {
      grad[i] += inner - static_cast<const float*>(args.grad_shared_weight)[token];
    }
  }
  softmax_backward(row, grad);

  if (args.clean != nullptr) row.read(args.dtype, args.clean, token, live);
  for (int i = 0; i < held; ++i) {
    of_statistics[i] = row.holds(i) ? static_cast<const float*>(args.grad_mean_prob)[row.expert(i)] * scale : 0.f;
  }
  softmax_backward(row, of_statistics);
  const float grad_z = 2.f * scale * row.lse * *static_cast<const float*>(args.grad_mean_z);
  for (int i = 0; i < held; ++i) {
    if (!exists || !row.holds(i)) continue;
    const int64_t at = token * experts + row.expert(i);
    const float statistics = of_statistics[i] + grad_z * row.p[i];
    const float with_gates = args.clean == nullptr ? grad[i] + statistics : grad[i];
    store_one(args.dtype, live ? with_gates : 0.f, args.grad_logits, at);
    if (args.clean != nullptr) store_one(args.dtype, live ? statistics : 0.f, args.grad_clean, at);
  }
}

template <int lanes_, int held_>
struct Layout {
  static constexpr int lanes = lanes_, held = held_;
};

// Calls body with the narrowest layout that holds `experts`.
template <class Body>
int with_layout(int64_t experts, const Body& body) {
  if (experts <= 8) return body(Layout<8, 1>{});
  if (experts <= 16) return body(Layout<16, 1>{});
  if (experts <= 32) return body(Layout<32, 1>{});
  if (experts <= 64) return body(Layout<32, 2>{});
  if (experts <= 128) return body(Layout<32, 4>{});
  return body(Layout<32, 8>{});
}

bool refused(DType dtype, int64_t experts, int64_t top_k) {
  return dtype == DType::f64 || experts < 1 || experts > kMaxExperts || top_k > kMaxTopK;
}

}  // namespace

int64_t route_workspace(int64_t tokens, int64_t experts) {
  return route_blocks(tokens) * (experts + 1) * static_cast<int64_t>(sizeof(double) + sizeof(int32_t)) +
         static_cast<int64_t>(sizeof(unsigned));
}

int route(const Route& args, int32_t* tokens_per_expert, float* mean_prob, float* mean_z, void* workspace,
          Stream stream) {
  if (refused(args.dtype, args.experts, args.top_k)) return cudaErrorInvalidValue;
  const Statistics statistics = statistics_in(workspace, args.tokens, args.experts);
  const Means means{tokens_per_expert, mean_prob, mean_z};
  const int status = cudaMemsetAsync(statistics.ticket, 0, sizeof(unsigned), stream);
  if (status != cudaSuccess) return status;
  return with_layout(args.experts, [&](auto layout) {
    return launch(route_kernel<layout.lanes, layout.held>, route_blocks(args.tokens), kThreads, stream, args,
                  statistics, means);
  });
}

int route_backward(const RouteBackward& args, const int32_t* tokens_per_expert, Stream stream) {
  if (refused(args.dtype, args.experts, args.top_k)) return cudaErrorInvalidValue;
  return with_layout(args.experts, [&](auto layout) {
    const int64_t blocks = ceil_div(args.tokens, kThreads / layout.lanes);
    return launch(route_backward_kernel<layout.lanes, layout.held>, blocks, kThreads, stream, args, tokens_per_expert);
  });
}

}  // namespace ummrm::cuda
