// See product_case.h.
#include "product_case.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "expert_tiles.h"
#include "halves.h"
#include "tensor_cores.h"
#include "ummrm/expert_gemm.h"

namespace ptx {
namespace {

using ummrm::DType;
namespace cuda = ummrm::cuda;

struct Memory {  // of the device: just as many bytes, all garbage
  char* at = nullptr;
  explicit Memory(size_t bytes) { cudaMalloc(reinterpret_cast<void**>(&at), std::max<size_t>(bytes, 1)); }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(at); }
};

struct Tensor : Memory {
  DType dtype;
  Tensor(DType type, size_t count) : Memory(static_cast<size_t>(ummrm::element_bytes(type)) * count), dtype(type) {}
  // fp32 numbers are such as TF32 has, so that no result depends on how they are rounded to it.
  Tensor(DType type, size_t count, std::mt19937& random) : Tensor(type, count) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (size_t i = 0; i < count; ++i) {
      const float value = uniform(random);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      bits = to_tf32(bits);
      const uint16_t half = type == DType::bf16 ? to_bf16(value) : to_f16(value);
      if (type == DType::f32) {
        std::memcpy(at + 4 * i, &bits, 4);
      } else {
        std::memcpy(at + 2 * i, &half, 2);
      }
    }
  }
  double operator[](size_t i) const {
    if (dtype == DType::f32) {
      float value;
      std::memcpy(&value, at + 4 * i, 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, at + 2 * i, 2);
    return dtype == DType::bf16 ? from_bf16(half) : from_f16(half);
  }
  std::vector<double> doubles(size_t first, size_t count) const {
    std::vector<double> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = (*this)[first + i];
    return values;
  }
};

// Results of a product, and the double that each should be.
struct Compared {
  double tolerance;
  std::string fault;
  void check(double got, double want, const char* what, size_t row, size_t column) {
    const double error = std::fabs(got - want) / (1 + std::fabs(want));
    if (error <= tolerance || !fault.empty()) return;  // a NaN is wrong too
    char text[160];
    std::snprintf(text, sizeof text, "%s [%zu, %zu] is %.7g, should be %.7g", what, row, column, got, want);
    fault = text;
  }
};

// Twice the rounding of a result; sums of a few hundred products in fp32 add little to that.
double tolerance_of(DType type) { return type == DType::bf16 ? 0x1p-7 : type == DType::f16 ? 0x1p-10 : 1e-5; }

struct Offsets : Memory {
  Offsets(const Case& which) : Memory(4 * (which.counts.size() + 1)) {
    int32_t* to = data();
    to[0] = 0;
    for (size_t e = 0; e < which.counts.size(); ++e) to[e + 1] = to[e] + which.counts[e];
  }
  int32_t* data() const { return reinterpret_cast<int32_t*>(at); }
};

template <class Args, class Run>
int run(int arch, const Args& args, const cuda::TileChoice& choice, const Run& run_on) {
  int64_t bytes = 0;
#ifdef UMMRM_SM80
  if (arch == 80) bytes = cuda::sm80::workspace(args, choice);
#endif
#ifdef UMMRM_SM90
  if (arch == 90) bytes = cuda::sm90::workspace(args, choice);
#endif
  static_cast<void>(arch);
  const Memory workspace(static_cast<size_t>(bytes));
  handed.workspace = workspace.at;
  handed.workspace_bytes = static_cast<size_t>(bytes);
  return run_on(workspace.at);
}

int launch_gemm(int arch, const cuda::ExpertGemm& args, const cuda::TileChoice& choice) {
  return run(arch, args, choice, [&](void* workspace) {
#ifdef UMMRM_SM80
    if (arch == 80) return cuda::sm80::expert_gemm(args, choice, workspace, nullptr);
#endif
#ifdef UMMRM_SM90
    if (arch == 90) return cuda::sm90::expert_gemm(args, choice, workspace, nullptr);
#endif
    static_cast<void>(workspace);
    return static_cast<int>(cudaErrorNoKernelImageForDevice);
  });
}

int launch_wgrad(int arch, const cuda::ExpertGemmWgrad& args, const cuda::TileChoice& choice) {
  return run(arch, args, choice, [&](void* workspace) {
#ifdef UMMRM_SM80
    if (arch == 80) return cuda::sm80::expert_gemm_wgrad(args, choice, workspace, nullptr);
#endif
#ifdef UMMRM_SM90
    if (arch == 90) return cuda::sm90::expert_gemm_wgrad(args, choice, workspace, nullptr);
#endif
    static_cast<void>(workspace);
    return static_cast<int>(cudaErrorNoKernelImageForDevice);
  });
}

// Rows of both kinds: rows @ proj^T + bias, or rows @ proj.
std::string rows_fault(int arch, int tile, bool transposed, const Case& which) {
  std::mt19937 random(7);
  const DType type = which.dtype;
  const size_t experts = which.counts.size(), shared = static_cast<size_t>(which.shared),
               tokens = static_cast<size_t>(which.tokens);
  const Offsets offsets(which);
  const size_t slots = static_cast<size_t>(offsets.data()[experts] + which.dead), rows = shared * tokens + slots;
  const size_t in = static_cast<size_t>(transposed ? which.out : which.in),
               out = static_cast<size_t>(transposed ? which.in : which.out);
  const Tensor shared_rows(type, tokens * in, random), routed_rows(type, slots * in, random);
  const Tensor shared_proj(type, shared * in * out, random), routed_proj(type, experts * in * out, random);
  const Tensor shared_bias(type, shared * out, random), routed_bias(type, experts * out, random);
  const Tensor result(type, rows * out);
  const bool bias = which.bias && !transposed, bias_of_shared = bias && which.shared != 2;  // or the routed alone
  cuda::ExpertGemm args{type,
                        which.tokens,
                        which.shared,
                        static_cast<int64_t>(experts),
                        static_cast<int64_t>(slots),
                        static_cast<int64_t>(in),
                        static_cast<int64_t>(out),
                        transposed,
                        true,
                        shared_rows.at,
                        routed_rows.at,
                        shared_proj.at,
                        routed_proj.at,
                        bias_of_shared ? shared_bias.at : nullptr,
                        bias ? routed_bias.at : nullptr,
                        offsets.data(),
                        result.at};
  args.allow_tf32 = type == DType::f32;
  const cuda::TileChoice choice{tile, which.band != 0 ? which.band : static_cast<int64_t>(out)};
  handed.bias = bias ? routed_bias.at : nullptr;
  handed.result = result.at;
  handed.rows = static_cast<int64_t>(rows), handed.in = args.in, handed.out = args.out_width, handed.band = choice.band;
  if (const int status = launch_gemm(arch, args, choice); status != 0) return "status " + std::to_string(status);

  Compared compared{tolerance_of(type), {}};
  std::vector<double> weights(in * out);
  const auto group = [&](const Tensor& from, size_t first, size_t count, const Tensor& proj, size_t expert,
                         const Tensor* add, size_t to) {
    for (size_t i = 0; i < in * out; ++i) weights[transposed ? i : i % in * out + i / in] = proj[expert * in * out + i];
    std::vector<double> sums(out);
    for (size_t row = 0; row < count; ++row) {
      for (size_t j = 0; j < out; ++j) sums[j] = add != nullptr ? (*add)[expert * out + j] : 0;
      for (size_t k = 0; k < in; ++k) {
        const double value = from[(first + row) * in + k];
        for (size_t j = 0; j < out; ++j) sums[j] += value * weights[k * out + j];
      }
      for (size_t j = 0; j < out; ++j) compared.check(result[(to + row) * out + j], sums[j], "row", to + row, j);
    }
  };
  for (size_t s = 0; s < shared; ++s)
    group(shared_rows, 0, tokens, shared_proj, s, bias_of_shared ? &shared_bias : nullptr, s * tokens);
  for (size_t e = 0; e < experts; ++e) {
    const auto first = static_cast<size_t>(offsets.data()[e]);
    group(routed_rows, first, static_cast<size_t>(which.counts[e]), routed_proj, e, bias ? &routed_bias : nullptr,
          shared * tokens + first);
  }
  for (size_t row = rows - static_cast<size_t>(which.dead); row < rows; ++row) {
    for (size_t j = 0; j < out; ++j) compared.check(result[row * out + j], 0, "dead row", row, j);
  }
  return compared.fault;
}

// Gradients of projections: grad_rows^T @ rows of every group.
std::string gradient_fault(int arch, int tile, bool wide, const Case& which) {
  std::mt19937 random(11);
  const DType type = which.dtype, result_type = wide ? DType::f32 : type;
  const size_t experts = which.counts.size(), shared = static_cast<size_t>(which.shared),
               tokens = static_cast<size_t>(which.tokens);
  const Offsets offsets(which);
  const size_t slots = static_cast<size_t>(offsets.data()[experts] + which.dead);
  const size_t width = static_cast<size_t>(which.in), grad_width = static_cast<size_t>(which.out),
               each = width * grad_width;
  const Tensor shared_rows(type, tokens * width, random), routed_rows(type, slots * width, random);
  const Tensor shared_grads(type, shared * tokens * grad_width, random), routed_grads(type, slots * grad_width, random);
  const Tensor of_shared(result_type, shared * each), of_routed(result_type, experts * each);
  cuda::ExpertGemmWgrad args{type,
                             result_type,
                             which.tokens,
                             which.shared,
                             static_cast<int64_t>(experts),
                             static_cast<int64_t>(slots),
                             static_cast<int64_t>(width),
                             static_cast<int64_t>(grad_width),
                             true,
                             false,
                             shared_rows.at,
                             routed_rows.at,
                             shared_grads.at,
                             routed_grads.at,
                             offsets.data(),
                             of_shared.at,
                             of_routed.at};
  args.allow_tf32 = type == DType::f32;
  const cuda::TileChoice choice{tile, which.band != 0 ? which.band : static_cast<int64_t>(width)};
  if (const int status = launch_wgrad(arch, args, choice); status != 0) return "status " + std::to_string(status);

  Compared compared{tolerance_of(result_type), {}};
  const auto group = [&](const Tensor& grads, const Tensor& from, size_t first, size_t first_grad, size_t count,
                         const Tensor& result, size_t expert) {
    std::vector<double> sums(each);
    for (size_t row = 0; row < count; ++row) {
      const std::vector<double> values = from.doubles((first + row) * width, width);
      for (size_t i = 0; i < grad_width; ++i) {
        const double grad = grads[(first_grad + row) * grad_width + i];
        for (size_t j = 0; j < width; ++j) sums[i * width + j] += grad * values[j];
      }
    }
    for (size_t i = 0; i < each; ++i)
      compared.check(result[expert * each + i], sums[i], "gradient", i / width, i % width);
  };
  for (size_t s = 0; s < shared; ++s) group(shared_grads, shared_rows, 0, s * tokens, tokens, of_shared, s);
  for (size_t e = 0; e < experts; ++e) {
    const auto first = static_cast<size_t>(offsets.data()[e]);
    group(routed_grads, routed_rows, first, first, static_cast<size_t>(which.counts[e]), of_routed, e);
  }
  return compared.fault;
}

}  // namespace

