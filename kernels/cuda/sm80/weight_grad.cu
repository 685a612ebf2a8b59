// grad_rows^T @ rows on Ampere, in the type of the rows or in fp32.
#include "grouped_gemm.cuh"

namespace ummrm::cuda::sm80 {

GroupedInstance weight_grad(int tile, DType dtype) { return instance_of<ColumnMajor, RowMajor, void>(tile, dtype); }
GroupedInstance weight_grad_f32(int tile, DType dtype) {
  return instance_of<ColumnMajor, RowMajor, float>(tile, dtype);
}

}  // namespace ummrm::cuda::sm80
