// Which products of expert_glu.h are fused, on what, and the sums of a row's dots.
#include "ummrm/expert_glu.h"

#include <atomic>

#include "expert_tiles.h"
#include "grouped_product.h"
#include "kernel_choice.h"
#include "numeric.cuh"

namespace ummrm::cuda {
namespace {

constexpr int kDotThreads = 256, kDotRows = kDotThreads / kWarp;  // a warp a row
std::atomic<Fusions> chosen{Fusions::measured};

bool taken(int arch, Fusion fusion) {
  const Fusions choice = chosen;
  return choice == Fusions::measured ? fusion_taken(arch, fusion) : choice == Fusions::all;
}

// Two of a kind: one a major architecture that has instances of its own, which the others' order gives precedence.
template <class Args>
struct Fused {
  int first_major, last_major, arch;
  bool (*serves)(const Args&);
  int64_t (*workspace)(const Args&);
  int (*run)(const Args&, void* workspace, Stream stream);
};

template <class Args, size_t count>
const Fused<Args>* find(const Fused<Args> (&list)[count], const Args& args, Fusion fusion) {
  const int major = device_major();
  for (const Fused<Args>& row : list) {
    if (row.first_major > major || major > row.last_major) continue;
    return row.run != nullptr && row.serves(args) && taken(row.arch, fusion) ? &row : nullptr;
  }
  return nullptr;
}

#if defined(UMMRM_SM90)
#define UMMRM_FUSED_90(run) {9, 9, 90, &sm90::serves, &sm90::workspace, run},
#else
#define UMMRM_FUSED_90(run)
#endif
#if defined(UMMRM_SM80)
#define UMMRM_FUSED_80(run) {8, kAnyMajor, 80, &sm80::serves, &sm80::workspace, run},
#else
#define UMMRM_FUSED_80(run)
#endif

constexpr Fused<ExpertGlu> kGlu[] = {UMMRM_FUSED_90(&sm90::expert_glu) UMMRM_FUSED_80(&sm80::expert_glu){}};
constexpr Fused<ExpertGluBackward> kBackward[] = {UMMRM_FUSED_90(&sm90::expert_glu_backward)
                                                      UMMRM_FUSED_80(&sm80::expert_glu_backward){}};
constexpr Fused<ExpertGemmWgrad> kSum[] = {UMMRM_FUSED_90(&sm90::expert_gemm_wgrad)
                                               UMMRM_FUSED_80(&sm80::expert_gemm_wgrad){}};

// Bytes moved: 4 a part.
__global__ void __launch_bounds__(kDotThreads, kResident)
    sum_dots_kernel(ExpertGluBackward args, const float* partial_dots, int64_t parts) {
  const ExpertGemm& product = args.product;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDotRows + threadIdx.x / kWarp;
  const int64_t shared_rows = product.num_shared * product.tokens;
  if (row >= shared_rows + product.slots) return;
  const bool live = row < shared_rows + product.expert_offsets[product.num_experts];
  float total = 0;
  for (int64_t part = threadIdx.x % kWarp; live && part < parts; part += kWarp)
    total += partial_dots[row * parts + part];
  total = lanes_sum(total);
  if (threadIdx.x % kWarp == 0) args.row_dots[row] = total;
}

}  // namespace

int sum_dots(const ExpertGluBackward& args, const float* partial_dots, int64_t parts, Stream stream) {
  const int64_t rows = args.product.num_shared * args.product.tokens + args.product.slots;
  return launch(sum_dots_kernel, ceil_div(rows, kDotRows), kDotThreads, stream, args, partial_dots, parts);
}

void use_fusions(Fusions fusions) { chosen = fusions; }

bool expert_glu_fused(const ExpertGlu& args) { return find(kGlu, args, Fusion::glu) != nullptr; }
bool expert_glu_fused(const ExpertGluBackward& args) { return find(kBackward, args, Fusion::glu_backward) != nullptr; }
bool expert_gemm_wgrad_adds(const ExpertGemmWgrad& args) { return find(kSum, args, Fusion::weight_sum) != nullptr; }

int64_t expert_glu_workspace(const ExpertGlu& args) {
  const auto* found = find(kGlu, args, Fusion::glu);
  return found == nullptr ? 0 : found->workspace(args);
}
int expert_glu(const ExpertGlu& args, void* workspace, Stream stream) {
  const auto* found = find(kGlu, args, Fusion::glu);
  return found == nullptr ? cudaErrorInvalidConfiguration : found->run(args, workspace, stream);
}
int64_t expert_glu_workspace(const ExpertGluBackward& args) {
  const auto* found = find(kBackward, args, Fusion::glu_backward);
  return found == nullptr ? 0 : found->workspace(args);
}
int expert_glu_backward(const ExpertGluBackward& args, void* workspace, Stream stream) {
  const auto* found = find(kBackward, args, Fusion::glu_backward);
  return found == nullptr ? cudaErrorInvalidConfiguration : found->run(args, workspace, stream);
}

}  // namespace ummrm::cuda
