// The extension `ummrm._C`: every operator's schema, and what Python sees beside the operators. Kernels are registered
// where they are written, one file a stem; fakes and autograd in ummrm/ops/library.py and ummrm/ops/autograd.py.
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <sstream>

#include "checks.h"
#include "device.h"
#include "expert_products.h"
#include "gemm.h"
#include "moe_ffn.h"
#include "ummrm/cpu_info.h"
#include "ummrm/expert_gemm_tiles.h"
#include "ummrm/expert_glu.h"
#include "ummrm/expert_products.h"

namespace {

// T tokens, H hidden, I intermediate, E routed experts, K of them per token, S shared experts, R = T*K slots.
// Sorted rows: a combined buffer [S*T + R, ...] has the shared rows first (expert s, token t at s*T + t).
constexpr const char* kExperts =
    "Tensor shared_up, Tensor routed_up, Tensor shared_down, Tensor routed_down, Tensor? shared_up_bias, "
    "Tensor? routed_up_bias, Tensor? shared_down_bias, Tensor? routed_down_bias";

void define(torch::Library& m, const std::string& schema) { m.def(schema.c_str(), {at::Tag::pt2_compliant_tag}); }

TORCH_LIBRARY(ummrm, m) {
  const std::string experts = kExperts;
  // routing
  define(m,
         "route(Tensor logits, Tensor? mask, Tensor? clean_logits, int top_k, str gate, float fixed_shared_weight) -> "
         "(Tensor shared_weight, Tensor routed_weights, Tensor expert_indices, Tensor tokens_per_expert, "
         "Tensor mean_prob, Tensor mean_z)");
  define(m,
         "route_backward(Tensor grad_shared_weight, Tensor grad_routed_weights, Tensor grad_mean_prob, "
         "Tensor grad_mean_z, Tensor logits, Tensor? mask, Tensor? clean_logits, Tensor expert_indices, "
         "Tensor tokens_per_expert, str gate, float fixed_shared_weight) -> "
         "(Tensor grad_logits, Tensor grad_clean_logits)");
  define(m,
         "sort_slots(Tensor expert_indices, int num_experts) -> "
         "(Tensor slot_to_sorted, Tensor sorted_to_slot, Tensor expert_offsets)");
  // permute
  define(m, "permute(Tensor x, Tensor sorted_to_slot, Tensor expert_offsets, int top_k) -> Tensor");
  define(m,
         "unpermute(Tensor rows, Tensor slot_to_sorted, Tensor expert_offsets, Tensor? shared_weight, "
         "Tensor? routed_weights, int num_shared_experts, int top_k) -> Tensor");
  define(m,
         "unpermute_backward(Tensor grad_out, Tensor rows, Tensor slot_to_sorted, Tensor expert_offsets, "
         "Tensor? shared_weight, Tensor? routed_weights, int num_shared_experts, int top_k) -> "
         "(Tensor grad_rows, Tensor grad_shared_weight, Tensor grad_routed_weights)");
  // expert_gemm
  define(m,
         "expert_gemm(Tensor shared_rows, Tensor routed_rows, Tensor shared_proj, Tensor routed_proj, "
         "Tensor expert_offsets, int num_tokens, Tensor? shared_bias=None, Tensor? routed_bias=None, "
         "bool transpose=False) -> Tensor");
  define(m,
         "expert_gemm_wgrad(Tensor grad_shared_rows, Tensor grad_routed_rows, Tensor shared_rows, Tensor routed_rows, "
         "Tensor expert_offsets, int num_tokens, int num_shared_experts, bool need_shared, bool need_routed, "
         "ScalarType? out_dtype=None) -> (Tensor, Tensor)");
  define(m,
         "expert_gemm_wgrad_add(Tensor grad_shared_rows, Tensor grad_routed_rows, Tensor shared_rows, "
         "Tensor routed_rows, Tensor expert_offsets, int num_tokens, int num_shared_experts, Tensor(a!)? shared_sum, "
         "Tensor(b!)? routed_sum) -> ()");
  define(m,
         "expert_bias_grad(Tensor shared_rows, Tensor routed_rows, Tensor? row_weights, Tensor expert_offsets, "
         "int num_tokens, int num_shared_experts, bool need_shared, bool need_routed) -> (Tensor, Tensor)");
  // activation
  define(m, "activation(Tensor pre_activation, str kind, bool glu) -> Tensor");
  define(m,
         "activation_backward(Tensor grad, Tensor pre_activation, Tensor? row_weights, str kind, bool glu) -> "
         "(Tensor grad_pre_activation, Tensor weighted_activation, Tensor row_dots)");
  // expert_glu
  define(m,
         "expert_glu(Tensor shared_rows, Tensor routed_rows, Tensor shared_proj, Tensor routed_proj, "
         "Tensor expert_offsets, int num_tokens, Tensor? shared_bias, Tensor? routed_bias, str activation) -> "
         "(Tensor pre_activation, Tensor activated)");
  define(m,
         "expert_glu_backward(Tensor shared_rows, Tensor routed_rows, Tensor shared_proj, "
         "Tensor routed_proj, Tensor expert_offsets, int num_tokens, Tensor pre_activation, Tensor row_weights, "
         "str activation) -> (Tensor grad_pre_activation, Tensor weighted_activation, Tensor row_dots)");
  // merge_experts
  define(m, "merge_experts(Tensor[] shared, Tensor[] routed, Tensor coefficients) -> Tensor[]");
  define(m, "merge_experts_dots(Tensor[] grads, Tensor[] shared, Tensor[] routed) -> Tensor");
  define(m,
         "merge_experts_grads(Tensor grad, Tensor coefficients, int num_shared, bool need_shared, bool need_routed) -> "
         "(Tensor, Tensor)");
  // moe_ffn
  const std::string moe = "Tensor x, Tensor shared_weight, Tensor routed_weights, Tensor expert_indices, " + experts;
  define(m, "moe_ffn(" + moe + ", str activation, bool glu) -> Tensor");
  define(m, "moe_ffn_forward(" + moe +
                ", str activation, bool glu) -> (Tensor out, Tensor pre_activation, "
                "Tensor slot_to_sorted, Tensor sorted_to_slot, Tensor expert_offsets)");
  const std::string moe_backward = "Tensor grad_out, " + moe +
                                   ", Tensor pre_activation, Tensor slot_to_sorted, Tensor sorted_to_slot, "
                                   "Tensor expert_offsets, str activation, bool glu, bool[11] need";
  define(m, "moe_ffn_backward(" + moe_backward + ") -> Tensor[]");
  define(m, "moe_ffn_backward_add(" + moe_backward +
                ", Tensor(a!)? shared_up_sum, Tensor(b!)? routed_up_sum, Tensor(c!)? shared_down_sum, "
                "Tensor(d!)? routed_down_sum) -> Tensor[]");
  // merged_ffn
  define(m, "merge_ffn(Tensor coefficients, " + experts + ", bool glu) -> Tensor[]");
  const std::string merged = "Tensor x, Tensor coefficients, " + experts;
  define(m, "merged_ffn(" + merged + ", str activation, bool glu) -> Tensor");
  define(m, "merged_ffn_forward(" + merged + ", str activation, bool glu) -> (Tensor out, Tensor pre_activation)");
  define(m, "merged_ffn_backward(Tensor grad_out, " + merged +
                ", Tensor pre_activation, str activation, bool glu, "
                "bool[10] need) -> Tensor[]");
}

py::dict build_info() {
  py::dict info;
  info["torch_version"] = TORCH_VERSION;
  info["cpp_standard"] = static_cast<int64_t>(__cplusplus);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  py::list architectures;
  info["nvcc"] = py::none();
  if constexpr (ummrm::kHasCuda) {
    std::istringstream words(ummrm::cuda::architectures());
    for (std::string word; words >> word;) architectures.append(word);
    info["nvcc"] = ummrm::cuda::compiler_version();
  }
  info["cuda_archs"] = architectures;
  info["cpu_isa"] = ummrm::cpu::isa();
  info["fp32_gemm"] = ummrm::fp32_gemm_rule();
  info["host_layer"] = ummrm::cpu::has_products();
  return info;
}

// One row a tile that the grouped expert GEMM may take; none in a build without CUDA.
py::list tile_table() {
  py::list rows;
  if constexpr (ummrm::kHasCuda) {
    int count = 0;
    const auto* tiles = ummrm::cuda::tile_instances(&count);
    for (int i = 0; i < count; ++i) {
      py::dict row;
      row["arch"] = tiles[i].arch;
      row["kernel"] = tiles[i].kernel;
      row["tile"] = py::make_tuple(tiles[i].tile_m, tiles[i].tile_n, tiles[i].tile_k);
      row["cluster"] = py::make_tuple(tiles[i].cluster_m, tiles[i].cluster_n);
      row["schedule"] = tiles[i].schedule;
      rows.append(row);
    }
  }
  return rows;
}

void use_fusions(const std::string& choice) {
  using ummrm::cuda::Fusions;
  TORCH_CHECK_VALUE(choice == "measured" || choice == "all" || choice == "none",
                    "`choice` must be 'measured', 'all' or 'none', got '", choice, "'.");
  if constexpr (ummrm::kHasCuda) {
    ummrm::cuda::use_fusions(choice == "all" ? Fusions::all : choice == "none" ? Fusions::none : Fusions::measured);
  }
}

// As pybind11 hands over an argument of type T.
template <class T>
struct Handed {
  using type = T;
};
template <>
struct Handed<at::TensorList> {
  using type = const std::vector<at::Tensor>&;
};

template <class... Arguments>
void define_check(py::module_& m, const char* name, void (*check)(Arguments...)) {
  m.def(name, [check](typename Handed<Arguments>::type... arguments) {
    HANDLE_TH_ERRORS
    const py::gil_scoped_release release;  // reading indices may wait for a device
    check(arguments...);
    END_HANDLE_TH_ERRORS_PYBIND
  });
}

void define_checks(py::module_ m) {
  namespace checks = ummrm::checks;
  define_check(m, "route", &checks::route);
  define_check(m, "route_backward", &checks::route_backward);
  define_check(m, "sort_slots", &checks::sort_slots);
  define_check(m, "permute", &checks::permute);
  define_check(m, "unpermute", &checks::unpermute);
  define_check(m, "unpermute_backward", &checks::unpermute_backward);
  define_check(m, "expert_gemm", &checks::expert_gemm);
  define_check(m, "expert_gemm_wgrad", &checks::expert_gemm_wgrad);
  define_check(m, "expert_gemm_wgrad_add", &checks::expert_gemm_wgrad_add);
  define_check(m, "expert_bias_grad", &checks::expert_bias_grad);
  define_check(m, "expert_glu", &checks::expert_glu);
  define_check(m, "expert_glu_backward", &checks::expert_glu_backward);
  define_check(m, "activation", &checks::activation);
  define_check(m, "activation_backward", &checks::activation_backward);
  define_check(m, "merge_experts", &checks::merge_experts);
  define_check(m, "merge_experts_dots", &checks::merge_experts_dots);
  define_check(m, "merge_experts_grads", &checks::merge_experts_grads);
  define_check(m, "moe_ffn", &checks::moe_ffn);
  define_check(m, "moe_ffn_forward", &checks::moe_ffn);
  define_check(m, "moe_ffn_backward", &checks::moe_ffn_backward);
  define_check(m, "moe_ffn_backward_add", &checks::moe_ffn_backward_add);
  define_check(m, "merge_ffn", &checks::merge_ffn);
  define_check(m, "merged_ffn", &checks::merged_ffn);
  define_check(m, "merged_ffn_forward", &checks::merged_ffn);
  define_check(m, "merged_ffn_backward", &checks::merged_ffn_backward);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of ummrm. Use ummrm.ops; see csrc/module.cpp.";
  m.def("build_info", &build_info, "What this was built with, and the CPU kernels chosen on this machine.");
  m.def("check", &ummrm::check_indices_on_devices, py::arg("enabled"),
        "Whether index values are checked on devices where reading them waits for the device. CPU tensors always are.");
  m.def("use_fusions", &use_fusions, py::arg("choice"),
        "Which fused CUDA kernels run: 'measured' (what the tile table says), 'all' that there are, or 'none'.");
  m.def("use_host_layer", &ummrm::host::use, py::arg("enabled"),
        "Whether moe_ffn of CPU tensors in fp32 runs as one, instead of as the operators that it is made of.");
  m.def("tile_table", &tile_table, "Tiles of the grouped expert GEMM on CUDA: rows, columns and depth, and where.");
  m.def("activation_names", &ummrm::activation_names, "The activations that the kernels know.");
  m.def("onednn_product", &ummrm::onednn_product, py::call_guard<py::gil_scoped_release>(),
        "a @ b (+ bias) in fp32: csrc/gemm.cpp's product on some processors, for a test on all.");
  m.def("host_product", &ummrm::host_product, py::arg("rows"), py::arg("other"), py::arg("kind"),
        py::call_guard<py::gil_scoped_release>(),
        "One of the fp32 products that moe_ffn makes on a CPU, alone: see csrc/expert_products.h. For a test and a "
        "benchmark.");
  define_checks(m.def_submodule("checks", "Each operator's argument checks alone, on its schema's arguments."));
}
