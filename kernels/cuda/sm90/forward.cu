// rows @ proj^T + bias on Hopper.
#include "grouped_gemm.cuh"

namespace ummrm::cuda::sm90 {

GroupedInstance forward(int tile, DType dtype) { return instance_of<RowMajor, ColumnMajor, void, true>(tile, dtype); }

}  // namespace ummrm::cuda::sm90
