// The CUDA kernels of expert_gemm.h that need no tensor cores, on the emulator, against plain loops in double: in the
// shipped tiles and, in bf16, in small ones, of which even small sizes have several; and the choice between kernels.
#include "expert_gemm.cu"
#include "expert_gemm_wgrad.cu"

#include "emulated.h"
#include "expert_bias_grad.cu"

using namespace testing;
namespace cuda = ummrm::cuda;
using SmallTile = cuda::Tile<64, 64, 8>;
using Values = std::vector<double>;

struct Case {
  DType type;
  bool aligned, shipped, one_row_a_token;
  int64_t tokens, num_shared;
  std::vector<int32_t> offsets;  // by expert, then the number of sorted rows, of which the last may be of no expert
  int64_t in, width;

  int64_t experts() const { return static_cast<int64_t>(offsets.size()) - 2; }
  int64_t slots() const { return offsets.back(); }
  int64_t shared_rows() const { return num_shared * tokens; }
  int64_t rows() const { return shared_rows() + slots(); }
  int64_t num_groups() const { return num_shared + experts(); }
  int64_t begin(int64_t group) const {
    return group < num_shared ? group * tokens : shared_rows() + offsets[group - num_shared];
  }
  int64_t end(int64_t group) const {
    return group < num_shared ? (group + 1) * tokens : shared_rows() + offsets[group - num_shared + 1];
  }
  int64_t live() const { return shared_rows() + offsets[experts()]; }
};

static Values values_of(const Array& array) {
  Values out(static_cast<size_t>(array.size));
  for (int64_t i = 0; i < array.size; ++i) out[i] = array[i];
  return out;
}

// Rows of all groups, in the two buffers that they come in and as the combined one; those of no expert are NaN.
struct Rows {
  Array shared, routed;
  Values combined;

  Rows(Random& random, const Case& c, int64_t width, bool one_row_a_token)
      : shared(random.array(c.type, (one_row_a_token ? c.tokens : c.shared_rows()) * width)),
        routed(random.array(c.type, c.slots() * width)) {
    for (int64_t i = c.offsets[c.experts()] * width; i < c.slots() * width; ++i) routed.set(i, NAN);
    const Values first = values_of(shared), rest = values_of(routed);
    for (int64_t s = 0; s < (one_row_a_token ? c.num_shared : 1); ++s)
      combined.insert(combined.end(), first.begin(), first.end());
    combined.insert(combined.end(), rest.begin(), rest.end());
  }
};

// Results of every expert, shared ones first.
struct Grads {
  Array shared, routed;
  bool same_bits(const Grads& other) const { return shared.same_bits(other.shared) && routed.same_bits(other.routed); }
  double at(int64_t num_shared, int64_t expert, int64_t each, int64_t i) const {
    return expert < num_shared ? shared[expert * each + i] : routed[(expert - num_shared) * each + i];
  }
};

static const auto same_grads = [](const Grads& a, const Grads& b) { return a.same_bits(b); };
static const auto same_array = [](const Array& a, const Array& b) { return a.same_bits(b); };

// Sums of `terms` products in fp32, whose absolute values add up to `size`, rounded to the type.
static void check_sum(DType type, double got, double want, double size, int64_t terms, const char* what, int64_t i) {
  const double tolerance = (static_cast<double>(terms) + 2) * 0x1p-24 * size + epsilon(type) * std::fabs(want) +
                           (type == DType::f16 ? 0x1p-25 : 0);
  CHECK(std::fabs(got - want) <= tolerance, "%s[%lld] = %.9g, expected %.9g within %.3g (type %d)", what,
        static_cast<long long>(i), got, want, tolerance, static_cast<int>(type));
}

