// Products that end in registers: what stands around the CUTLASS instances (tables, bands, workspaces, the sums of
// dots) and the endings themselves, on sums that one warp computes by plain loops and holds as tensor cores leave them.
#define UMMRM_SM80
#include "expert_glu.cu"

#include "emulated.h"
#include "expert_groups.cu"
#include "row_endings.cuh"
#include "tensor_cores.cu"

using namespace testing;
using namespace ummrm;
using namespace ummrm::cuda;

static constexpr int kTileRows = 16, kTileColumns = 64;

// Every tile of every problem, a block each problem. Sums outside of it are NaN, which nothing may read.
template <class Ending, bool rows_reduced, bool columns_first>
static __global__ void product_kernel(GroupTables tables, int64_t pair_rows, typename Ending::Launch launch) {
  const int p = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x);
  const GroupShape s = tables.shapes[p];
  const auto* a = static_cast<const bf16*>(tables.a[p]);
  const auto* b = static_cast<const bf16*>(tables.b[p]);
  const int columns = s.n / Ending::kSides, step = kTileColumns / Ending::kSides;
  for (int row = 0; row < s.m; row += kTileRows) {
    for (int column = 0; column < columns; column += step) {
      const auto row_of = [&](int i) { return row + lane / 4 + 8 * i; };
      const auto sums = [&](int block, int i, int c) {
        const int side = block / (step / 8), j = column + block % (step / 8) * 8 + lane % 4 * 2 + c;
        if (row_of(i) >= s.m || j >= columns) return std::nanf("");
        const int64_t at = j + side * pair_rows;
        float sum = 0;
        for (int64_t k = 0; k < s.k; ++k) {
          sum += load_one<bf16>(
                     a, rows_reduced ? k * tables.a_stride[p] + row_of(i) : row_of(i) * tables.a_stride[p] + k) *
                 load_one<bf16>(b, columns_first ? at * tables.b_stride[p] + k : k * tables.b_stride[p] + at);
        }
        return sum;
      };
      finish_rows<8, 2, 1>(Ending(launch, p), sums, row_of, s.m, column, columns);
    }
  }
}

static int64_t scratch(int sms) { return 48 * sms; }

GroupedGlu ummrm::cuda::sm80::glu(int) {
  return {&scratch, [](const GroupedProduct& product, const ExpertGlu& args, Stream stream) {
            return launch(product_kernel<FusedGlu, false, true>, product.problems, kWarp, stream, product.tables,
                          args.product.out_width / 2, launch_of(product, args));
          }};
}
GroupedGluBackward ummrm::cuda::sm80::glu_backward(int) {
  return {kTileColumns, &scratch,
          [](const GroupedProduct& product, const ExpertGluBackward& args, float* dots, int64_t parts, Stream stream) {
            return launch(product_kernel<FusedGluBackward, false, false>, product.problems, kWarp, stream,
                          product.tables, int64_t{0}, launch_of(product, args, dots, parts));
          }};
}
template <class Out>
static GroupedInstance sum_of() {
  return {&scratch, [](const GroupedProduct& product, Stream stream) {
            return launch(product_kernel<SumEnding<Out>, true, false>, product.problems, kWarp, stream, product.tables,
                          int64_t{0}, typename SumEnding<Out>::Launch{product.tables});
          }};
}
GroupedInstance ummrm::cuda::sm80::weight_grad(int, DType) { return sum_of<bf16>(); }
GroupedInstance ummrm::cuda::sm80::weight_grad_f32(int, DType) { return sum_of<float>(); }
GroupedInstance ummrm::cuda::sm80::forward(int, DType) { return {}; }
GroupedInstance ummrm::cuda::sm80::input_grad(int, DType) { return {}; }
bool ummrm::cuda::sm80::has_image() { return false; }

struct Case {
  int64_t tokens, num_shared, slots, hidden, width, band;
  std::vector<int32_t> offsets;
  bool one_row_a_token, biased;

