// expert_products.h: each kind of product, cut into pieces, against plain loops in double; and the same bits however it
// is cut.
#include "ummrm/expert_products.h"

#include <algorithm>

#include "testing.h"

using namespace testing;
using ummrm::cpu::Product;
using ummrm::cpu::ProductKind;
using ummrm::cpu::Rows;

namespace {

struct Sizes {
  int64_t rows, columns, depth;
};

// Operands of one product, with room behind each row that must not be read into the result, and rows out of order.
struct Operands {
  ProductKind kind;
  Sizes n;
  int64_t pad = 3;
  std::vector<float> rows, grads, proj, bias, before;
  std::vector<int32_t> index;

  Operands(ProductKind of, const Sizes& sizes, bool gathers) : kind(of), n(sizes) {
    Random random(n.rows * 31 + n.columns * 7 + n.depth);
    const auto fill = [&](std::vector<float>* to, int64_t count) {
      const Array values = random.array(ummrm::DType::f32, count);
      for (int64_t i = 0; i < count; ++i) to->push_back(static_cast<float>(values[i]));
    };
    const bool weight = kind == ProductKind::weight_grad;
    const int64_t count = weight ? n.depth : n.rows;
    fill(&rows, count * row_stride());
    fill(&grads, weight ? n.depth * (n.rows + pad) : 0);
    fill(&proj, weight ? 0 : kind == ProductKind::forward ? n.columns * n.depth : n.depth * n.columns);
    fill(&bias, n.columns);
    fill(&before, n.rows * n.columns);
    for (int64_t r = 0; gathers && r < count; ++r) index.push_back(static_cast<int32_t>((r * 7 + 3) % count));
  }
  int64_t row_stride() const { return (kind == ProductKind::weight_grad ? n.columns : n.depth) + pad; }
  int64_t row(int64_t r) const { return index.empty() ? r : index[r]; }

  Product product(float* out, bool add, bool biased) const {
    const int32_t* of = index.empty() ? nullptr : index.data();
    const bool weight = kind == ProductKind::weight_grad;
    return {kind,
            n.rows,
            n.columns,
            n.depth,
            Rows{rows.data(), of, row_stride()},
            weight ? Rows{grads.data(), of, n.rows + pad} : Rows{},
            proj.data(),
            kind == ProductKind::forward ? n.depth : n.columns,
            biased ? bias.data() : nullptr,
            out,
            n.columns,
            add};
  }

  // The sum for one element, and that of the terms' magnitudes.
  std::pair<double, double> want(int64_t r, int64_t c) const {
    double sum = 0, magnitude = 0;
    for (int64_t k = 0; k < n.depth; ++k) {
      double term = 0;
      if (kind == ProductKind::forward) term = double(rows[row(r) * row_stride() + k]) * proj[c * n.depth + k];
      if (kind == ProductKind::input_grad) term = double(rows[row(r) * row_stride() + k]) * proj[k * n.columns + c];
      if (kind == ProductKind::weight_grad)
        term = double(grads[row(k) * (n.rows + pad) + r]) * rows[row(k) * row_stride() + c];
      sum += term;
      magnitude += std::fabs(term);
    }
    return {sum, magnitude};
  }
};

// Aligned to cache lines, as a tensor's memory is.
struct Line {
  alignas(64) float elements[16];
};

std::vector<float> result(const Operands& of, bool add, bool biased, int64_t share) {
  std::vector<Line> memory(of.before.size() / 16 + 1);
  float* out = memory[0].elements;
  std::copy(of.before.begin(), of.before.end(), out);  // what is not written stays, and shows
  std::vector<Product> pieces;
  ummrm::cpu::cut(of.product(out, add, biased), share, &pieces);
  for (const Product& piece : pieces) {
    std::vector<float> scratch(ummrm::cpu::scratch_floats(piece) + 16, std::numeric_limits<float>::quiet_NaN());
    ummrm::cpu::multiply(piece, scratch.data());
  }
  return {out, out + of.before.size()};
}

void compare(ProductKind kind, const Sizes& n, bool gathers, bool add, bool biased) {
  const Operands of(kind, n, gathers);
  const std::vector<float> out = result(of, add, biased, 1), pieces = result(of, add, biased, 9);
  CHECK(out == pieces, "a product depends on how it is cut");
  const double epsilon = testing::epsilon(ummrm::DType::f32);
  for (int64_t r = 0; r < n.rows; ++r) {
    for (int64_t c = 0; c < n.columns; ++c) {
      const auto [sum, magnitude] = of.want(r, c);
      const double start = (biased ? of.bias[c] : 0.) + (add ? of.before[r * n.columns + c] : 0.);
      const double allowed = epsilon * (magnitude + std::fabs(start)) * (8 + std::sqrt(double(n.depth)));
      CHECK(std::fabs(out[r * n.columns + c] - sum - start) <= allowed, "a product");
    }
  }
}

}  // namespace

int main() {
  if (!ummrm::cpu::has_products()) return finish();
  for (const Sizes& n :
       {Sizes{1, 1, 1}, Sizes{0, 5, 3}, Sizes{5, 0, 3}, Sizes{6, 5, 0}, Sizes{7, 130, 19}, Sizes{213, 70, 530},
        Sizes{100, 259, 48}, Sizes{37, 64, 1100}, Sizes{1100, 9, 12}, Sizes{259, 50, 97}}) {
    for (const ProductKind kind : {ProductKind::forward, ProductKind::input_grad, ProductKind::weight_grad}) {
      for (const bool gathers : {false, true}) {
        compare(kind, n, gathers, false, false);
        compare(kind, n, gathers, true, false);
      }
      if (kind == ProductKind::forward) compare(kind, n, true, false, true);
    }
  }
  return finish();
}
