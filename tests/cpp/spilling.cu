// A kernel that cannot keep its values in the registers it may have: what the build must refuse, and a test of it asks
// the build for (CMakeLists.txt). Never part of a library.
__global__ void __launch_bounds__(1024) spilling(const float* in, float* out) {
  float kept[256];
#pragma unroll
  for (int i = 0; i < 256; ++i) kept[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 256; ++i) out[i * 1024 + threadIdx.x] = kept[i] * kept[255 - i] + kept[(i * 7) % 256];
}