Handed handed;

const char* name_of(Product product) {
  constexpr const char* kNames[] = {"forward", "input_grad", "weight_grad", "weight_grad_f32"};
  return kNames[static_cast<int>(product)];
}

std::vector<Case> cases(DType dtype) {
  return {{0, 0, {130, 0, 70}, 0, 72, 128, 0, false, dtype},
          {33, 1, {0, 129, 5}, 3, 72, 136, 0, true, dtype},
          {20, 2, {0, 0, 300}, 0, 136, 264, 128, true, dtype},
          {7, 1, {0, 0, 0}, 4, 8, 8, 0, true, dtype},
          {50, 1, {1, 0, 127, 257, 128, 0, 64}, 9, 200, 520, 128, true, dtype},
          {130, 1, {300, 0, 5}, 0, 264, 136, 128, true, dtype}};
}

Case widest(DType dtype) { return {0, 0, {150, 0, 20}, 0, 264, 264, 0, true, dtype}; }

Case of_many(DType dtype) { return {8, 1, std::vector<int>(12, 1), 0, 64, 64, 0, true, dtype}; }

Case of_depth(Product product, DType dtype, int steps) {
  const int depth = 64 * steps;
  switch (product) {
    case Product::forward: return {16, 1, {40, 3}, 0, depth, 64, 0, true, dtype};
    case Product::input_grad: return {16, 1, {40, 3}, 0, 64, depth, 0, true, dtype};
    default: return {0, 0, {depth, depth}, 0, 64, 64, 0, true, dtype};  // the longest group comes first
  }
}

Case smallest(DType dtype) { return cases(dtype)[2]; }

std::string fault_of(int arch, int tile, Product product, const Case& which) {
  switch (product) {
    case Product::forward: return rows_fault(arch, tile, false, which);
    case Product::input_grad: return rows_fault(arch, tile, true, which);
    default: return gradient_fault(arch, tile, product == Product::weight_grad_f32, which);
  }
}

}  // namespace ptx
