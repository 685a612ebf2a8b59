// tensor_cores.h for every architecture: what the instances can take, their tiles, and the pieces of a workspace. A
// call is two launches: the tables of the groups, then the product.
#include "tensor_cores.h"

#include <limits>
#include <type_traits>
#include <utility>

#include "expert_tiles.h"
#include "grouped_product.h"
#include "per_device.h"

#if defined(UMMRM_SM80) || defined(UMMRM_SM90)

namespace ummrm::cuda {
namespace {

struct Architecture {
  int number;
  GroupedInstance (*forward)(int, DType);
  GroupedInstance (*input_grad)(int, DType);
  GroupedInstance (*weight_grad)(int, DType);
  GroupedInstance (*weight_grad_f32)(int, DType);
  bool (*tf32)();  // whether the device has its instances for fp32 operands, rounded to TF32; null: there are none
  GroupedInstance (*weight_sum)(int, DType);
  GroupedInstance (*weight_sum_f32)(int, DType);
  bool sums_all;  // of every type that weight gradients have, else of bf16 alone
  GroupedGlu (*glu)(int);
  GroupedGluBackward (*glu_backward)(int);
};

#ifdef UMMRM_SM80
constexpr Architecture kSm80 = {80,
                                sm80::forward,
                                sm80::input_grad,
                                sm80::weight_grad,
                                sm80::weight_grad_f32,
                                sm80::has_image,
                                sm80::weight_grad,
                                sm80::weight_grad_f32,
                                true,  // these add what they read as a bias is read
                                sm80::glu,
                                sm80::glu_backward};
#endif
#ifdef UMMRM_SM90
constexpr Architecture kSm90 = {90,
                                sm90::forward,
                                sm90::input_grad,
                                sm90::weight_grad,
                                sm90::weight_grad_f32,
                                nullptr,
                                sm90::weight_sum,
                                sm90::weight_sum_f32,
                                false,
                                sm90::glu,
                                sm90::glu_backward};
#endif

// Of the current device; 0 where there is none.
int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// A bias's address is one of these as well: Ampere reads it in words of 16 bytes.
template <class... Addresses>
bool all_aligned(const Addresses*... addresses) {
  return (aligned16(addresses) && ...);
}

template <class Args>
bool has_type(const Architecture& arch, const Args& args) {
  return args.dtype == DType::bf16 || args.dtype == DType::f16 ||
         (args.dtype == DType::f32 && args.allow_tf32 && arch.tf32 != nullptr && arch.tf32());
}

// Widths whose rows start on 16-byte boundaries, and row counts, fit: shapes are int32, and so is Ampere's count of
// tiles.
bool sizes_fit(int64_t tokens, int64_t num_shared, int64_t num_experts, int64_t slots, int64_t width, int64_t other) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;  // sizes are rounded up to whole tiles
  if (width < 8 || other < 8 || width % 8 != 0 || other % 8 != 0 || width > kMost || other > kMost) return false;
  if (tokens > kMost || slots > kMost || num_shared + num_experts > kMaxGroups) return false;
  constexpr int64_t kSide = 128;  // no tile is shorter
  const int64_t groups = num_shared + num_experts, most_rows = tokens * num_shared + slots + groups * kSide;
  const int64_t most_wide = width > other ? width : other;
  const bool rows_fit = most_rows / kSide <= kMost / (ceil_div(most_wide, kSide) + 1);
  const bool gradients_fit = groups * ceil_div(width, kSide) <= kMost / (ceil_div(other, kSide) + 1);
  return rows_fit && gradients_fit;
}

bool suits(const Architecture& arch, const ExpertGemm& args) {
  return has_type(arch, args) &&
         sizes_fit(args.tokens, args.num_shared, args.num_experts, args.slots, args.in, args.out_width) &&
         all_aligned(args.shared_rows, args.routed_rows, args.shared_proj, args.routed_proj, args.shared_bias,
                     args.routed_bias, args.out);
}

bool suits(const Architecture& arch, const ExpertGemmWgrad& args) {
  return has_type(arch, args) && (!args.add || args.dtype == DType::bf16 || arch.sums_all) &&
         (args.grad_dtype == args.dtype || args.grad_dtype == DType::f32) &&
         sizes_fit(args.tokens, args.num_shared, args.num_experts, args.slots, args.width, args.grad_width) &&
         all_aligned(args.shared_rows, args.routed_rows, args.grad_shared_rows, args.grad_routed_rows, args.shared_grad,
                     args.routed_grad);
}

// What the fused instances serve: see grouped_product.h.
bool suits(const Architecture& arch, const ExpertGlu& args) {
  return suits(arch, args.product) && args.product.dtype == DType::bf16 && args.kind == kFusedKind &&
         !args.product.transpose && args.product.out_width % 16 == 0 && aligned16(args.activation);
}

bool suits(const Architecture& arch, const ExpertGluBackward& args) {
  return suits(arch, args.product) && args.product.dtype == DType::bf16 && args.kind == kFusedKind &&
         args.product.transpose && all_aligned(args.pre_activation, args.grad_pre_activation, args.weighted_activation);
}

int64_t mean_rows(int64_t tokens, int64_t num_shared, int64_t num_experts, int64_t slots) {
  const int64_t groups = num_shared + num_experts;
  return groups == 0 ? 0 : (tokens * num_shared + slots) / groups;
}

TileChoice tile_of(const Architecture& arch, int sms, const ExpertGemm& args) {
  return choose_tile(
      arch.number, sms,
      {args.transpose ? ExpertProduct::input_grad : ExpertProduct::forward, args.num_shared + args.num_experts,
       mean_rows(args.tokens, args.num_shared, args.num_experts, args.slots), args.out_width, args.in});
}

TileChoice tile_of(const Architecture& arch, int sms, const ExpertGemmWgrad& args) {
  return choose_tile(
      arch.number, sms,
      {ExpertProduct::weight_grad, args.num_shared + args.num_experts,
       mean_rows(args.tokens, args.num_shared, args.num_experts, args.slots), args.width, args.grad_width});
}

template <class Args>
TileChoice tile_of(const Architecture& arch, int sms, const Args& args) {
  return tile_of(arch, sms, args.product);
}

GroupedInstance instance_of(const Architecture& arch, int tile, const ExpertGemm& args) {
  return (args.transpose ? arch.input_grad : arch.forward)(tile, args.dtype);
}

GroupedInstance instance_of(const Architecture& arch, int tile, const ExpertGemmWgrad& args) {
  const auto same = args.add ? arch.weight_sum : arch.weight_grad;
  return (args.grad_dtype == args.dtype ? same
          : args.add                    ? arch.weight_sum_f32
                                        : arch.weight_grad_f32)(tile, args.dtype);
}

GroupedGlu instance_of(const Architecture& arch, int tile, const ExpertGlu&) { return arch.glu(tile); }

GroupedGluBackward instance_of(const Architecture& arch, int tile, const ExpertGluBackward&) {
  return arch.glu_backward(tile);
}

int spare_of(const ExpertGemm& args) { return args.spare_multiprocessors; }
int spare_of(const ExpertGemmWgrad& args) { return args.spare_multiprocessors; }
template <class Args>
int spare_of(const Args& args) {
  return args.product.spare_multiprocessors;
}

// A row of zeros, for the kind of expert without a bias where the other has one. Bytes; 0: not needed.
int64_t zero_row(const ExpertGemm& args) {
  const bool one_missing = (args.shared_bias == nullptr) != (args.routed_bias == nullptr);
  return one_missing ? args.out_width * element_bytes(args.dtype) : 0;
}

int64_t zero_row(const ExpertGemmWgrad&) { return 0; }
template <class Args>
int64_t zero_row(const Args& args) {
  return zero_row(args.product);
}

ExpertGroups groups_of(const ExpertGemmWgrad& args, int64_t band, const void*) { return groups_of(args, band); }
ExpertGroups groups_of(const ExpertGluBackward& args, int64_t band, const void*) { return groups_of(args, band); }

// Bands are cut between what an ending takes as one: eight columns of either half, and a part of a row's dots.
template <class Args, class Instance>
int64_t whole_band(const Args&, const Instance&, int64_t band) {
  return band;
}
int64_t whole_band(const ExpertGlu& args, const GroupedGlu&, int64_t band) {
  return band % 16 == 0 ? band : args.product.out_width;
}
int64_t whole_band(const ExpertGluBackward& args, const GroupedGluBackward& instance, int64_t band) {
  return band % instance.part_columns == 0 ? band : args.product.out_width;
}

// The pieces of a call, in a workspace or, from a null one, to be counted.
template <class Args>
struct Call {
  static constexpr bool kDots = std::is_same_v<Args, ExpertGluBackward>;
  const Args& args;
  decltype(instance_of(std::declval<const Architecture&>(), 0, std::declval<const Args&>())) instance;
  ExpertGroups groups;
  GroupedProduct product;
  int64_t zero_bytes, bytes;
  void* zeros;
  float* partial_dots = nullptr;
  int64_t parts = 0;

