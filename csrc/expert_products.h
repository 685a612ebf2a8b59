// Deals pieces of work out to torch's threads on a CPU, and the fp32 products of expert_products.h among them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ummrm/expert_products.h"

namespace ummrm {

// Calls work(i, scratch) for each i below `count` once, on torch's threads, each of which takes the next when it is
// done with one: pieces are of unequal length, and cores are not always free. `scratch` holds `floats` floats of the
// thread's own, aligned to a cache line, with whatever was in it.
void deal_out(int64_t count, int64_t floats, const std::function<void(int64_t, float*)>& work);

// Appends the pieces of a product that is `share_of_all` the work to come, so many that threads end at about one time.
void cut_for_threads(const cpu::Product& product, double share_of_all, std::vector<cpu::Product>* pieces);

// All of them, side by side.
void multiply(const std::vector<cpu::Product>& pieces);

// One fp32 product alone, on all threads: `kind` "forward" is rows @ other^T, "input_grad" rows @ other, "weight_grad"
// other^T @ rows, where other is the gradient of the rows. For a test and a benchmark; the layer cuts its own pieces.
at::Tensor host_product(const at::Tensor& rows, const at::Tensor& other, const std::string& kind);

}  // namespace ummrm
