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

// Per tile of the architecture's list in expert_tiles.h. All read bf16 or f16; `out` is the type of a weight gradient.
#define UMMRM_GROUPED_PRODUCTS                        \
  GroupedInstance forward(int tile, DType dtype);     \
  GroupedInstance input_grad(int tile, DType dtype);  \
  GroupedInstance weight_grad(int tile, DType dtype); \
  GroupedInstance weight_grad_f32(int tile, DType dtype);

namespace sm80 {
UMMRM_GROUPED_PRODUCTS
// Whether the build's code for Ampere runs on the current device; on Hopper, whose own serves what it can, not always.
bool has_image();
}  // namespace sm80

namespace sm90 {
UMMRM_GROUPED_PRODUCTS
}  // namespace sm90

#undef UMMRM_GROUPED_PRODUCTS

}  // namespace ummrm::cuda
