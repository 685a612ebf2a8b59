// fp32 matrix products of experts on a CPU, one thread's piece of one group at a time. The groups of a mixture have too
// few rows for a BLAS, which packs a projection anew for each of them and cannot use two cores on one: here the operand
// with fewer elements is packed, rows may be gathered on the way, and pieces of all groups are dealt out together.
#pragma once

#include <cstdint>
#include <vector>

namespace ummrm::cpu {

// Rows of a matrix, or those of them that `index` names.
struct Rows {
  const float* data;
  const int32_t* index;  // row r is number index[r]; null: number r
  int64_t stride;        // elements from one to the next
  const float* at(int64_t r) const { return data + (index == nullptr ? r : index[r]) * stride; }
  Rows from(int64_t r) const {
    return index == nullptr ? Rows{data + r * stride, nullptr, stride} : Rows{data, index + r, stride};
  }
};

// out = rows @ proj^T (+ bias): forward; out = rows @ proj: input_grad; out = grads^T @ rows: weight_grad.
enum class ProductKind { forward, input_grad, weight_grad };

// One group's product, or a rectangle of it. Sizes are of `out`: [out_rows, out_columns], each a sum over `depth`.
struct Product {
  ProductKind kind;
  int64_t out_rows, out_columns, depth;
  Rows rows;               // [out_rows, depth]; of a weight gradient [depth, out_columns]
  Rows grads;              // of a weight gradient: [depth, out_rows]
  const float* proj;       // [out_columns, depth] forward, [depth, out_columns] for an input gradient
  int64_t proj_stride;     //
  const float* bias;       // [out_columns] or null; forward alone
  float* out;              //
  int64_t out_stride;      //
  bool add;                // on top of what is there, instead of in its place
  bool pack_rows = false;  // set by cut
  // What the thread will read next, fetched beside this product: rows, and elements of each, and what the first tile
  // of another product needs of its projection.
  Rows next = {};
  int64_t next_rows = 0, next_columns = 0;
  const Product* after = nullptr;
};

// Whether there are kernels for this processor; where not, a BLAS has the products.
bool has_products();

// Whether the widest registers that the processor has serve, as they do by default; for tests of narrower ones.
void use_widest(bool on);

// Appends `product`, cut into pieces that threads may take in any order: a sum is never cut, and each is made in the
// same order however the pieces fall. `share` is about how many pieces are wanted of this product.
void cut(const Product& product, int64_t share, std::vector<Product>* pieces);

// Floats of scratch that a piece needs.
int64_t scratch_floats(const Product& piece);

void multiply(const Product& piece, float* scratch);

}  // namespace ummrm::cpu
