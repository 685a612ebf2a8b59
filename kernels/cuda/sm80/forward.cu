// rows @ proj^T + bias, and grad_rows @ proj, on Ampere.
#include "grouped_gemm.cuh"

namespace ummrm::cuda::sm80 {

GroupedInstance forward(int tile, DType dtype) { return instance_of<RowMajor, ColumnMajor, void>(tile, dtype); }
bool has_image() {
  static PerDevice known;
  const auto ask = [](int, int* answer) {
    cudaFuncAttributes attributes;
    const auto kernel = &cutlass::Kernel<Instance<kTf32, float, RowMajor, ColumnMajor, float>::Kernel>;
    *answer = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess ? 1 : 2;
    cudaGetLastError();  // that it has none is no error
    return cudaSuccess;
  };
  return known.get(ask) == 1;
}

GroupedInstance input_grad(int tile, DType dtype) { return instance_of<RowMajor, RowMajor, void>(tile, dtype); }

}  // namespace ummrm::cuda::sm80
