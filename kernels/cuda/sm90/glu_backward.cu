// The gated activation's backward at the end of the down-projection's input gradient on Hopper.
#include "fused_gemm.cuh"

namespace ummrm::cuda::sm90 {
namespace {

template <int tile>
GroupedGluBackward backward_of() {
  using Instance = FusedInstance<tile, RowMajor, RowMajor, FusedGluBackward>;
  return {
      Instance::kPartColumns, &Instance::scratch_bytes,
      [](const GroupedProduct& product, const ExpertGluBackward& args, float* partial_dots, int64_t parts,
         Stream stream) { return Instance::run(product, 0, launch_of(product, args, partial_dots, parts), stream); }};
}

}  // namespace

GroupedGluBackward glu_backward(int tile) { return tile == 0 ? backward_of<0>() : backward_of<1>(); }

}  // namespace ummrm::cuda::sm90