  int64_t experts() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t rows() const { return num_shared * tokens + slots; }
  int64_t shared_rows() const { return one_row_a_token ? tokens : num_shared * tokens; }
  // The expert of a row of the combined buffer, shared ones first; -1 for none.
  int64_t expert_of(int64_t row) const {
    if (row < num_shared * tokens) return row / tokens;
    int64_t e = 0;
    while (e < experts() && row - num_shared * tokens >= offsets[e + 1]) ++e;
    return e < experts() ? num_shared + e : -1;
  }
  int64_t source_of(int64_t row) const {
    return row >= num_shared * tokens ? row - num_shared * tokens : one_row_a_token ? row % tokens : row;
  }
  ExpertGemm gemm(int64_t in, int64_t out_width, bool transpose, const Array& shared, const Array& routed,
                  const Array& shared_proj, const Array& routed_proj) const {
    return {DType::bf16,        tokens,    num_shared,      experts(),      slots,         in,
            out_width,          transpose, one_row_a_token, shared.data(),  routed.data(), shared_proj.data(),
            routed_proj.data(), nullptr,   nullptr,         offsets.data(), nullptr};
  }
};

struct Exact {  // as asked, on a 256-byte boundary, poisoned
  void* data;
  explicit Exact(int64_t bytes) : data(::operator new (static_cast<size_t>(bytes), std::align_val_t{256})) {
    std::memset(data, 0xff, static_cast<size_t>(bytes));
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { ::operator delete (data, std::align_val_t{256}); }
};

static double silu(double z) { return z / (1 + std::exp(-z)); }

static void forward(const Case& c) {
  Random random(c.tokens + 3);
  const int64_t pre_width = 2 * c.width;
  const Array shared = random.array(DType::bf16, c.shared_rows() * c.hidden),
              routed = random.array(DType::bf16, c.slots * c.hidden);
  const Array shared_proj = random.array(DType::bf16, c.num_shared * pre_width * c.hidden),
              routed_proj = random.array(DType::bf16, c.experts() * pre_width * c.hidden);
  Placed placed_bias(random.array(DType::bf16, c.experts() * pre_width), true);
  const Array biases = placed_bias.array();
  Placed in(shared, true), in_routed(routed, true), w(shared_proj, true), w_routed(routed_proj, true);
  const auto run = [&] {
    Placed pre(DType::bf16, c.rows() * pre_width, true), act(DType::bf16, c.rows() * c.width, true);
    ExpertGlu args{c.gemm(c.hidden, pre_width, false, shared, routed, shared_proj, routed_proj), ActivationKind::silu,
                   act.data()};
    args.product.shared_rows = in.data();
    args.product.routed_rows = in_routed.data();
    args.product.shared_proj = w.data();
    args.product.routed_proj = w_routed.data();
    args.product.routed_bias = c.biased ? placed_bias.data() : nullptr;  // the shared experts read a row of zeros
    args.product.out = pre.data();
    CHECK(sm80::serves(args), "such sizes are served");
    const TileChoice choice{0, c.band == 0 ? pre_width : c.band};
    const Exact memory(sm80::workspace(args, choice));
    check_launch(sm80::expert_glu(args, choice, memory.data, nullptr), "expert_glu");
    return std::pair(pre.array(), act.array());
  };
  const auto [pre, act] = under_all_orders("expert_glu", run, [](const auto& a, const auto& b) {
    return a.first.same_bits(b.first) && a.second.same_bits(b.second);
  });
  for (int64_t row = 0; row < c.rows(); ++row) {
    const int64_t expert = c.expert_of(row);
    const bool is_shared = expert < c.num_shared;
    for (int64_t j = 0; j < pre_width; ++j) {
      double want = 0, size = 1e-3;
      for (int64_t k = 0; k < c.hidden && expert >= 0; ++k) {
        const int64_t of = ((is_shared ? expert : expert - c.num_shared) * pre_width + j) * c.hidden + k;
        const double term = (is_shared ? shared : routed)[c.source_of(row) * c.hidden + k] *
                            (is_shared ? shared_proj : routed_proj)[of];
        want += term;
        size += std::fabs(term);
      }
      if (expert >= c.num_shared && c.biased) want += biases[(expert - c.num_shared) * pre_width + j];
      check_close(pre, row * pre_width + j, want,
                  expert < 0 ? 0 : epsilon(DType::bf16) * (std::fabs(want) + 1e-5 * size), "pre-activation");
    }
    for (int64_t j = 0; j < c.width; ++j) {  // of what was stored
      const double want = silu(pre[row * pre_width + j]) * pre[row * pre_width + c.width + j];
      check_close(act, row * c.width + j, want, epsilon(DType::bf16) * std::fabs(want), "activation");
    }
  }
}

static void backward(const Case& c) {
  Random random(c.tokens + 9);
  const int64_t pre_width = 2 * c.width;
  const Array shared = random.array(DType::bf16, c.shared_rows() * c.hidden),
              routed = random.array(DType::bf16, c.slots * c.hidden);
  const Array shared_proj = random.array(DType::bf16, c.num_shared * c.hidden * c.width),
              routed_proj = random.array(DType::bf16, c.experts() * c.hidden * c.width);
  const Array pre = random.array(DType::bf16, c.rows() * pre_width), weights = random.array(DType::f32, c.rows());
  Placed in(shared, true), in_routed(routed, true), w(shared_proj, true), w_routed(routed_proj, true), z(pre, true);
  Placed row_weights(weights, true);
  const auto run = [&] {
    Placed grad(DType::bf16, c.rows() * pre_width, true), act(DType::bf16, c.rows() * c.width, true);
    Placed dots(DType::f32, c.rows(), true);
    ExpertGluBackward args{c.gemm(c.hidden, c.width, true, shared, routed, shared_proj, routed_proj),
                           ActivationKind::silu,
                           z.data(),
                           static_cast<const float*>(row_weights.data()),
                           grad.data(),
                           act.data(),
                           static_cast<float*>(dots.data())};
    args.product.shared_rows = in.data();
    args.product.routed_rows = in_routed.data();
    args.product.shared_proj = w.data();
    args.product.routed_proj = w_routed.data();
    CHECK(sm80::serves(args), "such sizes are served");
    const TileChoice choice{0, c.band == 0 ? c.width : c.band};
    const Exact memory(sm80::workspace(args, choice));
    check_launch(sm80::expert_glu_backward(args, choice, memory.data, nullptr), "expert_glu_backward");
    return std::tuple(grad.array(), act.array(), dots.array());
  };
  const auto [grad, act, dots] = under_all_orders("expert_glu_backward", run, [](const auto& a, const auto& b) {
    return std::get<0>(a).same_bits(std::get<0>(b)) && std::get<1>(a).same_bits(std::get<1>(b)) &&
           std::get<2>(a).same_bits(std::get<2>(b));
  });
  for (int64_t row = 0; row < c.rows(); ++row) {
    const int64_t expert = c.expert_of(row);
    const bool is_shared = expert < c.num_shared;
    double dot = 0, dot_size = 1e-3;
    for (int64_t j = 0; j < c.width; ++j) {
      double g = 0, size = 1e-3;
      for (int64_t k = 0; k < c.hidden && expert >= 0; ++k) {
        const int64_t of = ((is_shared ? expert : expert - c.num_shared) * c.hidden + k) * c.width + j;
        const double term = (is_shared ? shared : routed)[c.source_of(row) * c.hidden + k] *
                            (is_shared ? shared_proj : routed_proj)[of];
        g += term;
        size += std::fabs(term);
      }
      const double gate = pre[row * pre_width + j], up = pre[row * pre_width + c.width + j], a = silu(gate);
      const double s = 1 / (1 + std::exp(-gate)), weight = expert < 0 ? 0 : weights[row];
      const double wants[] = {weight * g * up * s * (1 + gate * (1 - s)), weight * g * a, weight * a * up};
      const double noise = std::fabs(weight) * size * (std::fabs(up) + std::fabs(a)) * 2;
      for (int i = 0; i < 3; ++i) {
        const double tolerance =
            expert < 0 ? 0 : epsilon(DType::bf16) * (std::fabs(wants[i]) + 1e-4 * (i < 2 ? noise : 1));
        check_close(i < 2 ? grad : act, i < 2 ? row * pre_width + i * c.width + j : row * c.width + j, wants[i],
                    tolerance, i < 2 ? "gradient" : "weighted activation");
      }
      dot += g * a * up;
      dot_size += size * std::fabs(a * up);
    }
    check_close(dots, row, expert < 0 ? 0 : dot, expert < 0 ? 0 : 1e-5 * dot_size, "row_dots");
  }
}

static void weight_sums(const Case& c, DType type) {
  Random random(c.tokens + 17);
  const int64_t size = c.hidden * c.width;
  const Array shared = random.array(DType::bf16, c.shared_rows() * c.hidden),
              routed = random.array(DType::bf16, c.slots * c.hidden);
  const Array grads = random.array(DType::bf16, c.num_shared * c.tokens * c.width),
              grads_routed = random.array(DType::bf16, c.slots * c.width);
  const Array before = random.array(type, (c.num_shared + c.experts()) * size);
  Array half(type, c.num_shared * size), rest(type, c.experts() * size);
  for (int64_t i = 0; i < before.size; ++i)
    (i < half.size ? half : rest).set(i < half.size ? i : i - half.size, before[i]);
  Placed in(shared, true), in_routed(routed, true), g(grads, true), g_routed(grads_routed, true);
  Placed sums(half, true), sums_routed(rest, true);
  const ExpertGemmWgrad args{DType::bf16,
                             type,
                             c.tokens,
                             c.num_shared,
                             c.experts(),
                             c.slots,
                             c.hidden,
                             c.width,
                             c.one_row_a_token,
                             false,
                             in.data(),
                             in_routed.data(),
                             g.data(),
                             g_routed.data(),
                             c.offsets.data(),
                             sums.data(),
                             sums_routed.data(),
                             0,
                             false,
                             true};
  CHECK(sm80::serves(args), "such sizes are served");
  const TileChoice choice{0, c.band == 0 ? c.hidden : c.band};
  const Exact memory(sm80::workspace(args, choice));
  check_launch(sm80::expert_gemm_wgrad(args, choice, memory.data, nullptr), "expert_gemm_wgrad");
  const Array got = sums.array(), got_routed = sums_routed.array();
  for (int64_t i = 0; i < before.size; ++i) {
    const int64_t expert = i / size, at = i % size;
    double want = before[i], total = std::fabs(want);
    bool any = false;
    for (int64_t row = 0; row < c.rows(); ++row) {
      if (c.expert_of(row) != expert) continue;
      any = true;
      const bool is_shared = expert < c.num_shared;
      const int64_t own = is_shared ? row : row - c.num_shared * c.tokens;
      const double term = (is_shared ? grads : grads_routed)[own * c.width + at / c.hidden] *
                          (is_shared ? shared : routed)[c.source_of(row) * c.hidden + at % c.hidden];
      want += term;
      total += std::fabs(term);
    }
    const double tolerance = any ? epsilon(type) * std::fabs(want) + 1e-6 * total : 0;
    check_close(i < half.size ? got : got_routed, i < half.size ? i : i - half.size, want, tolerance, "sum");
  }
}

static void choices() {
  alignas(16) static char memory[32];
  ExpertGlu glu{
      {DType::bf16, 4, 1, 2, 8, 16, 32, false, true, memory, memory, memory, memory, nullptr, nullptr, nullptr, memory},
      ActivationKind::silu,
      memory};
  const auto served = [&](auto change) {
    ExpertGlu args = glu;
    change(args);
    return sm80::serves(args);
  };
  CHECK(served([](ExpertGlu&) {}), "silu in bf16");
  CHECK(!served([](ExpertGlu& a) { a.kind = ActivationKind::gelu; }), "another activation");
  CHECK(!served([](ExpertGlu& a) { a.product.dtype = DType::f16; }), "another type");
  CHECK(!served([](ExpertGlu& a) { a.product.out_width = 24; }), "up's half off 16-byte boundaries");
  CHECK(!served([&](ExpertGlu& a) { a.activation = memory + 8; }), "an activation off them");
  for (const TakenFusion& row : kTakenFusions)
    CHECK(row.arch == 0 || row.arch == 80 || row.arch == 90, "an architecture");
  for (const Fusions fusions : {Fusions::all, Fusions::none, Fusions::measured}) {
    use_fusions(fusions);
    const bool has = device_major() >= 8;
    CHECK(expert_glu_fused(glu) ==
              (has && (fusions == Fusions::all || (fusions == Fusions::measured && fusion_taken(80, Fusion::glu)))),
          "what was asked for");
  }
}

int main() {
  const Case cases[] = {
      {5, 1, 21, 16, 40, 0, {0, 17, 17, 19}, true, true},  // several tiles of rows and columns, rows of no expert
      {3, 2, 20, 24, 72, 32, {0, 0, 20}, false, true},     // bands, no rows for one, rows of their own for shared ones
      {2, 1, 4, 8, 8, 0, {0, 0, 0}, true, false},          // every routed row masked
      {0, 0, 34, 8, 104, 64, {0, 33, 34}, true, false},    // no shared expert, more than a tile of rows
  };
  for (const Case& c : cases) {
    forward(c);
    backward(c);
    weight_sums(c, DType::bf16);
    weight_sums(c, DType::f32);
  }
  choices();
  return finish();
}
