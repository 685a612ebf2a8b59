// The checks of check.h. Each ends in ValueError (shape, configuration, device), TypeError (dtype) or IndexError.
#include "check.h"

#include <atomic>
#include <limits>
#include <sstream>
#include <utility>

#include "device.h"
#include "ummrm/permute.h"

namespace ummrm {
namespace {

std::atomic<bool> check_devices{false};

// The only lists of these names; Python's are held to them by a test.
constexpr std::pair<const char*, Gate> kGates[] = {{"shared_complement", Gate::shared_complement},
                                                   {"fixed", Gate::fixed}};
constexpr std::pair<const char*, ActivationKind> kActivations[] = {{"silu", ActivationKind::silu},
                                                                   {"gelu", ActivationKind::gelu},
                                                                   {"gelu_tanh", ActivationKind::gelu_tanh},
                                                                   {"relu", ActivationKind::relu},
                                                                   {"relu2", ActivationKind::relu2}};

// As Python spells it.
std::string name_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return "float64";
    case at::kFloat: return "float32";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kLong: return "int64";
    case at::kInt: return "int32";
    case at::kBool: return "bool";
    default: return c10::toString(type);
  }
}

std::string described(const at::Tensor& tensor) {
  std::ostringstream out;
  out << name_of(tensor.scalar_type()) << " " << tensor.sizes();
  return out.str();
}

// Index values that may be read: the tensor itself on CPU, a copy elsewhere if that was asked for, else nothing. A meta
// tensor has none.
std::optional<at::Tensor> readable(const at::Tensor& indices) {
  if (indices.is_meta()) return std::nullopt;
  if (indices.is_cpu()) return indices.contiguous();
  if (check_devices) return indices.contiguous().cpu();
  return std::nullopt;
}

template <class Kind, size_t count>
Kind one_of(const std::pair<const char*, Kind> (&known)[count], const char* op, const char* argument,
            c10::string_view name) {
  std::string listed;
  for (size_t i = 0; i < count; ++i) {
    if (name == known[i].first) return known[i].second;
    listed += (i == 0 ? "" : i + 1 < count ? ", " : " or ") + ("'" + std::string(known[i].first) + "'");
  }
  TORCH_CHECK_VALUE(false, "ummrm.", op, ": `", argument, "` must be ", listed, ", got '", std::string(name),
                    "'; pass one of these.");
}

}  // namespace

void check_indices_on_devices(bool enabled) { check_devices = enabled; }

void Checker::shape(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const char* words,
                    const char* remedy) const {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d)
    fits = shape[d] < 0 || tensor.size(static_cast<int64_t>(d)) == shape[d];
  if (fits) return;
  std::ostringstream sizes;  // the known sizes, where any is known
  bool any_known = false;
  for (size_t d = 0; d < shape.size(); ++d) {
    any_known |= shape[d] >= 0;
    sizes << (d == 0 ? "" : ", ");
    if (shape[d] < 0) {
      sizes << "any";
    } else {
      sizes << shape[d];
    }
  }
  TORCH_CHECK_VALUE(false, "ummrm.", op, ": `", name, "` must have shape ", words,
                    any_known ? " = [" + sizes.str() + "]" : std::string(), ", got ", described(tensor), "; ", remedy,
                    ".");
}

void Checker::dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected, const char* remedy) const {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, "ummrm.", op, ": `", name, "` must be ", name_of(expected),
                   ", got ", described(tensor), "; ", remedy, ".");
}

at::ScalarType Checker::result(const char* name, const std::optional<at::ScalarType>& asked,
                               const at::Tensor& like) const {
  const at::ScalarType own = like.scalar_type(), wide = accumulator(like), got = asked.value_or(own);
  TORCH_CHECK_TYPE(got == own || got == wide, "ummrm.", op, ": `", name, "` must be ", name_of(own),
                   own == wide ? std::string() : " or " + name_of(wide), ", got ", name_of(got),
                   "; leave it out for the inputs' own.");
  return got;
}

void Checker::floating(const char* name, const at::Tensor& tensor) const {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "ummrm.",
                   op, ": `", name, "` must be float64, float32, bfloat16 or float16, got ", described(tensor),
                   "; convert it, e.g. `", name, ".float()`.");
}

void Checker::index(const char* name, const at::Tensor& tensor, int64_t size, const char* words, const at::Tensor& like,
                    const char* like_name) const {
  device(name, tensor, like, like_name);
  shape(name, tensor, {size}, words, "take it from ummrm.ops.sort_slots");
  dtype(name, tensor, at::kInt, "take it from ummrm.ops.sort_slots");
}

void Checker::device(const char* name, const at::Tensor& tensor, const at::Tensor& like, const char* like_name) const {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "ummrm.", op, ": `", name, "` must be on the device of `",
                    like_name, "` (", like.device(), "), got ", tensor.device(), "; move it with `", name, ".to(",
                    like_name, ".device)`.");
}