static void check_gemm(const Case& c, bool transpose, bool biased) {
  Random random(c.in * 131 + c.width);
  const int64_t each = c.in * c.width;
  const Rows rows(random, c, c.in, c.one_row_a_token);
  const Array shared_proj = random.array(c.type, c.num_shared * each),
              routed_proj = random.array(c.type, c.experts() * each),
              shared_bias = random.array(c.type, c.num_shared * c.width),
              routed_bias = random.array(c.type, c.experts() * c.width);
  const auto run = [&] {
    Placed shared(rows.shared, c.aligned), routed(rows.routed, c.aligned), sp(shared_proj, c.aligned),
        rp(routed_proj, c.aligned), sb(shared_bias, c.aligned), rb(routed_bias, c.aligned),
        out(c.type, c.rows() * c.width, c.aligned);
    const ummrm::cuda::ExpertGemm args{c.type,
                                       c.tokens,
                                       c.num_shared,
                                       c.experts(),
                                       c.slots(),
                                       c.in,
                                       c.width,
                                       transpose,
                                       c.one_row_a_token,
                                       shared.data(),
                                       routed.data(),
                                       sp.data(),
                                       rp.data(),
                                       biased ? sb.data() : nullptr,
                                       biased ? rb.data() : nullptr,
                                       c.offsets.data(),
                                       out.data()};
    if (c.shipped) {
      CHECK(cuda::expert_gemm_workspace(args) == 0, "the plain kernels need no workspace");
      check_launch(cuda::expert_gemm(args, nullptr, nullptr), "expert_gemm");
    } else {
      check_launch(cuda::plain_gemm<SmallTile, cuda::bf16>(args, nullptr), "plain_gemm");
    }
    return out.array();
  };
  const Array got = under_all_orders("expert_gemm", run, same_array);
  const Values projs[] = {values_of(shared_proj), values_of(routed_proj)},
               biases[] = {values_of(shared_bias), values_of(routed_bias)};
  for (int64_t group = 0; group < c.num_groups(); ++group) {
    const bool routed = group >= c.num_shared;
    const int64_t expert = routed ? group - c.num_shared : group;
    const double* proj = projs[routed].data() + expert * each;
    for (int64_t row = c.begin(group); row < c.end(group); ++row) {
      for (int64_t n = 0; n < c.width; ++n) {
        double sum = biased ? biases[routed][expert * c.width + n] : 0, size = std::fabs(sum);
        for (int64_t k = 0; k < c.in; ++k) {
          const double term = rows.combined[row * c.in + k] * (transpose ? proj[k * c.width + n] : proj[n * c.in + k]);
          sum += term;
          size += std::fabs(term);
        }
        check_sum(c.type, got[row * c.width + n], sum, size, c.in, "out", row * c.width + n);
      }
    }
  }
  for (int64_t i = c.live() * c.width; i < c.rows() * c.width; ++i) check_close(got, i, 0, 0, "row of no expert");
}

static void check_wgrad(const Case& c, DType grad_type, bool one_grad_row_a_token, bool need_shared, bool need_routed) {
  Random random(c.in * 151 + c.width);
  const int64_t each = c.in * c.width;
  const Rows rows(random, c, c.in, c.one_row_a_token), grads(random, c, c.width, one_grad_row_a_token);
  const auto run = [&] {
    Placed shared(rows.shared, c.aligned), routed(rows.routed, c.aligned), grad_shared(grads.shared, c.aligned),
        grad_routed(grads.routed, c.aligned);
    Placed shared_out(grad_type, need_shared ? c.num_shared * each : 0, c.aligned),
        routed_out(grad_type, need_routed ? c.experts() * each : 0, c.aligned);
    const ummrm::cuda::ExpertGemmWgrad args{c.type,
                                            grad_type,
                                            c.tokens,
                                            c.num_shared,
                                            c.experts(),
                                            c.slots(),
                                            c.in,
                                            c.width,
                                            c.one_row_a_token,
                                            one_grad_row_a_token,
                                            shared.data(),
                                            routed.data(),
                                            grad_shared.data(),
                                            grad_routed.data(),
                                            c.offsets.data(),
                                            need_shared ? shared_out.data() : nullptr,
                                            need_routed ? routed_out.data() : nullptr};
    if (c.shipped) {
      CHECK(cuda::expert_gemm_wgrad_workspace(args) == 0, "the plain kernels need no workspace");
      check_launch(cuda::expert_gemm_wgrad(args, nullptr, nullptr), "expert_gemm_wgrad");
    } else {
      check_launch(cuda::plain_wgrad<SmallTile, cuda::bf16>(args, nullptr), "plain_wgrad");
    }
    return Grads{shared_out.array(), routed_out.array()};
  };
  const Grads got = under_all_orders("expert_gemm_wgrad", run, same_grads);
  for (int64_t group = 0; group < c.num_groups(); ++group) {
    if (!(group < c.num_shared ? need_shared : need_routed)) continue;
    for (int64_t i = 0; i < each; ++i) {
      double sum = 0, size = 0;
      for (int64_t row = c.begin(group); row < c.end(group); ++row) {
        const double term = grads.combined[row * c.width + i / c.in] * rows.combined[row * c.in + i % c.in];
        sum += term;
        size += std::fabs(term);
      }
      check_sum(grad_type, got.at(c.num_shared, group, each, i), sum, size, c.end(group) - c.begin(group), "grad", i);
    }
  }
}