  Call(const Architecture& arch, int sms, const TileChoice& choice, const Args& given, void* base) : args(given) {
    Workspace workspace(base);
    instance = instance_of(arch, choice.tile, args);
    zero_bytes = zero_row(args);
    zeros = workspace.take<char>(zero_bytes);
    groups = groups_of(args, whole_band(args, instance, choice.band), zeros);
    product.tables = take_tables(workspace, groups.problems());
    product.problems = static_cast<int>(groups.problems());
    product.biased = groups.biased;
    const int left = sms - spare_of(args);
    product.sms = left < 1 ? 1 : left < sms ? left : sms;
    product.scratch = workspace.take<char>(instance.scratch_bytes(sms));
    if constexpr (kDots) {
      parts = ceil_div(args.product.out_width, instance.part_columns);
      partial_dots = workspace.take<float>((groups.num_shared * groups.tokens + groups.slots) * parts);
    }
    bytes = workspace.bytes();
  }

  int run(Stream stream) {
    int status = cudaSuccess;
    if (zero_bytes > 0) status = cudaMemsetAsync(zeros, 0, static_cast<size_t>(zero_bytes), stream);
    if (status == cudaSuccess) status = expert_groups(groups, product.tables, stream);
    if (status != cudaSuccess || product.problems == 0) return status;
    if constexpr (kDots) {
      status = instance.run(product, args, partial_dots, parts, stream);
      return status == cudaSuccess ? sum_dots(args, partial_dots, parts, stream) : status;
    } else if constexpr (std::is_same_v<decltype(instance), GroupedInstance>) {
      return instance.run(product, stream);
    } else {
      return instance.run(product, args, stream);
    }
  }
};

template <class Args>
int64_t workspace_of(const Architecture& arch, int sms, const Args& args, const TileChoice& choice) {
  return sms == 0 ? 0 : Call<Args>(arch, sms, choice, args, nullptr).bytes;
}

template <class Args>
int run(const Architecture& arch, int sms, const Args& args, const TileChoice& choice, void* workspace, Stream stream) {
  if (sms == 0) return cudaErrorNoDevice;
  return Call<Args>(arch, sms, choice, args, workspace).run(stream);
}

}  // namespace

