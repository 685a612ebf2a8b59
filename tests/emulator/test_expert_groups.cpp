// The tables that expert_groups.cu writes for grouped products, against plain loops that follow them: every product
// that the tables describe is carried out, and the result compared with each expert's own, computed from its rows. And
// the choice of tiles, which is plain C++.
#include "expert_groups.cu"

#include "emulated.h"
#include "expert_tiles.h"

using namespace testing;
using namespace ummrm;
using namespace ummrm::cuda;

struct Case {
  int64_t tokens, num_shared, slots, width, other, band;
  std::vector<int32_t> offsets;
  bool one_row_a_token;

  int64_t experts() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t rows() const { return num_shared * tokens + slots; }
  int64_t shared_rows() const { return one_row_a_token ? tokens : num_shared * tokens; }
};

// Memory of a call, on 16-byte boundaries; fresh results are NaN.
struct Tables {
  std::vector<uint4> memory;
  GroupTables at;

  explicit Tables(int64_t problems) {
    Workspace sizes(nullptr);
    take_tables(sizes, problems);
    CHECK(sizes.bytes() % 256 == 0, "pieces are 256-aligned");
    memory.resize(static_cast<size_t>(sizes.bytes()) / sizeof(uint4) + 1);
    std::memset(memory.data(), 0xff, memory.size() * sizeof(uint4));
    Workspace workspace(memory.data());
    at = take_tables(workspace, problems);
    CHECK(workspace.bytes() == sizes.bytes(), "the same count with and without memory");
  }
};

static void check_order(const GroupTables& tables, int64_t groups, int64_t bands, bool rows_reduced) {
  const auto rows = [&](int64_t group) {
    const GroupShape& shape = tables.shapes[group * bands];
    return rows_reduced ? shape.k : shape.m;
  };
  for (int64_t g = 1; g < groups; ++g) CHECK(rows(g - 1) >= rows(g), "group %d is larger than the one before", int(g));
  for (int64_t p = 0; p < groups * bands; ++p) {
    const GroupShape& s = tables.shapes[p];
    CHECK((s.m > 0 && s.n > 0 && s.k > 0) || (s.m == 0 && s.n == 0 && s.k == 0), "problem %d is %dx%dx%d", int(p), s.m,
          s.n, s.k);
  }
}

// d = a x b + bias of every problem of the tables; float throughout. `a` has a row of d in a row, or with rows_reduced
// in a column; b is [columns, reduced] if b_columns_first, else [reduced, columns].
template <class Shapes>
static void carry_out(const GroupTables& tables, int64_t problems, const Shapes& shapes, bool rows_reduced,
                      bool b_columns_first) {
  for (int64_t p = 0; p < problems; ++p) {
    const GroupShape s = shapes[p];
    const auto* a = static_cast<const float*>(tables.a[p]);
    const auto* b = static_cast<const float*>(tables.b[p]);
    const auto* bias = static_cast<const float*>(tables.bias[p]);
    auto* d = static_cast<float*>(tables.d[p]);
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.n; ++j) {
        float sum = bias == nullptr ? 0.f : bias[i * tables.bias_stride[p] + j];
        for (int64_t k = 0; k < s.k; ++k) {
          const float left = a[rows_reduced ? k * tables.a_stride[p] + i : i * tables.a_stride[p] + k];
          sum += left * b[b_columns_first ? j * tables.b_stride[p] + k : k * tables.b_stride[p] + j];
        }
        d[i * tables.d_stride[p] + j] = sum;
      }
    }
  }
}

struct Run {
  Array out;
  std::vector<GroupShape> shapes;
  bool operator==(const Run& other) const {
    return out.same_bits(other.out) && shapes.size() == other.shapes.size() &&
           std::equal(shapes.begin(), shapes.end(), other.shapes.begin(),
                      [](const GroupShape& a, const GroupShape& b) { return a.m == b.m && a.n == b.n && a.k == b.k; });
  }
};

enum class Biases { none, both, shared, routed };

