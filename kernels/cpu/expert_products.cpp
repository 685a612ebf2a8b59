// CPU kernels of expert_products.h: which operand is packed, in which blocks, and how a product is cut into pieces.
// What is packed is what is least to move: rows of a group are few beside a projection's.
#include "ummrm/expert_products.h"

#include <algorithm>
#include <atomic>
#include <string_view>

#include "dispatch.h"
#include "product_tile.h"
#include "ummrm/cpu_info.h"

namespace ummrm::cpu {

#ifdef UMMRM_HAS_VECTORS
namespace {

constexpr int64_t kRowPanels = 4;  // of a piece whose rows are packed
constexpr int64_t kRowsAPiece = 1024;
constexpr int64_t kLeastColumns = 128;
constexpr int64_t kStripSteps = 16;    // of the depth that strips are packed by: their lines may share a cache's set
constexpr int64_t kGradColumns = 256;  // packed at a time for a weight gradient, beside its rows

// Fetches a product's `next` rows, some lines at each of `times` calls.
class Next {
 public:
  Next(const Product& p, int64_t times)
      : rows_(p.next), count_(p.next_rows), lines_((p.next_columns + kLine - 1) / kLine) {
    at_once_ = count_ * lines_ / std::max<int64_t>(times, 1) + 1;
  }
  UMMRM_INLINE void fetch() {
    for (int64_t i = 0; i < at_once_ && row_ < count_; ++i) {
      __builtin_prefetch(rows_.at(row_) + line_ * kLine, 0, 2);
      if (++line_ == lines_) {
        line_ = 0;
        ++row_;
      }
    }
  }

