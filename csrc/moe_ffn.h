// What the files of moe_ffn share: sizes, the gradients of gate weights, and the way of CPU tensors in fp32.
#pragma once

#include "check.h"
#include "ops.h"
#include "ummrm/activation.h"

namespace ummrm {

struct MoeSizes {
  int64_t tokens, hidden, top_k, num_shared, num_experts, pre_width, width;
  int64_t shared_rows() const { return num_shared * tokens; }
  int64_t slots() const { return tokens * top_k; }
};

// Of arguments that have been checked.
MoeSizes sizes_of(const Tensor& x, const Tensor& expert_indices, const Experts& p, bool glu);

// The sums that gradients of the projections are added to, where there are any.
struct WeightSums {
  OptionalTensor shared_up, routed_up, shared_down, routed_down;
  bool are_contiguous() const {
    const auto is = [](const OptionalTensor& sum) { return !sum.has_value() || sum->is_contiguous(); };
    return is(shared_up) && is(routed_up) && is(shared_down) && is(routed_down);
  }
};

// The routing maps of a call, as sort_slots returns them.
struct RoutingMaps {
  Tensor slot_to_sorted, sorted_to_slot, expert_offsets;
};

namespace host {

// Whether a layer of these tensors runs as one here: rows of each expert are taken through all of it a few at a time,
// so that what lies between the products stays in a core's cache. Else it is composed of operators.
bool serves(const Tensor& x);

// For backends whose operators the composition has to follow.
void use(bool enabled);

// The combined rows before unpermute, and the pre-activation if `keep`, else undefined.
Tensor2 forward(const Tensor& x, const Experts& p, const RoutingMaps& maps, const MoeSizes& n, ActivationKind kind,
                bool glu, bool keep);

struct Wanted {
  bool rows, shared_up, routed_up, shared_down, routed_down;
};

struct Gradients {
  Tensor rows;                                            // of x's rows, before unpermute; undefined if not wanted
  Tensor dots;                                            // [S*T + T*K], <gradient, activation> of each row
  Tensor pre_activation;                                  // [S*T + T*K, 2*I or I]
  Tensor shared_up, routed_up, shared_down, routed_down;  // undefined where not wanted, or added to a sum
};

Gradients backward(const Tensor& grad_out, const Tensor& x, const Experts& p, const RoutingMaps& maps,
                   const Tensor& pre_activation, const Tensor& row_weights, const MoeSizes& n, ActivationKind kind,
                   bool glu, const Wanted& wanted, const WeightSums& sums);

}  // namespace host
}  // namespace ummrm