static void products(const Case& c, bool transpose, Biases biases) {
  Random random(c.tokens * 7 + c.slots);
  const int64_t in = c.width, out_width = c.other, experts = c.experts();
  const Array shared = random.array(DType::f32, c.shared_rows() * in), routed = random.array(DType::f32, c.slots * in);
  const Array shared_proj = random.array(DType::f32, c.num_shared * in * out_width);
  const Array routed_proj = random.array(DType::f32, experts * in * out_width);
  const Array shared_bias = random.array(DType::f32, c.num_shared * out_width);
  const Array routed_bias = random.array(DType::f32, experts * out_width),
              zeros = random.array(DType::f32, out_width, 0);
  const bool bias_shared = biases == Biases::both || biases == Biases::shared;
  const bool bias_routed = biases == Biases::both || biases == Biases::routed;
  const auto run = [&] {
    Placed out(DType::f32, c.rows() * out_width, true);
    const ExpertGemm args{DType::f32,
                          c.tokens,
                          c.num_shared,
                          experts,
                          c.slots,
                          in,
                          out_width,
                          transpose,
                          c.one_row_a_token,
                          shared.data(),
                          routed.data(),
                          shared_proj.data(),
                          routed_proj.data(),
                          bias_shared ? shared_bias.data() : nullptr,
                          bias_routed ? routed_bias.data() : nullptr,
                          c.offsets.data(),
                          out.data()};
    const ExpertGroups groups = groups_of(args, c.band, zeros.data());
    Tables tables(groups.problems());
    check_launch(expert_groups(groups, tables.at, nullptr), "expert_groups");
    check_order(tables.at, groups.groups(), groups.bands(), false);
    carry_out(tables.at, groups.problems(), tables.at.shapes, false, !transpose);
    return Run{out.array(), {tables.at.shapes, tables.at.shapes + groups.problems()}};
  };
  const Run got = under_all_orders("expert_groups", run, [](const Run& a, const Run& b) { return a == b; });
  for (int64_t row = 0; row < c.rows(); ++row) {
    const bool is_shared = row < c.num_shared * c.tokens;
    const int64_t sorted = row - c.num_shared * c.tokens;
    int64_t expert = is_shared ? row / c.tokens : 0;
    while (!is_shared && expert < experts && sorted >= c.offsets[expert + 1]) ++expert;
    for (int64_t j = 0; j < out_width; ++j) {
      double want = 0, size = 0;
      const int64_t from = is_shared ? (c.one_row_a_token ? row % c.tokens : row) : sorted;
      for (int64_t k = 0; k < in && expert < (is_shared ? c.num_shared : experts); ++k) {
        const int64_t proj = expert * in * out_width + (transpose ? k * out_width + j : j * in + k);
        const double term =
            (is_shared ? shared : routed)[from * in + k] * (is_shared ? shared_proj : routed_proj)[proj];
        want += term;
        size += std::fabs(term);
      }
      const bool none = !is_shared && expert == experts;
      if (is_shared && bias_shared) want += shared_bias[expert * out_width + j];
      if (!is_shared && bias_routed && !none) want += routed_bias[expert * out_width + j];
      check_close(got.out, row * out_width + j, want, none ? 0 : 1e-5 * (size + 1),
                  none ? "a row of no expert" : "out");
    }
  }
}

static void gradients(const Case& c, bool need_shared, bool need_routed, bool one_grad_row_a_token) {
  Random random(c.tokens * 5 + c.slots);
  const int64_t width = c.width, grad_width = c.other, experts = c.experts();
  const int64_t grad_rows = one_grad_row_a_token ? c.tokens : c.num_shared * c.tokens;
  const Array shared = random.array(DType::f32, c.shared_rows() * width),
              routed = random.array(DType::f32, c.slots * width);
  const Array grad_shared = random.array(DType::f32, grad_rows * grad_width);
  const Array grad_routed = random.array(DType::f32, c.slots * grad_width);
  const int64_t shared_size = c.num_shared * width * grad_width;
  const auto run = [&] {
    Placed shared_grad(DType::f32, shared_size, true), routed_grad(DType::f32, experts * width * grad_width, true);
    const ExpertGemmWgrad args{DType::f32,
                               DType::f32,
                               c.tokens,
                               c.num_shared,
                               experts,
                               c.slots,
                               width,
                               grad_width,
                               c.one_row_a_token,
                               one_grad_row_a_token,
                               shared.data(),
                               routed.data(),
                               grad_shared.data(),
                               grad_routed.data(),
                               c.offsets.data(),
                               need_shared ? shared_grad.data() : nullptr,
                               need_routed ? routed_grad.data() : nullptr};
    const ExpertGroups groups = groups_of(args, c.band);
    Tables tables(groups.problems());
    check_launch(expert_groups(groups, tables.at, nullptr), "expert_groups");
    check_order(tables.at, groups.groups(), groups.bands(), true);
    carry_out(tables.at, groups.problems(), tables.at.shapes, true, false);
    Array both = shared_grad.array();
    const Array second = routed_grad.array();
    both.size += second.size;
    both.bytes.insert(both.bytes.end(), second.bytes.begin(), second.bytes.end());
    return Run{both, {tables.at.shapes, tables.at.shapes + groups.problems()}};
  };
  const Run got = under_all_orders("expert_groups", run, [](const Run& a, const Run& b) { return a == b; });
  for (int64_t group = 0; group < c.num_shared + experts; ++group) {
    const bool is_shared = group < c.num_shared;
    const int64_t expert = is_shared ? group : group - c.num_shared, first = is_shared ? 0 : c.offsets[expert];
    const int64_t last = is_shared ? c.tokens : c.offsets[expert + 1];
    for (int64_t i = 0; i < grad_width * width; ++i) {
      const int64_t at = group * grad_width * width + i;
      if (!(is_shared ? need_shared : need_routed)) {
        CHECK(std::isnan(got.out[at]), "a gradient that is not needed was written");
        continue;
      }
      double want = 0, size = 0;
      for (int64_t row = first; row < last; ++row) {
        const int64_t left = is_shared && !one_grad_row_a_token ? expert * c.tokens + row : row;
        const int64_t right = is_shared && !c.one_row_a_token ? expert * c.tokens + row : row;
        const double term = (is_shared ? grad_shared : grad_routed)[left * grad_width + i / width] *
                            (is_shared ? shared : routed)[right * width + i % width];
        want += term;
        size += std::fabs(term);
      }
      check_close(got.out, at, want, first == last ? 0 : 1e-5 * (size + 1), "gradient");
    }
  }
}