 private:
  Rows rows_;
  int64_t count_, lines_, at_once_, row_ = 0, line_ = 0;
};

// What a product reads of its projection first.
template <class S>
UMMRM_INLINE Ahead first_block(const Product* p, int64_t steps) {
  if (p == nullptr) return {};
  const int64_t depth = std::min(depth_step(p->depth), p->depth);
  if (p->pack_rows)
    return Ahead::of(p->proj, std::min<int64_t>(S::kRows, p->out_columns), depth, p->proj_stride, steps);
  return Ahead::of(p->proj, depth, next_panel<S>(p->out_columns), p->proj_stride, steps);
}

// Rows are packed, transposed; the projection is read where it lies. For groups of fewer rows than the depth.
template <class S>
UMMRM_INLINE void multiply_packed_rows(const Product& p, float* scratch) {
  const int64_t step = depth_step(p.depth), panels = (p.out_rows + S::kColumns - 1) / S::kColumns;
  Next next(p, (p.depth + step - 1) / step * (p.out_columns / S::kRows) * panels);
  for (int64_t first = 0; first == 0 || first < p.depth; first += step) {
    const int64_t depth = std::min(step, p.depth - first);
    for (int64_t row = 0; row < p.out_rows; row += S::kColumns) {
      const int64_t count = std::min<int64_t>(S::kColumns, p.out_rows - row);
      pack_transposed<S>(p.rows.from(row), count, first, depth, scratch + row * depth, round_up(count, S::kWidth));
    }
    in_tiles<S>(p.out_columns, [&]<int kTile>(int64_t column) UMMRM_INLINED {
      Ahead ahead;  // the next columns' rows of the projection, or the first ones' next part
      const bool here = column + kTile < p.out_columns;
      if (here || first + step < p.depth) {
        const float* from = p.proj + (here ? (column + kTile) * p.proj_stride + first : first + step);
        const int64_t count = std::min<int64_t>(S::kRows, p.out_columns - (here ? column + kTile : 0));
        ahead = Ahead::of(from, count, depth, p.proj_stride, panels * depth);
      } else {
        ahead = first_block<S>(p.after, panels * depth);
      }
      const Numbers numbers{p.proj + column * p.proj_stride + first, p.proj_stride, 1};
      for (int64_t row = 0; row < p.out_rows; row += S::kColumns) {
        const int64_t count = std::min<int64_t>(S::kColumns, p.out_rows - row);
        const bool add = p.add || first > 0;
        const Target target{p.out + row * p.out_stride + column, p.out_stride, add,
                            p.bias == nullptr || add ? nullptr : p.bias + column};
        next.fetch();
        with_vectors<S>(count, [&]<int kVectors>() UMMRM_INLINED {
          row_tile<S, kTile, kVectors>(depth, numbers, scratch + row * depth, kVectors * S::kWidth, target, count,
                                       &ahead);
        });
      }
    });
  }
}

// The projection is packed, transposed where it is the forward product's. Rows are read where they lie, or in strips of
// a tile's where they are gathered.
template <class S>
UMMRM_INLINE void multiply_packed_proj(const Product& p, float* scratch) {
  const int64_t step = depth_step(p.depth);
  const bool forward = p.kind == ProductKind::forward, gathers = p.rows.index != nullptr;
  const Rows proj{p.proj, nullptr, p.proj_stride};
  Next next(p, (p.depth + step - 1) / step * (p.out_columns / S::kColumns) * (p.out_rows / S::kRows));
  for (int64_t first = 0; first == 0 || first < p.depth; first += step) {
    const int64_t depth = std::min(step, p.depth - first);
    float* strips = scratch + S::kColumns * depth;
    for (int64_t row = 0; gathers && row < p.out_rows; row += S::kRows) {
      pack_transposed<S>(p.rows.from(row), std::min<int64_t>(S::kRows, p.out_rows - row), first, depth,
                         strips + row * depth, S::kRows);
    }
    for (int64_t column = 0, count; column < p.out_columns; column += count) {
      count = next_panel<S>(p.out_columns - column);
      const int64_t width = round_up(count, S::kWidth);
      const bool in_place = !forward && count == width;  // until the first tile has packed it
      if (forward) {
        pack_transposed<S>(proj.from(column), count, first, depth, scratch, width);
      } else if (!in_place) {
        pack<S>(proj, first, depth, column, count, scratch, width);
      }
      Ahead ahead;  // the next panel, whose lines lie a row apart, where no prefetcher sees them
      const bool here = column + count < p.out_columns;
      if (!forward && (here || first + step < p.depth)) {
        const int64_t after = here ? column + count : 0, block = here ? first : first + step;
        ahead = Ahead::of(proj.at(block) + after, std::min(step, p.depth - block), next_panel<S>(p.out_columns - after),
                          p.proj_stride, depth * (p.out_rows / S::kRows));
      } else if (!forward) {
        ahead = first_block<S>(p.after, depth * (p.out_rows / S::kRows));
      }
      with_vectors<S>(count, [&]<int kVectors>() UMMRM_INLINED {
        in_tiles<S>(p.out_rows, [&]<int kTile>(int64_t row) UMMRM_INLINED {
          // a tile at the end begins within a strip
          const float* strip = strips + row / S::kRows * S::kRows * depth + row % S::kRows;
          const Numbers numbers =
              gathers ? Numbers{strip, 1, S::kRows} : Numbers{p.rows.at(row) + first, p.rows.stride, 1};
          const bool add = p.add || first > 0;
          const Target target{p.out + row * p.out_stride + column, p.out_stride, add,
                              p.bias == nullptr || add ? nullptr : p.bias + column};
          const bool unpacked = in_place && row == 0;
          next.fetch();
          column_tile<S, kTile, kVectors>(depth, numbers, unpacked ? proj.at(first) + column : scratch,
                                          unpacked ? p.proj_stride : width, target, count, unpacked ? scratch : nullptr,
                                          &ahead);
        });
      });
    }
  }
}

// Both operands are packed, rows in panels and gradients in strips of a tile's rows, kGradColumns of them at a time.
template <class S>
UMMRM_INLINE void multiply_weight_grad(const Product& p, float* scratch) {
  const int64_t step = depth_step(p.depth);
  // fetched ahead is the larger operand, where it isn't gathered; the other one stays in a cache
  const bool rows_ahead = p.rows.index == nullptr && (p.out_columns > p.out_rows || p.grads.index != nullptr);
  for (int64_t first = 0; first == 0 || first < p.depth; first += step) {
    const int64_t depth = std::min(step, p.depth - first);
    const bool once = !p.add && depth == p.depth;  // each line is written once, and read by nobody here
    const bool stream = once && p.out_stride % kLine == 0 && reinterpret_cast<uintptr_t>(p.out) % 64 == 0;
    for (int64_t begin = 0; begin < p.out_rows; begin += kGradColumns) {
      const int64_t height = std::min(kGradColumns, p.out_rows - begin);
      float* strips = scratch;
      for (int64_t block = 0; block < depth; block += kStripSteps) {
        const int64_t end = std::min(block + kStripSteps, depth);
        for (int64_t n = 0; n < height; n += S::kRows) {
          float* to = strips + n * depth + block * S::kRows;
          for (int64_t k = block; k < end; ++k, to += S::kRows) {
            const float* from = p.grads.at(first + k) + begin + n;
            if (n + S::kRows <= height) {
              store_vector<S::kRows>(to, load_vector<S::kRows>(from));
            } else {
              std::copy_n(from, height - n, to);
            }
          }
        }
      }
      float* panel = scratch + round_up(height, S::kRows) * depth;
      Ahead ahead;
      const int64_t steps = depth * (height / S::kRows), left = p.out_rows - begin - height;
      if (!rows_ahead && p.grads.index == nullptr && left > 0) {
        ahead = Ahead::of(p.grads.at(first) + begin + height, depth, std::min(kGradColumns, left), p.grads.stride,
                          steps * (p.out_columns / S::kColumns));
      }
      for (int64_t column = 0, count; column < p.out_columns; column += count) {
        count = next_panel<S>(p.out_columns - column);
        const int64_t width = round_up(count, S::kWidth);
        const bool in_place = p.rows.index == nullptr && count == width;
        if (!in_place) pack<S>(p.rows, first, depth, column, count, panel, width);
        if (rows_ahead && column + count < p.out_columns) {
          ahead = Ahead::of(p.rows.at(first) + column + count, depth, next_panel<S>(p.out_columns - column - count),
                            p.rows.stride, steps);
        }
        with_vectors<S>(count, [&]<int kVectors>() UMMRM_INLINED {
          in_tiles<S>(height, [&]<int kTile>(int64_t n) UMMRM_INLINED {
            // a tile at the end begins within a strip
            const Numbers numbers{strips + n / S::kRows * S::kRows * depth + n % S::kRows, 1, S::kRows};
            const Target target{p.out + (begin + n) * p.out_stride + column, p.out_stride, p.add || first > 0, nullptr,
                                stream};
            const bool unpacked = in_place && n == 0;
            column_tile<S, kTile, kVectors>(depth, numbers, unpacked ? p.rows.at(first) + column : panel,
                                            unpacked ? p.rows.stride : width, target, count, unpacked ? panel : nullptr,
                                            &ahead);
          });
        });
      }
    }
  }
#if defined(__SSE2__)
  __builtin_ia32_sfence();  // streamed stores are ordered with nothing else
#endif
}

template <class S>
UMMRM_INLINE void multiply_body(const Product& p, float* scratch) {
  if (p.kind == ProductKind::weight_grad) return multiply_weight_grad<S>(p, scratch);
  p.pack_rows ? multiply_packed_rows<S>(p, scratch) : multiply_packed_proj<S>(p, scratch);
}

using Wide = Shape<16, 8, 3>;  // 32 registers of 16
using Usual = Shape<8, 4, 3>;  // 16 registers of 8

#ifdef UMMRM_HAS_CLONES
__attribute__((target("arch=x86-64-v4"))) void multiply_wide(const Product& p, float* scratch) {
  multiply_body<Wide>(p, scratch);
}
__attribute__((target("arch=x86-64-v3"))) void multiply_usual(const Product& p, float* scratch) {
  multiply_body<Usual>(p, scratch);
}
#else
void multiply_wide(const Product& p, float* scratch) { multiply_body<Wide>(p, scratch); }
void multiply_usual(const Product& p, float* scratch) { multiply_body<Usual>(p, scratch); }
#endif

std::atomic<bool> widest{true};

// Which of the two shapes serves; the sanitizers' builds check the narrower one.
bool is_wide() {
#ifdef UMMRM_HAS_CLONES
  static const bool wide = std::string_view(isa()) == "x86-64-v4";
  return wide && widest;
#else
  return false;
#endif
}

int64_t tile_rows() { return is_wide() ? Wide::kRows : Usual::kRows; }
int64_t panel_columns() { return is_wide() ? Wide::kColumns : Usual::kColumns; }

// `total` in runs that are equal but for whole `unit`s, each at most `most` and about as many as wanted.
int64_t run_of(int64_t total, int64_t unit, int64_t most, int64_t wanted) {
  if (total == 0) return unit;
  const int64_t runs = std::max<int64_t>({1, (total + most - 1) / most, std::min(wanted, total / unit)});
  return round_up((total + runs - 1) / runs, unit);
}

Product piece_of(const Product& whole, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Product piece = whole;
  piece.out_rows = rows;
  piece.out_columns = columns;
  piece.out += row * whole.out_stride + column;
  if (whole.kind == ProductKind::weight_grad) {
    piece.grads.data += row;
    piece.rows.data += column;
    return piece;
  }
  piece.rows = whole.rows.from(row);
  piece.proj += whole.kind == ProductKind::forward ? column * whole.proj_stride : column;
  if (whole.bias != nullptr) piece.bias += column;
  return piece;
}

}  // namespace

void use_widest(bool on) { widest = on; }

bool has_products() {
#if defined(UMMRM_HAS_CLONES)
  static const bool found = std::string_view(isa()) != "baseline";
  return found;
#elif defined(UMMRM_NO_CLONES)
  return true;
#else
  return false;
#endif
}

void cut(const Product& product, int64_t share, std::vector<Product>* pieces) {
  Product whole = product;
  whole.pack_rows = whole.kind == ProductKind::forward && whole.out_rows < whole.depth;
  const int64_t panel = panel_columns(), tile = tile_rows();
  int64_t rows, columns = whole.out_columns;
  if (whole.kind == ProductKind::weight_grad) {
    rows = run_of(whole.out_rows, tile, whole.out_rows, share);
  } else if (whole.pack_rows) {
    rows = run_of(whole.out_rows, panel, kRowPanels * panel, 1);
    const int64_t blocks = (whole.out_rows + rows - 1) / rows;
    columns = run_of(whole.out_columns, kLeastColumns, whole.out_columns, share / std::max<int64_t>(blocks, 1));
  } else {
    rows = run_of(whole.out_rows, tile, kRowsAPiece, 1);
    const int64_t blocks = (whole.out_rows + rows - 1) / rows;
    columns = run_of(whole.out_columns, panel, whole.out_columns, share / std::max<int64_t>(blocks, 1));
  }
  for (int64_t row = 0; row < whole.out_rows; row += rows) {
    for (int64_t column = 0; column < whole.out_columns; column += columns) {
      pieces->push_back(piece_of(whole, row, std::min(rows, whole.out_rows - row), column,
                                 std::min(columns, whole.out_columns - column)));
    }
  }
}

int64_t scratch_floats(const Product& piece) {
  const int64_t depth = depth_step(piece.depth), panel = panel_columns();
  if (piece.kind == ProductKind::weight_grad) {
    return (round_up(std::min(piece.out_rows, kGradColumns), tile_rows()) + panel) * depth;
  }
  const int64_t strips = piece.rows.index == nullptr ? 0 : round_up(piece.out_rows, tile_rows());
  return (piece.pack_rows ? round_up(piece.out_rows, panel) : panel + strips) * depth;
}

void multiply(const Product& piece, float* scratch) {
  is_wide() ? multiply_wide(piece, scratch) : multiply_usual(piece, scratch);
}
#else
bool has_products() { return false; }
void use_widest(bool) {}
void cut(const Product&, int64_t, std::vector<Product>*) {}
int64_t scratch_floats(const Product&) { return 0; }
void multiply(const Product&, float*) {}
#endif

}  // namespace ummrm::cpu