#define UMMRM_TENSOR_CORES(arch, Args, function)                                             \
  bool serves(const Args& args) { return suits(arch, args); }                                \
  int64_t workspace(const Args& args, const TileChoice& choice) {                            \
    return workspace_of(arch, multiprocessors(), args, choice);                              \
  }                                                                                          \
  int64_t workspace(const Args& args) {                                                      \
    const int sms = multiprocessors();                                                       \
    return workspace_of(arch, sms, args, tile_of(arch, sms, args));                          \
  }                                                                                          \
  int function(const Args& args, const TileChoice& choice, void* workspace, Stream stream) { \
    return run(arch, multiprocessors(), args, choice, workspace, stream);                    \
  }                                                                                          \
  int function(const Args& args, void* workspace, Stream stream) {                           \
    const int sms = multiprocessors();                                                       \
    return run(arch, sms, args, tile_of(arch, sms, args), workspace, stream);                \
  }

#ifdef UMMRM_SM80
namespace sm80 {
UMMRM_TENSOR_CORES(kSm80, ExpertGemm, expert_gemm)
UMMRM_TENSOR_CORES(kSm80, ExpertGemmWgrad, expert_gemm_wgrad)
UMMRM_TENSOR_CORES(kSm80, ExpertGlu, expert_glu)
UMMRM_TENSOR_CORES(kSm80, ExpertGluBackward, expert_glu_backward)
}  // namespace sm80
#endif

#ifdef UMMRM_SM90
namespace sm90 {
UMMRM_TENSOR_CORES(kSm90, ExpertGemm, expert_gemm)
UMMRM_TENSOR_CORES(kSm90, ExpertGemmWgrad, expert_gemm_wgrad)
UMMRM_TENSOR_CORES(kSm90, ExpertGlu, expert_glu)
UMMRM_TENSOR_CORES(kSm90, ExpertGluBackward, expert_glu_backward)
}  // namespace sm90
#endif

}  // namespace ummrm::cuda

#endif
