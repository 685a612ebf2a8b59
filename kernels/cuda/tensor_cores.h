// The tensor-core instances of the grouped expert GEMM, one folder an architecture, built through CUTLASS and only
// where CUTLASS was found and the architecture asked for (UMMRM_SM80, UMMRM_SM90 are then defined). expert_gemm.cu
// chooses between them and its own plain kernels, by shapes, alignment and the device's architecture alone.
#pragma once

#include "ummrm/expert_gemm.h"
#include "ummrm/expert_glu.h"

namespace ummrm::cuda {

struct TileChoice;  // expert_tiles.h

// Those with a choice are for who measures; the others choose by sizes. A workspace is that of the same choice.
#define UMMRM_TENSOR_CORES                                                                                      \
  bool serves(const ExpertGemm& args); /* whether sizes, dtype and addresses suit it */                         \
  int64_t workspace(const ExpertGemm& args);                                                                    \
  int64_t workspace(const ExpertGemm& args, const TileChoice& choice);                                          \
  int expert_gemm(const ExpertGemm& args, void* workspace, Stream stream);                                      \
  int expert_gemm(const ExpertGemm& args, const TileChoice& choice, void* workspace, Stream stream);            \
  bool serves(const ExpertGemmWgrad& args);                                                                     \
  int64_t workspace(const ExpertGemmWgrad& args);                                                               \
  int64_t workspace(const ExpertGemmWgrad& args, const TileChoice& choice);                                     \
  int expert_gemm_wgrad(const ExpertGemmWgrad& args, void* workspace, Stream stream);                           \
  int expert_gemm_wgrad(const ExpertGemmWgrad& args, const TileChoice& choice, void* workspace, Stream stream); \
  bool serves(const ExpertGlu& args);                                                                           \
  int64_t workspace(const ExpertGlu& args);                                                                     \
  int64_t workspace(const ExpertGlu& args, const TileChoice& choice);                                           \
  int expert_glu(const ExpertGlu& args, void* workspace, Stream stream);                                        \
  int expert_glu(const ExpertGlu& args, const TileChoice& choice, void* workspace, Stream stream);              \
  bool serves(const ExpertGluBackward& args);                                                                   \
  int64_t workspace(const ExpertGluBackward& args);                                                             \
  int64_t workspace(const ExpertGluBackward& args, const TileChoice& choice);                                   \
  int expert_glu_backward(const ExpertGluBackward& args, void* workspace, Stream stream);                       \
  int expert_glu_backward(const ExpertGluBackward& args, const TileChoice& choice, void* workspace, Stream stream);

namespace sm80 {
UMMRM_TENSOR_CORES
}  // namespace sm80

namespace sm90 {
UMMRM_TENSOR_CORES
}  // namespace sm90

#undef UMMRM_TENSOR_CORES

}  // namespace ummrm::cuda
