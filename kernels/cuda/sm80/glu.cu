// The gated activation at the end of the up-projection, and its backward at that of the down-projection's, on Ampere.
#include "fused_gemm.cuh"

namespace ummrm::cuda::sm80 {
namespace {

int64_t no_scratch(int) { return 0; }

template <int tile>
GroupedGlu glu_of() {
  return {&no_scratch, [](const GroupedProduct& product, const ExpertGlu& args, Stream stream) {
            return FusedInstance<tile, cutlass::bfloat16_t, ColumnMajor, FusedGlu>::run(
                product, args.product.out_width / 2, launch_of(product, args), stream);
          }};
}

template <int tile>
GroupedGluBackward backward_of() {
  using Instance = FusedInstance<tile, cutlass::bfloat16_t, RowMajor, FusedGluBackward>;
  return {
      Instance::Kernel::kPartColumns, &no_scratch,
      [](const GroupedProduct& product, const ExpertGluBackward& args, float* partial_dots, int64_t parts,
         Stream stream) { return Instance::run(product, 0, launch_of(product, args, partial_dots, parts), stream); }};
}

}  // namespace

GroupedGlu glu(int tile) { return tile == 0 ? glu_of<0>() : glu_of<1>(); }
// The large tile alone: four warps of the small one would spill a register.
GroupedGluBackward glu_backward(int) { return backward_of<0>(); }

}  // namespace ummrm::cuda::sm80
