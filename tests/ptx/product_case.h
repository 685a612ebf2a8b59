// The tensor-core products of an architecture, run on the machine through the project's own host code and held to plain
// loops in double: what test_products.cpp, the mutations and the planted bugs share.
#pragma once

#include <string>
#include <vector>

#include "ummrm/types.h"

namespace ptx {

enum class Product { forward, input_grad, weight_grad, weight_grad_f32 };
inline constexpr Product kProducts[] = {Product::forward, Product::input_grad, Product::weight_grad,
                                        Product::weight_grad_f32};
const char* name_of(Product product);

struct Case {
  int tokens, shared;       // tokens and shared experts
  std::vector<int> counts;  // rows of each routed expert
  int dead;                 // rows of none, behind them
  int in, out;
  int band;  // of tiles; 0: all columns
  bool bias;
  ummrm::DType dtype;
};

// Cases that between them have every kind of group: none, one row, a tile less and more than one, dead rows, both
// biases or one.
std::vector<Case> cases(ummrm::DType dtype);
Case widest(ummrm::DType dtype);   // that fills every tile
Case of_many(ummrm::DType dtype);  // of small groups: more tiles for a block than are handed out ahead
// A small one, in which a product takes so many steps of 64 along what is summed.
Case of_depth(Product product, ummrm::DType dtype, int steps);
Case smallest(ummrm::DType dtype);  // with shared and routed groups, an empty one and several tiles

// What the last product was handed, for who plants bugs in it.
struct Handed {
  char* workspace;
  size_t workspace_bytes;
  const void *bias, *result;  // of the first routed expert; of the first row
  int64_t rows, in, out, band;
};
extern Handed handed;

// Empty if all is right; else what is wrong, by numbers or by status. Throws ptx::Error as the machine does.
std::string fault_of(int arch, int tile, Product product, const Case& which);

}  // namespace ptx
