// grad_rows^T @ rows added to what is there on Hopper, in bf16 and fp32.
#include "fused_gemm.cuh"

namespace ummrm::cuda::sm90 {
namespace {

template <int tile, class Out>
GroupedInstance sum_of() {
  using Instance = FusedInstance<tile, ColumnMajor, RowMajor, SumEnding<Out>>;
  return {&Instance::scratch_bytes, [](const GroupedProduct& product, Stream stream) {
            return Instance::run(product, 0, {product.tables}, stream);
          }};
}

template <class Out>
GroupedInstance sum_of(int tile) {
  return tile == 0 ? sum_of<0, Out>() : sum_of<1, Out>();
}

}  // namespace

GroupedInstance weight_sum(int tile, DType) { return sum_of<bf16>(tile); }
GroupedInstance weight_sum_f32(int tile, DType) { return sum_of<float>(tile); }

}  // namespace ummrm::cuda::sm90
