// What stands between tensor_cores.cu, which knows experts, and the CUTLASS instances, which know a list of problems on
// the device. A file an architecture and product defines its instances; all answer with a cudaError_t.
#pragma once

#include "expert_groups.cuh"

namespace ummrm::cuda {

struct GroupedProduct {
  GroupTables tables;
  int problems;
  bool biased;
  int sms;        // to run on
  void* scratch;  // as many bytes as the instance says, 256-aligned
};

struct GroupedInstance {
  int64_t (*scratch_bytes)(int sms);
  int (*run)(const GroupedProduct& product, Stream stream);
};

// Those with the gated activation at their end (ummrm/expert_glu.h), and those that add to what is there: bf16 alone,
// whose sums are bf16 or fp32, and the first two tiles, the small one for any other, since compiling takes long and
// none is taken before it was measured. (Ampere's weight gradients add as they are, with d for a bias, in every type:
// it has no weight_sum.) `partial_dots` is [rows, parts], parts of `part_columns` columns each.
struct GroupedGlu {
  int64_t (*scratch_bytes)(int sms);
  int (*run)(const GroupedProduct& product, const ExpertGlu& args, Stream stream);
};
struct GroupedGluBackward {
  int64_t part_columns;
  int64_t (*scratch_bytes)(int sms);
  int (*run)(const GroupedProduct& product, const ExpertGluBackward& args, float* partial_dots, int64_t parts,
             Stream stream);
};

// The activation that all of them have, as nearly every gated FFN does. Each of the others would be as many more.
inline constexpr ActivationKind kFusedKind = ActivationKind::silu;

// Per tile of the architecture's list in expert_tiles.h. All read bf16 or f16; `out` is the type of a weight gradient.
#define UMMRM_GROUPED_PRODUCTS                            \
  GroupedInstance forward(int tile, DType dtype);         \
  GroupedInstance input_grad(int tile, DType dtype);      \
  GroupedInstance weight_grad(int tile, DType dtype);     \
  GroupedInstance weight_grad_f32(int tile, DType dtype); \
  GroupedInstance weight_sum(int tile, DType dtype);      \
  GroupedInstance weight_sum_f32(int tile, DType dtype);  \
  GroupedGlu glu(int tile);                               \
  GroupedGluBackward glu_backward(int tile);

namespace sm80 {
UMMRM_GROUPED_PRODUCTS
// Whether the build's code for Ampere runs on the current device; on Hopper, whose own serves what it can, not always.
bool has_image();
}  // namespace sm80

namespace sm90 {
UMMRM_GROUPED_PRODUCTS
}  // namespace sm90

#undef UMMRM_GROUPED_PRODUCTS

// row_dots of the arguments, from its parts in their order; those of rows of no group become zero.
int sum_dots(const ExpertGluBackward& args, const float* partial_dots, int64_t parts, Stream stream);

}  // namespace ummrm::cuda
