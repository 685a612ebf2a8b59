// grad_rows @ proj on Hopper.
#include "grouped_gemm.cuh"

namespace ummrm::cuda::sm90 {

GroupedInstance input_grad(int tile, DType dtype) { return instance_of<RowMajor, RowMajor, void, false>(tile, dtype); }

}  // namespace ummrm::cuda::sm90