template <int height>
static void check_bias_grad(const Case& c, bool weighted, bool need_shared, bool need_routed) {
  Random random(c.width * 171 + c.tokens);
  const Rows rows(random, c, c.width, c.one_row_a_token);
  Array weights = random.array(DType::f32, c.rows());
  for (int64_t row = c.live(); row < c.rows(); ++row) weights.set(row, NAN);
  const auto run = [&] {
    Placed shared(rows.shared, c.aligned), routed(rows.routed, c.aligned);
    Placed shared_out(c.type, need_shared ? c.num_shared * c.width : 0, c.aligned),
        routed_out(c.type, need_routed ? c.experts() * c.width : 0, c.aligned);
    const ummrm::cuda::ExpertBiasGrad args{c.type,
                                           c.tokens,
                                           c.num_shared,
                                           c.experts(),
                                           c.slots(),
                                           c.width,
                                           c.one_row_a_token,
                                           shared.data(),
                                           routed.data(),
                                           weighted ? static_cast<const float*>(weights.data()) : nullptr,
                                           c.offsets.data(),
                                           need_shared ? shared_out.data() : nullptr,
                                           need_routed ? routed_out.data() : nullptr};
    const int64_t bytes = c.shipped ? cuda::expert_bias_grad_workspace(args) : cuda::tile_sums_bytes<height>(args);
    CHECK(bytes % 256 == 0, "workspace of %lld bytes", static_cast<long long>(bytes));
    Array workspace(DType::f32, bytes / 4);
    check_launch(c.shipped ? cuda::expert_bias_grad(args, workspace.data(), nullptr)
                           : cuda::column_sums<height>(args, workspace.data(), nullptr),
                 "expert_bias_grad");
    return Grads{shared_out.array(), routed_out.array()};
  };
  const Grads got = under_all_orders("expert_bias_grad", run, same_grads);
  for (int64_t group = 0; group < c.num_groups(); ++group) {
    if (!(group < c.num_shared ? need_shared : need_routed)) continue;
    for (int64_t i = 0; i < c.width; ++i) {
      double sum = 0, size = 0;
      for (int64_t row = c.begin(group); row < c.end(group); ++row) {
        const double term = (weighted ? weights[row] : 1) * rows.combined[row * c.width + i];
        sum += term;
        size += std::fabs(term);
      }
      check_sum(c.type, got.at(c.num_shared, group, c.width, i), sum, size, c.end(group) - c.begin(group), "bias", i);
    }
  }
}

// Every tile of every expert exactly once, and no more tiles than the host counts on.
static void check_row_tiles(const Case& c) {
  constexpr int kHeight = 4;
  const cuda::RowGroups groups{c.tokens, c.num_shared, c.experts(), c.slots(), c.offsets.data()};
  const int64_t most = cuda::most_row_tiles(groups, kHeight);
  std::vector<int> covered(static_cast<size_t>(c.rows()), 0);
  int64_t previous = -1, of_expert = 0;
  for (int64_t tile = 0; tile < most + 3; ++tile) {
    const cuda::RowTile at = cuda::row_tile<kHeight>(groups, tile);
    CHECK(at.count >= 0 && at.count <= kHeight && (tile < most || at.count == 0), "tile %lld has %lld rows",
          static_cast<long long>(tile), static_cast<long long>(at.count));
    for (int64_t row = at.first; row < at.first + at.count; ++row) {
      const bool inside = at.expert == c.num_groups() ? row >= c.live() && row < c.rows()
                                                      : row >= c.begin(at.expert) && row < c.end(at.expert);
      CHECK(inside, "row %lld is not of expert %lld", static_cast<long long>(row), static_cast<long long>(at.expert));
      ++covered[row];
    }
    if (at.count == 0) continue;
    of_expert = at.expert == previous ? of_expert + 1 : 0;
    previous = at.expert;
    CHECK(tile - of_expert == cuda::first_row_tile<kHeight>(groups, at.expert), "first tile of expert %lld",
          static_cast<long long>(at.expert));
  }
  for (const int times : covered) CHECK(times == 1, "a row is covered %d times", times);
}

