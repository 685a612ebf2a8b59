// What a grouped GEMM of CUTLASS reads of its problems, written on the device by one small launch, since only the
// device knows how many rows each expert has: shapes, addresses and strides, largest groups first. The same launch
// zeroes what no product writes: sorted rows past the last offset, and gradients of experts without rows. Knows nothing
// of CUTLASS.
#pragma once

#include <cstdint>

#include "launch.cuh"
#include "ummrm/expert_gemm.h"
#include "ummrm/expert_glu.h"

namespace ummrm::cuda {

inline constexpr int64_t kMaxGroups = 512;  // shared and routed experts of one launch

// Three ints, as both of CUTLASS's interfaces read a problem's shape.
struct GroupShape {
  int32_t m, n, k;
};

// Where an operand of a group's product begins: at its expert's tensor, or at its first row; then at its band of
// columns.
struct GroupOperand {
  const char *shared, *routed;       // of the first shared and the first routed expert
  int64_t shared_step, routed_step;  // bytes from an expert to the next; for routed operands by rows, from row to row
  int64_t band_step;                 // bytes from a band to the next
  bool by_row;                       // routed operands begin at the group's first sorted row
  int64_t row_stride;                // in elements, what CUTLASS is told
};

// A combined row buffer's sorted rows. Null: none.
struct GroupRows {
  const char* routed;
  int64_t bytes;  // of a row; a multiple of 16
};
inline constexpr int kMoreRows = 1;

// A product a group: a x b into d, `columns` wide, cut into bands of `band` columns that are problems of their own. So
// many tiles that run at once share what they read: a persistent schedule walks a problem's tiles along its columns,
// and with thousands of them would stream the whole of b through the L2 cache for every few rows. (CUTLASS has a
// swizzle for this; it does nothing when shapes are on the device alone, and rounds each group up to whole swizzles.)
struct ExpertGroups {
  int64_t tokens, slots;
  int64_t num_shared, num_experts;  // those that take part
  const int32_t* expert_offsets;
  bool rows_reduced;  // the product sums over rows (a weight gradient); else rows are those of d
  int64_t other;      // the size of a group's product that is neither rows nor columns
  int64_t columns, band;
  GroupOperand a, b, d, bias;
  bool biased;    // else `bias` is null
  int64_t bytes;  // of d by row, else of one expert's; a multiple of 16
  bool paired;    // a problem's columns are two halves of one width, as gate and up: bands count either half's
  GroupRows more[kMoreRows];  // buffers by row beside d, whose rows of no group are zeroed as well
  bool summed;                // d keeps what is there where a group has no rows

  __host__ __device__ int64_t groups() const { return num_shared + num_experts; }
  __host__ __device__ int64_t bands() const { return ceil_div(columns, band); }
  __host__ __device__ int64_t problems() const { return groups() * bands(); }
};

// On the device, an entry a problem. Problems without rows come last and are 0 x 0 x 0.
struct GroupTables {
  GroupShape* shapes;
  const void** a;
  const void** b;
  const void** bias;
  void** d;
  int64_t *a_stride, *b_stride, *bias_stride, *d_stride;
  int64_t *first_row, *first_column;  // of d: in the combined buffer, and of the band (of either half where paired)
};

// `zeros`, out_width elements, stands in for the bias that one kind of expert lacks while the other has one.
ExpertGroups groups_of(const ExpertGemm& args, int64_t band, const void* zeros);
ExpertGroups groups_of(const ExpertGemmWgrad& args, int64_t band);
ExpertGroups groups_of(const ExpertGlu& args, int64_t band, const void* zeros);
ExpertGroups groups_of(const ExpertGluBackward& args, int64_t band);

// Cuts workspaces: pieces of 256 aligned bytes; from a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

GroupTables take_tables(Workspace& workspace, int64_t problems);

// Fills the tables and zeroes the rest of d.
int expert_groups(const ExpertGroups& groups, const GroupTables& tables, Stream stream);

}  // namespace ummrm::cuda
