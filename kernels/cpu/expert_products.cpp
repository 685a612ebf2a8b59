// CPU kernels of expert_products.h: which operand is packed, in which blocks, and how a product is cut into pieces.
// What is packed is what is least to move: rows of a group are few beside a projection's.
#include "ummrm/expert_products.h"

#include <algorithm>
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
constexpr int64_t kGradColumns = 256;  // of a piece of a weight gradient, packed beside its rows

// Rows are packed, transposed; the projection is read where it lies. For groups of fewer rows than the depth.
template <class S>
UMMRM_INLINE void multiply_packed_rows(const Product& p, float* scratch) {
  const int64_t step = depth_step(p.depth);
  for (int64_t first = 0; first == 0 || first < p.depth; first += step) {
    const int64_t depth = std::min(step, p.depth - first);
    for (int64_t row = 0; row < p.out_rows; row += S::kColumns) {
      const int64_t count = std::min<int64_t>(S::kColumns, p.out_rows - row);
      pack_transposed<S>(p.rows.from(row), count, first, depth, scratch + row * depth, round_up(count, S::kWidth));
    }
    in_tiles<S>(p.out_columns, [&]<int kTile>(int64_t column) UMMRM_INLINED {
      const float* a[kTile];
      for (int i = 0; i < kTile; ++i) a[i] = p.proj + (column + i) * p.proj_stride + first;
      for (int64_t row = 0; row < p.out_rows; row += S::kColumns) {
        const int64_t count = std::min<int64_t>(S::kColumns, p.out_rows - row);
        const Target target{p.out + row * p.out_stride + column, p.out_stride, p.add || first > 0,
                            p.bias == nullptr || p.add || first > 0 ? nullptr : p.bias + column};
        with_vectors<S>(count, [&]<int kVectors>() UMMRM_INLINED {
          row_tile<S, kTile, kVectors>(depth, a, scratch + row * depth, kVectors * S::kWidth, target, count);
        });
      }
    });
  }
}

// The projection is packed, transposed where it is the forward product's; rows are read where they lie.
template <class S>
UMMRM_INLINE void multiply_packed_proj(const Product& p, float* scratch) {
  const int64_t step = depth_step(p.depth);
  const bool forward = p.kind == ProductKind::forward;
  for (int64_t first = 0; first == 0 || first < p.depth; first += step) {
    const int64_t depth = std::min(step, p.depth - first);
    for (int64_t column = 0, count; column < p.out_columns; column += count) {
      count = next_panel<S>(p.out_columns - column);
      const int64_t width = round_up(count, S::kWidth);
      const Rows proj{p.proj, nullptr, p.proj_stride};
      const bool in_place = !forward && count == width;  // until the first tile has packed it
      if (forward) {
        pack_transposed<S>(proj.from(column), count, first, depth, scratch, width);
      } else if (!in_place) {
        pack<S>(proj, first, depth, column, count, scratch, width);
      }
      with_vectors<S>(count, [&]<int kVectors>() UMMRM_INLINED {
        in_tiles<S>(p.out_rows, [&]<int kTile>(int64_t row) UMMRM_INLINED {
          const float* a[kTile];
          for (int i = 0; i < kTile; ++i) a[i] = p.rows.at(row + i) + first;
          const Target target{p.out + row * p.out_stride + column, p.out_stride, p.add || first > 0,
                              p.bias == nullptr || p.add || first > 0 ? nullptr : p.bias + column};
          Aside aside;
          if (in_place && row == 0) {
            aside.pack = scratch;
          } else if (!forward) {  // the next panel's lines, which lie a row apart where no prefetcher sees them
            const int64_t line = (row / S::kRows - 1) * 16, next = column + count;
            const bool fetch = 0 <= line && line < S::kColumns && next + line < p.out_columns;
            aside.fetch = fetch ? proj.at(first) + next + line : nullptr;
            aside.fetch_stride = p.proj_stride;
          }
          const bool unpacked = aside.pack != nullptr;
          column_tile<S, kTile, kVectors, 1>(depth, a, unpacked ? proj.at(first) + column : scratch,
                                             unpacked ? p.proj_stride : width, target, count, aside);
        });
      });
    }
  }
}

// Both operands are packed: rows in panels, gradients in strips of a tile's rows.
template <class S>
UMMRM_INLINE void multiply_weight_grad(const Product& p, float* scratch) {
  const int64_t step = depth_step(p.depth);
  for (int64_t first = 0; first == 0 || first < p.depth; first += step) {
    const int64_t depth = std::min(step, p.depth - first);
    const bool once = !p.add && depth == p.depth;  // each line is written once, and read by nobody here
    const bool stream = once && p.out_stride % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 64 == 0;
    float* strips = scratch;
    for (int64_t k = 0; k < depth; ++k) {
      const float* from = p.grads.at(first + k);
      for (int64_t n = 0; n < p.out_rows; n += S::kRows) {
        float* to = strips + n * depth + k * S::kRows;
        if (n + S::kRows <= p.out_rows) {
          store_vector<S::kRows>(to, load_vector<S::kRows>(from + n));
        } else {
          std::copy_n(from + n, p.out_rows - n, to);
        }
      }
    }
    float* panel = scratch + round_up(p.out_rows, S::kRows) * depth;
    for (int64_t column = 0, count; column < p.out_columns; column += count) {
      count = next_panel<S>(p.out_columns - column);
      const int64_t width = round_up(count, S::kWidth);
      const bool in_place = p.rows.index == nullptr && count == width;
      if (!in_place) pack<S>(p.rows, first, depth, column, count, panel, width);
      with_vectors<S>(count, [&]<int kVectors>() UMMRM_INLINED {
        in_tiles<S>(p.out_rows, [&]<int kTile>(int64_t n) UMMRM_INLINED {
          // a tile at the end begins within a strip
          const float* strip = strips + n / S::kRows * S::kRows * depth + n % S::kRows;
          const float* a[kTile];
          for (int i = 0; i < kTile; ++i) a[i] = strip + i;
          const Target target{p.out + n * p.out_stride + column, p.out_stride, p.add || first > 0, nullptr, stream};
          const bool unpacked = in_place && n == 0;
          Aside aside;
          if (unpacked) aside.pack = panel;
          column_tile<S, kTile, kVectors, S::kRows>(depth, a, unpacked ? p.rows.at(first) + column : panel,
                                                    unpacked ? p.rows.stride : width, target, count, aside);
        });
      });
    }
  }
#if defined(__SSE2__)
  _mm_sfence();  // streamed stores are ordered with nothing else
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

// Which of the two shapes serves; the sanitizers' builds check the narrower one.
bool is_wide() {
#ifdef UMMRM_HAS_CLONES
  static const bool wide = std::string_view(isa()) == "x86-64-v4";
  return wide;
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
    rows = run_of(whole.out_rows, tile, kGradColumns, share);
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
  if (piece.kind == ProductKind::weight_grad) return (round_up(piece.out_rows, tile_rows()) + panel) * depth;
  return (piece.pack_rows ? round_up(piece.out_rows, panel) : panel) * depth;
}

void multiply(const Product& piece, float* scratch) {
  is_wide() ? multiply_wide(piece, scratch) : multiply_usual(piece, scratch);
}
#else
bool has_products() { return false; }
void cut(const Product&, int64_t, std::vector<Product>*) {}
int64_t scratch_floats(const Product&) { return 0; }
void multiply(const Product&, float*) {}
#endif

}  // namespace ummrm::cpu
