// See fused_case.h.
#include "fused_case.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "expert_tiles.h"
#include "halves.h"
#include "product_case.h"
#include "tensor_cores.h"

namespace ptx {
namespace {

using namespace ummrm::cuda;
using ummrm::ActivationKind;
using ummrm::DType;

template <class T>
struct Memory {  // of the device: just as many elements, all garbage
  T* at = nullptr;
  size_t count;
  explicit Memory(size_t elements) : count(elements) {
    cudaMalloc(reinterpret_cast<void**>(&at), std::max<size_t>(elements, 1) * sizeof(T));
  }
  Memory(size_t elements, float scale, std::mt19937& random) : Memory(elements) {
    std::uniform_real_distribution<float> uniform(-scale, scale);
    for (size_t i = 0; i < count; ++i) {
      if constexpr (sizeof(T) == 2) {
        at[i] = to_bf16(uniform(random));
      } else {
        at[i] = static_cast<T>(uniform(random));
      }
    }
  }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(at); }
  double operator[](size_t i) const {
    if constexpr (sizeof(T) == 2) return from_bf16(at[i]);
    return static_cast<double>(at[i]);
  }
};
using Half = Memory<uint16_t>;
using Single = Memory<float>;

int arch, tile;  // of the run

template <class Run>
std::string run(const char* what, bool served, int64_t bytes, const Run& function) {
  if (!served) return std::string(what) + " is not served";
  Memory<char> space(static_cast<size_t>(bytes));
  handed.workspace = space.at, handed.workspace_bytes = static_cast<size_t>(bytes);
  const int status = function(space.at);
  return status == cudaSuccess ? "" : std::string(what) + " returned " + std::to_string(status);
}

// A build may have one architecture alone.
#define RUN_HERE(folder, number, function, args)                                 \
  if (arch == number)                                                            \
    return run(#function, folder::serves(args), folder::workspace(args, choice), \
               [&](void* space) { return folder::function(args, choice, space, nullptr); });
#ifdef UMMRM_SM80
#define RUN_80(function, args) RUN_HERE(sm80, 80, function, args)
#else
#define RUN_80(function, args)
#endif
#ifdef UMMRM_SM90
#define RUN_90(function, args) RUN_HERE(sm90, 90, function, args)
#else
#define RUN_90(function, args)
#endif
#define RUN(function, args, band)                              \
  [&]() -> std::string {                                       \
    const TileChoice choice = {tile, band};                    \
    RUN_80(function, args)                                     \
    RUN_90(function, args)                                     \
    return #function " was not compiled for the architecture"; \
  }()

// `tolerance` relative to 1 and the value; 0: the same bits, but for the sign of zero.
template <class A, class B>
std::string differing(const char* what, const A& got, const B& want, double tolerance) {
  for (size_t i = 0; i < got.count; ++i)
    if (!(std::fabs(got[i] - want[i]) <= tolerance * (1 + std::fabs(want[i]))))
      return std::string(what) + " at " + std::to_string(i) + ": " + std::to_string(got[i]) + " instead of " +
             std::to_string(want[i]);
  return "";
}

struct Layout {
  int experts, live, slots, rows, shared_rows;
  Memory<int32_t> offsets;
  explicit Layout(const FusedCase& c)
      : experts(static_cast<int>(c.counts.size())), live(0), offsets(c.counts.size() + 1) {
    for (int e = 0; e < experts; ++e) offsets.at[e] = live, live += c.counts[e];
    offsets.at[experts] = live;
    slots = live + c.dead;
    rows = c.shared * c.tokens + slots;
    shared_rows = c.one_row_a_token ? c.tokens : c.shared * c.tokens;
  }
};

std::string forward(const FusedCase& c, std::mt19937& random) {
  const Layout n(c);
  const size_t pre = static_cast<size_t>(2) * c.width;
  const Half x(n.shared_rows * c.hidden, 1, random), routed(n.slots * c.hidden, 1, random);
  const Half up(c.shared * pre * c.hidden, 1, random), routed_up(n.experts * pre * c.hidden, 1, random);
  const Half bias(c.shared * pre, 1, random), routed_bias(n.experts * pre, 1, random);
  const Half z(n.rows * pre), act(n.rows * c.width), z_apart(n.rows * pre), act_apart(n.rows * c.width);
  ExpertGlu args = {
      {DType::bf16, c.tokens, c.shared, n.experts, n.slots, c.hidden, 2 * c.width, false, c.one_row_a_token, x.at,
       routed.at, up.at, routed_up.at, c.bias && c.shared != 2 ? bias.at : nullptr, c.bias ? routed_bias.at : nullptr,
       n.offsets.at, z.at},
      ActivationKind::silu,
      act.at};
  handed.bias = args.product.routed_bias, handed.result = z.at;
  handed.rows = n.rows, handed.in = c.hidden, handed.out = 2 * c.width;
  fused_handed = {nullptr, act.at, c.width};
  const int64_t band = c.band == 0 ? 2 * c.width : c.band;
  if (auto fault = RUN(expert_glu, args, band); !fault.empty()) return fault;
  args.product.out = z_apart.at;
  if (auto fault = RUN(expert_gemm, args.product, band); !fault.empty()) return fault;
  activation({DType::bf16, ActivationKind::silu, true, c.width, z_apart.at, act_apart.at}, n.rows, {}, nullptr);
  auto fault = differing("pre-activation", z, z_apart, arch == 80 ? 0 : 8e-3);
  return fault.empty() ? differing("activation", act, act_apart, arch == 80 ? 0 : 2e-2) : fault;
}

std::string backward(const FusedCase& c, std::mt19937& random) {
  const Layout n(c);
  const size_t pre = static_cast<size_t>(2) * c.width;
  const Half g(n.shared_rows * c.hidden, 1, random), routed(n.slots * c.hidden, 1, random);
  const Half down(c.shared * c.hidden * c.width, .3f, random), routed_down(n.experts * c.hidden * c.width, .3f, random);
  const Half z(n.rows * pre, 2, random);
  const Single weights(n.rows, 1, random);
  for (int row = n.rows - c.dead; row < n.rows; ++row) {
    weights.at[row] = 0;
    std::fill_n(z.at + row * pre, pre, uint16_t{0});
  }
  const Half grad(n.rows * pre), weighted(n.rows * c.width), grad_apart(n.rows * pre), weighted_apart(n.rows * c.width);
  const Half act_grad(n.rows * c.width);
  const Single dots(n.rows), dots_apart(n.rows);
  ExpertGluBackward args = {
      {DType::bf16, c.tokens, c.shared, n.experts, n.slots, c.hidden, c.width, true, c.one_row_a_token, g.at, routed.at,
       down.at, routed_down.at, nullptr, nullptr, n.offsets.at, nullptr},
      ActivationKind::silu,
      z.at,
      weights.at,
      grad.at,
      weighted.at,
      dots.at};
  handed.bias = nullptr, handed.result = grad.at;
  handed.rows = n.rows, handed.in = c.hidden, handed.out = 2 * c.width;
  fused_handed = {weights.at, weighted.at, c.width};
  const int64_t band = c.band == 0 ? c.width : c.band;
  if (auto fault = RUN(expert_glu_backward, args, band); !fault.empty()) return fault;
  args.product.out = act_grad.at;
  if (auto fault = RUN(expert_gemm, args.product, band); !fault.empty()) return fault;
  activation_backward({DType::bf16, ActivationKind::silu, true, c.width, act_grad.at, z.at, weights.at, grad_apart.at,
                       weighted_apart.at, dots_apart.at},
                      n.rows, {}, nullptr);
  auto fault = differing("weighted activation", weighted, weighted_apart, 0);
  if (fault.empty()) fault = differing("gradient", grad, grad_apart, 2e-2);  // that the others round on the way
  return fault.empty() ? differing("row_dots", dots, dots_apart, 0.1) : fault;
}

template <class Sum>
std::string weight_sum(const FusedCase& c, std::mt19937& random) {
  const Layout n(c);
  constexpr bool wide = std::is_same_v<Sum, Single>;
  const size_t each = static_cast<size_t>(c.hidden) * c.width, shared = c.shared * each;
  const Half x(n.shared_rows * c.hidden, 1, random), routed(n.slots * c.hidden, 1, random);
  const Half g(c.shared * c.tokens * c.width, 1, random), routed_g(n.slots * c.width, 1, random);
  const Sum sums((c.shared + n.experts) * each, 3, random), apart(sums.count);
  std::vector<double> want(sums.count);
  for (size_t i = 0; i < sums.count; ++i) want[i] = sums[i];
  ExpertGemmWgrad args = {DType::bf16,
                          wide ? DType::f32 : DType::bf16,
                          c.tokens,
                          c.shared,
                          n.experts,
                          n.slots,
                          c.hidden,
                          c.width,
                          c.one_row_a_token,
                          false,
                          x.at,
                          routed.at,
                          g.at,
                          routed_g.at,
                          n.offsets.at,
                          sums.at,
                          sums.at + shared,
                          0,
                          false,
                          true};
  const int64_t band = c.band == 0 || c.band >= c.hidden ? c.hidden : c.band;
  if (auto fault = RUN(expert_gemm_wgrad, args, band); !fault.empty()) return fault;
  args.add = false;
  args.shared_grad = apart.at;
  args.routed_grad = apart.at + shared;
  if (auto fault = RUN(expert_gemm_wgrad, args, band); !fault.empty()) return fault;
  for (size_t i = 0; i < want.size(); ++i) want[i] += apart[i];
  return differing("sum", sums, want, wide ? 1e-5 : 1e-2);
}

}  // namespace

