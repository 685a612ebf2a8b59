// Times every tensor-core instance of the grouped GEMM on sizes read from standard input, and those that end with more
// than storing their sums beside the kernels that these replace (`<product>_apart`); bench/tune.py runs it and keeps
// the fastest. Prints the device, then a line a measurement. Groups are of one size: the choice must not depend on
// which experts tokens chose.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "expert_tiles.h"
#include "tensor_cores.h"
#include "ummrm/activation.h"

using namespace ummrm;
using namespace ummrm::cuda;

namespace {

constexpr int kNoDevice = 3, kWarmups = 2, kRepeats = 7, kFewest = 3, kFusedTiles = 2;
constexpr float kEnoughMs = 100;  // of one instance; long products differ less from time to time

void check(int status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
  std::exit(1);
}

// bf16 of about [-1, 1), never all alike: a multiplier of zeros draws less power and runs faster than one of data.
__global__ void fill(uint16_t* to, int64_t count, unsigned seed) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    unsigned x = static_cast<unsigned>(i) * 2654435761u ^ seed;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    const float value = static_cast<float>(x >> 8) * (2.f / 16777216.f) - 1.f;
    to[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
  }
}

// What adds a product to a sum that it was not fused with.
__global__ void add(uint32_t* sum, const uint32_t* to_add, int64_t pairs) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < pairs;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const float low = __uint_as_float(sum[i] << 16) + __uint_as_float(to_add[i] << 16);
    const float high = __uint_as_float(sum[i] & 0xffff0000u) + __uint_as_float(to_add[i] & 0xffff0000u);
    sum[i] = __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
  }
}

struct Device {
  void* data = nullptr;
  explicit Device(int64_t bytes) {
    check(cudaMalloc(&data, static_cast<size_t>(bytes < 16 ? 16 : bytes)), "cudaMalloc");
  }
  Device(int64_t elements, unsigned seed) : Device(2 * elements) {
    fill<<<1024, 256>>>(static_cast<uint16_t*>(data), elements, seed);
    check(cudaGetLastError(), "fill");
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data); }
};

// The instances of an architecture, as far as this build has it.
#ifdef UMMRM_SM90
struct Sm90 {
  static constexpr int kNumber = 90, kTiles = kSm90TileCount;
  template <class Args>
  static int64_t workspace(const Args& args, const TileChoice& choice) {
    return sm90::workspace(args, choice);
  }
  static int run(const ExpertGemm& args, void* workspace, const TileChoice& choice) {
    return sm90::expert_gemm(args, choice, workspace, nullptr);
  }
  static int run(const ExpertGemmWgrad& args, void* workspace, const TileChoice& choice) {
    return sm90::expert_gemm_wgrad(args, choice, workspace, nullptr);
  }
  static int run(const ExpertGlu& args, void* workspace, const TileChoice& choice) {
    return sm90::expert_glu(args, choice, workspace, nullptr);
  }
  static int run(const ExpertGluBackward& args, void* workspace, const TileChoice& choice) {
    return sm90::expert_glu_backward(args, choice, workspace, nullptr);
  }
};
#endif
#ifdef UMMRM_SM80
struct Sm80 {
  static constexpr int kNumber = 80, kTiles = kSm80TileCount;
  template <class Args>
  static int64_t workspace(const Args& args, const TileChoice& choice) {
    return sm80::workspace(args, choice);
  }
  static int run(const ExpertGemm& args, void* workspace, const TileChoice& choice) {
    return sm80::expert_gemm(args, choice, workspace, nullptr);
  }
  static int run(const ExpertGemmWgrad& args, void* workspace, const TileChoice& choice) {
    return sm80::expert_gemm_wgrad(args, choice, workspace, nullptr);
  }
  static int run(const ExpertGlu& args, void* workspace, const TileChoice& choice) {
    return sm80::expert_glu(args, choice, workspace, nullptr);
  }
  static int run(const ExpertGluBackward& args, void* workspace, const TileChoice& choice) {
    return sm80::expert_glu_backward(args, choice, workspace, nullptr);
  }
};
#endif

struct Sizes {
  std::string product;
  int64_t tokens, num_shared, num_experts, slots, columns, other;
};

// Median milliseconds; below 0 where the instance refuses.
template <class Run>
double median_ms(const Run& run) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  float spent = 0;
  for (int i = 0; i < kWarmups + kRepeats && (spent < kEnoughMs || i < kWarmups + kFewest); ++i) {
    check(cudaEventRecord(begin), "cudaEventRecord");
    if (run() != cudaSuccess) return -1;
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "a product");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    if (i >= kWarmups) times.push_back(ms);
    spent += ms;
  }
  check(cudaEventDestroy(begin), "cudaEventDestroy");
  check(cudaEventDestroy(end), "cudaEventDestroy");
  const auto middle = times.begin() + times.size() / 2;
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

int nothing() { return cudaSuccess; }

// `after` is launched behind the product, as part of it.
template <class Arch, class Args, class After>
void measure_tiles(const Sizes& sizes, const char* suffix, int tiles, const Args& args, const After& after) {
  std::vector<int64_t> bands = {sizes.columns};
  for (const int64_t band : {1024, 2048, 4096})
    if (band < sizes.columns) bands.push_back(band);
  for (int tile = 0; tile < tiles; ++tile) {
    for (const int64_t band : bands) {
      const TileChoice choice = {tile, band};
      const Device workspace(Arch::workspace(args, choice));
      const double ms = median_ms([&] {
        const int status = Arch::run(args, workspace.data, choice);
        return status == cudaSuccess ? after() : status;
      });
      if (ms < 0) continue;
      const int64_t groups = sizes.num_shared + sizes.num_experts;
      const int64_t rows = (sizes.tokens * sizes.num_shared + sizes.slots) / groups;
      std::printf("%s%s %lld %lld %lld %d %lld %.6f\n", sizes.product.c_str(), suffix,
                  static_cast<long long>(sizes.columns), static_cast<long long>(sizes.other),
                  static_cast<long long>(rows), tile, static_cast<long long>(band), ms);
      std::fflush(stdout);
    }
  }
}

