// expert_products.h: each kind of product, cut into pieces, against plain loops in double; and the same bits however it
// is cut. Operands end where a page begins that may not be read: sanitizers do not see what assembly reads.
#include "ummrm/expert_products.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

#include "testing.h"

using namespace testing;
using ummrm::cpu::Product;
using ummrm::cpu::ProductKind;
using ummrm::cpu::Rows;

namespace {

struct Sizes {
  int64_t rows, columns, depth;
};

// Floats whose last one lies before a page that is not accessible.
class Fenced {
 public:
  explicit Fenced(const std::vector<float>& values) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = values.size() * sizeof(float);
    size_ = (bytes + page - 1) / page * page + page;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED, "memory of a test");
    begin_ = static_cast<char*>(memory);
    CHECK(mprotect(begin_ + size_ - page, page, PROT_NONE) == 0, "a page that may not be read");
    data_ = reinterpret_cast<float*>(begin_ + size_ - page - bytes);
    std::copy(values.begin(), values.end(), data_);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(begin_, size_); }
  const float* data() const { return data_; }

 private:
  char* begin_;
  float* data_;
  size_t size_;
};

// Operands of one product, with room behind each row that must not be read into the result, and rows out of order.
struct Operands {
  ProductKind kind;
  Sizes n;
  int64_t pad = 3;
  std::vector<float> rows, grads, proj, bias, before;
  std::vector<int32_t> index;
  std::unique_ptr<Fenced> fenced_rows, fenced_grads, fenced_proj, fenced_bias;  // what products read

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
    if (count > 0) {  // behind the last row there is nothing
      rows.resize(rows.size() - pad);
      if (weight) grads.resize(grads.size() - pad);
    }
    fenced_rows = std::make_unique<Fenced>(rows);
    fenced_grads = std::make_unique<Fenced>(grads);
    fenced_proj = std::make_unique<Fenced>(proj);
    fenced_bias = std::make_unique<Fenced>(bias);
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
            Rows{fenced_rows->data(), of, row_stride()},
            weight ? Rows{fenced_grads->data(), of, n.rows + pad} : Rows{},
            fenced_proj->data(),
            kind == ProductKind::forward ? n.depth : n.columns,
            biased ? fenced_bias->data() : nullptr,
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
  std::vector<Line> memory(of.before.size() / 16 + 2);
  float* out = memory[0].elements;
  std::copy(of.before.begin(), of.before.end(), out);  // what is not written stays, and shows
  float* behind = out + of.before.size();
  std::fill(behind, memory.back().elements + 16, -7.f);
  std::vector<Product> pieces;
  ummrm::cpu::cut(of.product(out, add, biased), share, &pieces);
  for (size_t i = 0; share > 1 && i + 1 < pieces.size(); ++i) {  // what is fetched ahead shows in no result
    pieces[i].after = &pieces[i + 1];
    pieces[i].next = pieces[i + 1].rows;
    pieces[i].next_rows = of.kind == ProductKind::weight_grad ? of.n.depth : pieces[i + 1].out_rows;
    pieces[i].next_columns = of.kind == ProductKind::weight_grad ? of.n.columns : of.n.depth;
  }
  for (const Product& piece : pieces) {
    std::vector<float> scratch(ummrm::cpu::scratch_floats(piece) + 16, std::numeric_limits<float>::quiet_NaN());
    ummrm::cpu::multiply(piece, scratch.data());
  }
  CHECK(std::all_of(behind, memory.back().elements + 16, [](float x) { return x == -7.f; }),
        "a write behind the result");
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

void compare_all() {
  for (const Sizes& n : {Sizes{1, 1, 1}, Sizes{0, 5, 3}, Sizes{5, 0, 3}, Sizes{6, 5, 0}, Sizes{7, 130, 19},
                         Sizes{213, 70, 530}, Sizes{100, 259, 48}, Sizes{37, 64, 1100}, Sizes{1100, 9, 12},
                         Sizes{259, 50, 97}, Sizes{300, 144, 130}, Sizes{56, 96, 64}}) {
    for (const ProductKind kind : {ProductKind::forward, ProductKind::input_grad, ProductKind::weight_grad}) {
      for (const bool gathers : {false, true}) {
        compare(kind, n, gathers, false, false);
        compare(kind, n, gathers, true, false);
      }
      if (kind == ProductKind::forward) compare(kind, n, true, false, true);
    }
  }
}

}  // namespace

int main() {
  if (!ummrm::cpu::has_products()) return finish();
  for (const bool widest : {true, false}) {
    ummrm::cpu::use_widest(widest);
    compare_all();
  }
  return finish();
}
