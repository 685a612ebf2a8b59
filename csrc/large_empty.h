// Memory for large results on a CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace ummrm {

// at::empty, contiguous; for a large CPU tensor in pages of 2 MB where the system gives them. The C library takes large
// blocks from the system at every call and gives them back, so that a result costs a fault for each of its pages: of
// 4 KB, an eighth of a training step was that.
at::Tensor large_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// The same for what is freed soon, by the call itself or with the step's gradients, and asked for again: its memory is
// kept for the next call, up to a sixteenth of the machine's in all, at least 256 MB and at most 2 GB: gradients of a
// layer that took new pages at each step were a sixth slower to write. Commands have all freed memory kept
// (ummrm.memory); in a user's process the C library's settings are not ours to change.
at::Tensor workspace_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace ummrm
