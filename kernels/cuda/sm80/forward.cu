// rows @ proj^T + bias, and grad_rows @ proj, on Ampere.
#include "grouped_gemm.cuh"

namespace ummrm::cuda::sm80 {

GroupedInstance forward(int tile, DType dtype) { return instance_of<RowMajor, ColumnMajor, void>(tile, dtype); }
GroupedInstance input_grad(int tile, DType dtype) { return instance_of<RowMajor, RowMajor, void>(tile, dtype); }

}  // namespace ummrm::cuda::sm80
