// grad_rows^T @ rows on Hopper, in the type of the rows.
#include "grouped_gemm.cuh"

namespace ummrm::cuda::sm90 {

GroupedInstance weight_grad(int tile, DType dtype) {
  return instance_of<ColumnMajor, RowMajor, void, false>(tile, dtype);
}

}  // namespace ummrm::cuda::sm90