void Checker::count(const char* name, int64_t value, int64_t least) const {
  TORCH_CHECK_VALUE(value >= least, "ummrm.", op, ": `", name, "` must be at least ", least, ", got ", value,
                    "; pass a larger value.");
  TORCH_CHECK_VALUE(value <= std::numeric_limits<int32_t>::max(), "ummrm.", op, ": `", name,
                    "` must be below 2^31, got ", value, "; pass a smaller value.");
}

void Checker::slots(const char* tokens_name, int64_t tokens, int64_t top_k) const {
  count("top_k", top_k, 1);
  TORCH_CHECK_VALUE(tokens <= std::numeric_limits<int32_t>::max() / top_k, "ummrm.", op, ": `", tokens_name,
                    "` must have T * top_k below 2^31, got T = ", tokens, " and top_k = ", top_k, "; split the batch.");
}

void Checker::offsets(const at::Tensor& expert_offsets, int64_t slots, const at::Tensor& like,
                      const char* like_name) const {
  index("expert_offsets", expert_offsets, -1, "[E + 1]", like, like_name);
  count("expert_offsets.numel()", expert_offsets.numel(), 1);
  const auto host = readable(expert_offsets);
  if (!host.has_value()) return;
  const auto* offsets = host->const_data_ptr<int32_t>();
  int64_t previous = 0;
  for (int64_t e = 0; e < host->numel(); ++e) {
    const int64_t offset = offsets[e];
    TORCH_CHECK_INDEX(offset >= previous && offset <= slots && (e > 0 || offset == 0), "ummrm.", op,
                      ": `expert_offsets` must start at 0, never fall and end at or below the number of slots (", slots,
                      "), got ", offset, " at position ", e,
                      "; take it from ummrm.ops.sort_slots of the same routing.");
    previous = offset;
  }
}

void Checker::values(const char* name, const at::Tensor& indices, int64_t low, int64_t high, const char* remedy) const {
  const auto host = readable(indices);
  if (!host.has_value()) return;
  const auto* values = host->const_data_ptr<int32_t>();
  const int64_t bad = cpu::first_out_of_range(values, 0, indices.numel(), low, high);
  TORCH_CHECK_INDEX(bad < 0, "ummrm.", op, ": `", name, "` must lie in [", low, ", ", high - 1, "], got ", values[bad],
                    " at position ", bad, "; ", remedy, ".");
}

void Checker::routed_indices(const at::Tensor& expert_indices, const std::optional<at::Tensor>& mask,
                             int64_t experts) const {
  values("expert_indices", expert_indices, mask.has_value() ? -1 : 0, experts, "pass what route returned");
  if (!mask.has_value()) return;
  const auto host = readable(expert_indices), live = readable(*mask);
  if (!host.has_value() || !live.has_value()) return;
  const auto* values = host->const_data_ptr<int32_t>();
  const auto* alive = live->const_data_ptr<bool>();
  for (int64_t t = 0, top_k = host->size(1); t < host->size(0); ++t) {
    if (!alive[t]) continue;
    const int64_t bad = cpu::first_out_of_range(values, t * top_k, (t + 1) * top_k, 0, experts);
    TORCH_CHECK_INDEX(bad < 0, "ummrm.", op, ": `expert_indices` must lie in [0, ", experts - 1,
                      "] where `mask` is True, got ", values[bad], " at position ", bad,
                      "; pass what route returned for this mask.");
  }
}

void Checker::served(const at::Tensor& tensor) const {
  TORCH_CHECK_VALUE(has_kernels(tensor), "ummrm.", op,
                    ": `device` must be of a type that this build has kernels for, got '", tensor.device(),
                    "'; move the tensors to 'cpu'.");
}

DType Checker::element(const char* name, const at::Tensor& tensor) const {
  served(tensor);
  switch (tensor.scalar_type()) {
    case at::kDouble:
      TORCH_CHECK_TYPE(on_host(tensor), "ummrm.", op, ": `", name,
                       "` must be float32, bfloat16 or float16 on a CUDA device, got ", described(tensor),
                       "; convert it with `.float()`, or compute in float64 on the CPU.");
      return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: floating(name, tensor);
  }
  return DType::f32;  // not reached
}

Gate Checker::gate(c10::string_view name) const { return one_of(kGates, op, "gate", name); }

ActivationKind Checker::activation(c10::string_view name) const {
  return one_of(kActivations, op, std::string(op).starts_with("activation") ? "kind" : "activation", name);
}

std::vector<std::string> activation_names() {
  std::vector<std::string> names;
  for (const auto& [name, kind] : kActivations) names.emplace_back(name);
  return names;
}

}  // namespace ummrm
