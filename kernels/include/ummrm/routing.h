// Routing: softmax, top-k and gate weights of every token with the layer's statistics, its backward, and the stable
// sort of slots by expert. CPU launchers take ranges of fixed-size blocks, so that a result depends on no thread count.
#pragma once

#include <cstdint>

#include "ummrm/types.h"

namespace ummrm {

enum class Gate : int8_t { shared_complement, fixed };

struct Route {
  DType dtype;         // of logits and clean_logits; "acc" below is accumulator_bytes(dtype) wide
  const void* logits;  // [tokens, experts]
  const void* clean;   // [tokens, experts] that the statistics are taken from; null: logits
  const bool* mask;    // [tokens], true = live; null: all live
  int64_t tokens, experts, top_k;
  Gate gate;
  double fixed_shared_weight;
  void* shared_weight;      // out, acc [tokens]
  void* routed_weights;     // out, acc [tokens, top_k]
  int32_t* expert_indices;  // out, [tokens, top_k]
  // Workspace: one row a block, summed in block order by route_finish.
  double* block_prob;    // [blocks, experts]
  double* block_z;       // [blocks]
  int32_t* block_count;  // [blocks, experts]
  int64_t* block_live;   // [blocks]
};

struct RouteBackward {
  DType dtype;
  const void* logits;
  const void* clean;
  const bool* mask;
  int64_t tokens, experts, top_k;
  Gate gate;
  double fixed_shared_weight;
  int64_t live_tokens;
  const int32_t* expert_indices;    // [tokens, top_k]
  const void* grad_shared_weight;   // acc [tokens]
  const void* grad_routed_weights;  // acc [tokens, top_k]
  const void* grad_mean_prob;       // acc [experts]
  const void* grad_mean_z;          // acc [1]
  void* grad_logits;                // out, dtype [tokens, experts]
  void* grad_clean;                 // out, likewise; null with clean
};

struct SortSlots {
  const int32_t* expert_indices;  // [slots], below experts; -1 = no expert
  int64_t slots, experts;
  int32_t* slot_to_sorted;  // out, [slots]
  int32_t* sorted_to_slot;  // out, [slots]
  int32_t* expert_offsets;  // out, [experts + 1]
  int64_t* block_next;      // workspace, [blocks, experts + 1]
};

namespace cpu {

inline constexpr int64_t kRouteBlock = 256;  // tokens
inline constexpr int64_t kSortBlock = 8192;  // slots

void route(const Route& args, int64_t begin_block, int64_t end_block);
// tokens_per_expert [experts]; mean_prob acc [experts]; mean_z acc [1].
void route_finish(const Route& args, int32_t* tokens_per_expert, void* mean_prob, void* mean_z);
void route_backward(const RouteBackward& args, int64_t begin_token, int64_t end_token);

// In this order.
void sort_slots_count(const SortSlots& args, int64_t begin_block, int64_t end_block);
void sort_slots_scan(const SortSlots& args);
void sort_slots_scatter(const SortSlots& args, int64_t begin_block, int64_t end_block);

}  // namespace cpu

// Up to kMaxExperts experts and kMaxTopK of them per token. The workspace pointers among the arguments are the CPU's.
namespace cuda {

inline constexpr int64_t kMaxExperts = 256, kMaxTopK = 16;

// Also what route_finish gives: tokens_per_expert [experts], mean_prob [experts], mean_z [1]; in the same launch.
int64_t route_workspace(int64_t tokens, int64_t experts);  // bytes
int route(const Route& args, int32_t* tokens_per_expert, float* mean_prob, float* mean_z, void* workspace,
          Stream stream);
// live_tokens is not read: it is the sum of tokens_per_expert over top_k, on the device.
int route_backward(const RouteBackward& args, const int32_t* tokens_per_expert, Stream stream);

// An index out of range counts as -1.
int64_t sort_slots_workspace(int64_t slots, int64_t experts);  // bytes
int sort_slots(const SortSlots& args, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace ummrm
