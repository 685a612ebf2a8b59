// The checks of check.h. Each ends in ValueError (shape, configuration, device), TypeError (dtype) or IndexError.
#include "check.h"

#include <atomic>
#include <sstream>

#include "device.h"
#include "ummrm/permute.h"

namespace ummrm {
namespace {

std::atomic<bool> check_devices{kCheckFromStart};

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

// Index values that may be read: the tensor itself on CPU, a copy elsewhere if that was asked for, else nothing.
std::optional<at::Tensor> readable(const at::Tensor& indices) {
  if (on_host(indices)) return indices.contiguous();
  if (check_devices) return indices.contiguous().cpu();
  return std::nullopt;
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

void Checker::at_least(const char* name, int64_t value, int64_t least) const {
  TORCH_CHECK_VALUE(value >= least, "ummrm.", op, ": `", name, "` must be at least ", least, ", got ", value,
                    "; pass a larger value.");
}

void Checker::offsets(const at::Tensor& expert_offsets, int64_t slots) const {
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

DType Checker::element(const char* name, const at::Tensor& tensor) const {
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

Gate Checker::gate(c10::string_view name) const {
  if (name == "shared_complement") return Gate::shared_complement;
  if (name == "fixed") return Gate::fixed;
  TORCH_CHECK_VALUE(false, "ummrm.", op, ": `gate` must be 'shared_complement' or 'fixed', got '", std::string(name),
                    "'; pass one of these.");
}

ActivationKind Checker::activation(c10::string_view name) const {
  if (name == "silu") return ActivationKind::silu;
  if (name == "gelu") return ActivationKind::gelu;
  if (name == "gelu_tanh") return ActivationKind::gelu_tanh;
  if (name == "relu") return ActivationKind::relu;
  if (name == "relu2") return ActivationKind::relu2;
  TORCH_CHECK_VALUE(false, "ummrm.", op, ": `", std::string(op).starts_with("activation") ? "kind" : "activation",
                    "` must be 'silu', 'gelu', 'gelu_tanh', 'relu' or 'relu2', got '", std::string(name),
                    "'; pass one of these.");
}

}  // namespace ummrm