FusedHanded fused_handed;

const char* name_of(Fused product) {
  constexpr const char* kNames[] = {"glu", "glu_backward", "sum", "sum_f32"};
  return kNames[static_cast<int>(product)];
}

const std::vector<FusedCase>& fused_cases() {
  static const std::vector<FusedCase> all = {{0, 0, {130, 0, 70}, 0, 72, 64, 0, false, true},
                                             {33, 1, {0, 129, 5}, 3, 72, 136, 0, true, true},
                                             {20, 2, {0, 0, 300}, 0, 136, 264, 256, true, false},
                                             {7, 1, {0, 0, 0}, 4, 8, 8, 0, true, true}};
  return all;
}

FusedCase of_many() { return {8, 1, std::vector<int>(12, 1), 0, 64, 64, 0, true, true}; }

FusedCase of_depth(Fused product, int steps) {
  const int depth = 64 * steps;
  if (product == Fused::glu || product == Fused::glu_backward) return {16, 1, {40, 3}, 0, depth, 64, 0, true, true};
  return {0, 0, {depth, depth}, 0, 64, 64, 0, true, true};
}

const FusedCase& smallest_fused() { return fused_cases()[2]; }

std::string fault_of(int on, int with, Fused product, const FusedCase& which, unsigned seed) {
  arch = on, tile = with;
  std::mt19937 random(seed);
  switch (product) {
    case Fused::glu: return forward(which, random);
    case Fused::glu_backward: return backward(which, random);
    case Fused::sum: return weight_sum<Half>(which, random);
    default: return weight_sum<Single>(which, random);
  }
}

}  // namespace ptx