static void check_banded() {
  for (int64_t rows = 1; rows < 20; ++rows) {
    for (int64_t columns = 1; columns < 5; ++columns) {
      std::vector<int> seen(static_cast<size_t>(rows * columns), 0);
      for (int64_t block = 0; block < rows * columns; ++block) {
        const cuda::Place place = cuda::banded(block, rows, columns);
        if (place.row >= 0 && place.row < rows && place.column >= 0 && place.column < columns)
          ++seen[place.row * columns + place.column];
      }
      for (const int times : seen)
        CHECK(times == 1, "a tile of %lld x %lld is visited %d times", static_cast<long long>(rows),
              static_cast<long long>(columns), times);
    }
  }
}

// The order of the candidates decides among those that fit both the device and the arguments; the last takes the rest.
static void check_choice() {
  using Args = ummrm::cuda::ExpertGemm;
  const auto eights = [](const Args& args) { return args.in % 8 == 0; };
  const cuda::Candidate<Args> candidates[] = {
      {9, 9, eights, [](const Args& args) { return args.in; },
       [](const Args&, void*, ummrm::cuda::Stream) { return 9; }},
      {8, cuda::kAnyMajor, eights, [](const Args&) { return int64_t{8}; },
       [](const Args&, void*, ummrm::cuda::Stream) { return 8; }},
      {0, cuda::kAnyMajor, [](const Args&) { return true; }, nullptr,
       [](const Args&, void*, ummrm::cuda::Stream) { return 0; }},
  };
  const auto chosen = [&](int64_t in, int major) {
    Args args{};
    args.in = in;
    return cuda::choose(candidates, args, major).run(args, nullptr, nullptr);
  };
  CHECK(chosen(16, 9) == 9 && chosen(16, 8) == 8 && chosen(16, 10) == 8 && chosen(16, 12) == 8, "architecture");
  CHECK(chosen(12, 9) == 0 && chosen(12, 8) == 0 && chosen(16, 7) == 0 && chosen(16, 0) == 0, "what is left");
  Args args{};
  args.in = 16;  // the emulated device is of major 8
  CHECK(cuda::device_major() == 8 && cuda::chosen_workspace(candidates, args) == 8, "workspace of what runs");
  args.in = 12;
  CHECK(cuda::chosen_workspace(candidates, args) == 0, "workspace of what runs");
}

int main() {
  check_banded();
  check_choice();
  // Experts with no rows first, amid and last, others of several tiles; all rows on one; none routed; no experts.
  const std::vector<std::vector<int32_t>> offsets{{0, 0, 3, 3, 70, 70, 75}, {0, 66, 66}, {0, 0, 0, 5}, {0, 0}};
  for (const auto& o : offsets) {
    for (const int64_t tokens : {0, 1, 9}) {
      for (const int64_t num_shared : {0, 1, 3})
        check_row_tiles({DType::f32, true, false, true, tokens, num_shared, o, 1, 1});
    }
  }
  for (int bits = 0; bits < 16; ++bits) {
    const bool aligned = bits & 1, one_row = bits & 2, flag = bits & 4, other = bits & 8;
    const auto& o = offsets[static_cast<size_t>(bits / 2 + bits % 2) % offsets.size()];
    const Case c{DType::bf16, aligned, false, one_row, 5, 2, o, aligned ? 20 : 11, aligned ? 68 : 67};
    check_gemm(c, flag, !flag && other);
    check_wgrad(c, other ? DType::f32 : c.type, flag, bits != 5, bits != 6);
    check_bias_grad<8>({c.type, aligned, false, one_row, 19, 2, o, 1, aligned ? 264 : 37}, flag, bits != 5, bits != 6);
  }
  for (const DType type : kCudaTypes) {
    for (const int64_t width : {0, 8}) {  // nothing to do, or nothing to sum
      const Case c{type, true, true, true, width == 0 ? 2 : 0, 1, {0, 2, 2}, 8 - width, width};
      check_gemm(c, false, true);
      check_wgrad(c, type, true, true, true);
      check_bias_grad<8>(c, true, true, true);
    }
    if (kSmallOnly) continue;
    for (const bool aligned : {true, false}) {
      const Case c{type, aligned, true, true, 3, 1, {0, 130, 130, 132, 133}, aligned ? 12 : 9, aligned ? 132 : 131};
      check_gemm(c, false, true);
      check_gemm(c, true, false);
      check_wgrad(c, type, true, true, true);
      check_bias_grad<8>({type, aligned, true, true, 515, 1, {0, 3, 3, 4}, 1, aligned ? 16 : 9}, true, true, true);
    }
  }
  return finish();
}