template <class Arch>
void measure(const Sizes& s) {
  const int64_t experts = s.num_shared + s.num_experts, rows = s.num_shared * s.tokens + s.slots;
  std::vector<int32_t> offsets;
  for (int64_t e = 0; e <= s.num_experts; ++e) offsets.push_back(static_cast<int32_t>(e * s.slots / s.num_experts));
  const Device device_offsets(static_cast<int64_t>(offsets.size()) * 4);
  check(cudaMemcpy(device_offsets.data, offsets.data(), offsets.size() * 4, cudaMemcpyHostToDevice), "cudaMemcpy");
  const auto* on_device = static_cast<const int32_t*>(device_offsets.data);
  const auto after = [](const Device& memory, int64_t elements) {
    return static_cast<uint16_t*>(memory.data) + elements;
  };
  if (s.product == "weight_grad" || s.product == "weight_sum") {
    const Device right(rows * s.columns, 1u), left(rows * s.other, 2u), grads(2 * experts * s.columns * s.other);
    ExpertGemmWgrad args = {DType::bf16,
                            DType::bf16,
                            s.tokens,
                            s.num_shared,
                            s.num_experts,
                            s.slots,
                            s.columns,
                            s.other,
                            false,
                            false,
                            right.data,
                            after(right, s.num_shared * s.tokens * s.columns),
                            left.data,
                            after(left, s.num_shared * s.tokens * s.other),
                            on_device,
                            grads.data,
                            after(grads, s.num_shared * s.columns * s.other)};
    if (s.product == "weight_grad") return measure_tiles<Arch>(s, "", Arch::kTiles, args, nothing);
    const int64_t each = experts * s.columns * s.other;
    const Device sums(each, 3u);
    measure_tiles<Arch>(s, "_apart", Arch::kTiles, args, [&] {
      add<<<1024, 256>>>(static_cast<uint32_t*>(sums.data), static_cast<const uint32_t*>(grads.data), each / 2);
      return static_cast<int>(cudaGetLastError());
    });
    args.add = true;
    return measure_tiles<Arch>(s, "", kFusedTiles, args, nothing);
  }
  const Device in(rows * s.other, 1u), proj(experts * s.columns * s.other, 2u), out(2 * rows * s.columns);
  ExpertGemm args = {DType::bf16,
                     s.tokens,
                     s.num_shared,
                     s.num_experts,
                     s.slots,
                     s.other,
                     s.columns,
                     s.product == "input_grad" || s.product == "glu_backward",
                     false,
                     in.data,
                     after(in, s.num_shared * s.tokens * s.other),
                     proj.data,
                     after(proj, s.num_shared * s.columns * s.other),
                     nullptr,
                     nullptr,
                     on_device,
                     out.data};
  if (s.product == "glu") {  // columns: of the pre-activation
    const Device act(rows * s.columns);
    const Activation apart = {DType::bf16, ActivationKind::silu, true, s.columns / 2, out.data, act.data};
    measure_tiles<Arch>(s, "_apart", Arch::kTiles, args, [&] { return activation(apart, rows, {}, nullptr); });
    return measure_tiles<Arch>(s, "", kFusedTiles, ExpertGlu{args, ActivationKind::silu, act.data}, nothing);
  }
  if (s.product == "glu_backward") {
    const Device pre(2 * rows * s.columns, 3u), grad_pre(4 * rows * s.columns), weighted(2 * rows * s.columns);
    const Device weights(2 * rows, 4u), dots(4 * rows);  // of what bits they happen to be
    const auto* each = static_cast<const float*>(weights.data);
    const ActivationBackward apart = {DType::bf16, ActivationKind::silu, true,          s.columns, out.data, pre.data,
                                      each,        grad_pre.data,        weighted.data, dots.data};
    measure_tiles<Arch>(s, "_apart", Arch::kTiles, args, [&] { return activation_backward(apart, rows, {}, nullptr); });
    args.out = nullptr;
    return measure_tiles<Arch>(s, "", kFusedTiles,
                               ExpertGluBackward{args, ActivationKind::silu, pre.data, each, grad_pre.data,
                                                 weighted.data, static_cast<float*>(dots.data)},
                               nothing);
  }
  measure_tiles<Arch>(s, "", Arch::kTiles, args, nothing);
}

template <class Arch>
int measure_all(const cudaDeviceProp& device) {
  std::printf("device %d %d %s\n", Arch::kNumber, device.multiProcessorCount, device.name);
  Sizes sizes;
  while (std::cin >> sizes.product >> sizes.tokens >> sizes.num_shared >> sizes.num_experts >> sizes.slots >>
         sizes.columns >> sizes.other)
    measure<Arch>(sizes);
  return 0;
}

}  // namespace

int main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "there is no GPU to measure on\n");
    return kNoDevice;
  }
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
#ifdef UMMRM_SM90
  if (device.major == 9 && device.minor == 0) return measure_all<Sm90>(device);
#endif
#ifdef UMMRM_SM80
  if (device.major >= 8) return measure_all<Sm80>(device);
#endif
  std::fprintf(stderr, "this build has no tensor-core kernels for %s\n", device.name);
  return kNoDevice;
}
