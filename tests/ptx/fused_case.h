// The products that end in registers, run on the machine through the project's own host code: the gated activation
// against the two kernels that it replaces, on Ampere to the bit; all else against what it replaces to a rounding. What
// those two compute is proven elsewhere (run_products.cpp, tests/emulator).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

enum class Fused { glu, glu_backward, sum, sum_f32 };
inline constexpr Fused kFused[] = {Fused::glu, Fused::glu_backward, Fused::sum, Fused::sum_f32};
const char* name_of(Fused product);

struct FusedCase {
  int tokens, shared;
  std::vector<int> counts;  // rows of each routed expert
  int dead, hidden, width, band;
  bool bias, one_row_a_token;
};
const std::vector<FusedCase>& fused_cases();
FusedCase of_many();  // as those of product_case.h
FusedCase of_depth(Fused product, int steps);
const FusedCase& smallest_fused();  // with shared and routed groups, an empty one and several tiles

// What the last one was handed beside what product_case.h has of it, for who plants bugs in it.
struct FusedHanded {
  const void *row_weights, *activation;
  int64_t width;
};
extern FusedHanded fused_handed;

// Empty if all is right; else what is wrong, by numbers or by status. Throws ptx::Error as the machine does.
std::string fault_of(int arch, int tile, Fused product, const FusedCase& which, unsigned seed);

}  // namespace ptx