static void tiles() {
  const auto choose = [](int64_t rows, int64_t columns, int64_t other, ExpertProduct product) {
    return choose_tile(90, 100, {product, 9, rows, columns, other});  // a GPU that nobody has measured
  };
  const TileChoice large = choose(16384, 28672, 4096, ExpertProduct::forward);
  CHECK(large.tile == 0 && large.band == kBandColumns, "wide experts: tile %d, band %d", large.tile, int(large.band));
  CHECK(choose(16384, 5632, 1024, ExpertProduct::forward).tile == kSm90SmallTile, "a short reduction");
  CHECK(choose(16384, 5632, 1024, ExpertProduct::forward).band == 5632, "what the L2 cache holds is not cut");
  CHECK(choose(256, 4096, 4096, ExpertProduct::forward).tile == kSm90SmallTile, "few tiles");
  CHECK(choose(16384, 896, 4864, ExpertProduct::forward).tile == kSm90OddTile, "columns that large tiles waste");
  CHECK(choose(300, 896, 4864, ExpertProduct::forward).tile == kSm90SmallTile, "rows that tall clusters waste");
  CHECK(choose(600, 896, 4864, ExpertProduct::forward).tile == kSm90OddTile, "more columns wasted than rows");
  CHECK(choose(300, 9728, 4096, ExpertProduct::forward).tile == kSm90SmallTile, "short groups");
  CHECK(choose(4096, 896, 1152, ExpertProduct::weight_grad).tile == kSm90OddTile, "128 columns of 1152 rows wasted");
  CHECK(choose(4096, 1152, 896, ExpertProduct::weight_grad).tile == kSm90SmallTile, "128 rows of 1152 columns wasted");
  CHECK(choose(16384, 4096, 28672, ExpertProduct::weight_grad).tile == 0, "a long weight gradient");
  CHECK(choose(512, 4096, 28672, ExpertProduct::weight_grad).tile == kSm90SmallTile, "a short weight gradient");
  CHECK(choose_tile(80, 108, {ExpertProduct::forward, 9, 100, 4096, 512}).tile == kSm80SmallTile, "another GPU");
  CHECK(floor_log2(0) == -1 && floor_log2(1) == 0 && floor_log2(1023) == 9 && floor_log2(1024) == 10, "floor_log2");
  for (const MeasuredTile& row : kMeasuredTiles) {
    const int count = row.arch == 90 ? kSm90TileCount : row.arch == 80 ? kSm80TileCount : 1;
    CHECK(row.tile >= 0 && row.tile < count, "a measured tile that does not exist");
    CHECK(row.arch == 0 || (row.band > 0 && (row.band % 256 == 0 || row.band == row.columns)), "a band cuts tiles");
  }
}

int main() {
  const Case cases[] = {
      {3, 1, 6, 8, 24, 8, {0, 2, 6}, true},                    // three bands
      {4, 2, 12, 8, 20, 8, {0, 0, 7, 7, 9}, false},            // experts without rows, rows of no expert, a narrow band
      {5, 1, 10, 4, 8, 8, {0, 0, 0}, true},                    // every routed row masked
      {0, 1, 0, 8, 8, 8, {0, 0}, true},                        // nothing at all: the shared gradient is still zero
      {2, 0, 4, 8, 8, 16, {0, 1, 4}, true},                    // no shared expert
      {3, 2, 3, 8, 8, 8, {0}, true},                           // no routed expert
      {2, 1, 80, 4, 4, 4, std::vector<int32_t>(41), true},     // more groups than a warp
      {2, 1, 700, 4, 300, 4, std::vector<int32_t>(8), false},  // more problems than a block has threads
  };
  for (Case c : cases) {
    if (c.offsets.size() > 5)
      for (size_t i = 1; i < c.offsets.size(); ++i)
        c.offsets[i] =
            static_cast<int32_t>(std::min<int64_t>(c.slots, c.offsets[i - 1] + static_cast<int64_t>(i * 5 % 7)));
    if (kSmallOnly && c.slots > 100) continue;
    for (const Biases biases : {Biases::none, Biases::both, Biases::shared, Biases::routed}) products(c, false, biases);
    products(c, true, Biases::none);
    for (const bool shared : {true, false})
      for (const bool routed : {true, false}) gradients(c, shared, routed, routed);
    gradients(c, true, true, false);
  }
  Tables tables(1);
  ExpertGroups many = {};
  many.num_experts = kMaxGroups + 1;
  many.band = 1;
  CHECK(expert_groups(many, tables.at, nullptr) != 0, "more groups than a launch takes");
  tiles();
  return finish();
}
