// The gated activation at the end of the up-projection on Hopper.
#include "fused_gemm.cuh"

namespace ummrm::cuda::sm90 {
namespace {

template <int tile>
GroupedGlu glu_of() {
  using Instance = FusedInstance<tile, RowMajor, ColumnMajor, FusedGlu>;
  return {&Instance::scratch_bytes, [](const GroupedProduct& product, const ExpertGlu& args, Stream stream) {
            return Instance::run(product, args.product.out_width / 2, launch_of(product, args), stream);
          }};
}

}  // namespace

GroupedGlu glu(int tile) { return tile == 0 ? glu_of<0>() : glu_of<1>(); }

}  // namespace ummrm::cuda::sm90
