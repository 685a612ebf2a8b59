// What tensor_cores.cu does around the CUTLASS instances: what it serves, its workspace, the launches of a call. Plain
// loops that follow the problems' tables stand in for the instances.
#define UMMRM_SM80
#include "tensor_cores.cu"

#include "emulated.h"
#include "expert_groups.cu"

using namespace testing;
using namespace ummrm;
using namespace ummrm::cuda;

static int runs, last_tile, last_sms;

// d = a x b + bias of every problem. `a` has its reduced size across (rows_reduced) or along a row, b likewise.
template <bool rows_reduced, bool columns_first>
static int loops(DType type, DType out, int tile, const GroupedProduct& product) {
  ++runs;
  last_tile = tile;
  last_sms = product.sms;
  std::memset(product.scratch, 0xff, 48 * product.sms);
  const GroupTables& tables = product.tables;
  for (int p = 0; p < product.problems; ++p) {
    const GroupShape s = tables.shapes[p];
    for (int64_t i = 0; i < s.m; ++i) {
      for (int64_t j = 0; j < s.n; ++j) {
        double sum = product.biased ? at(out, tables.bias[p], i * tables.bias_stride[p] + j) : 0;
        for (int64_t k = 0; k < s.k; ++k) {
          const double left =
              at(type, tables.a[p], rows_reduced ? k * tables.a_stride[p] + i : i * tables.a_stride[p] + k);
          sum += left * at(type, tables.b[p], columns_first ? j * tables.b_stride[p] + k : k * tables.b_stride[p] + j);
        }
        put(out, tables.d[p], i * tables.d_stride[p] + j, sum);
      }
    }
  }
  return cudaSuccess;
}

static int64_t scratch(int sms) { return 48 * sms; }

template <bool rows_reduced, bool columns_first, bool wide, int tile>
static GroupedInstance instance(DType dtype) {
  constexpr auto run = [](auto type) {
    return [](const GroupedProduct& product, Stream) {
      constexpr DType from = decltype(type)::value;
      return loops<rows_reduced, columns_first>(from, wide ? DType::f32 : from, tile, product);
    };
  };
  if (dtype == DType::bf16) return {&scratch, run(std::integral_constant<DType, DType::bf16>{})};
  if (dtype == DType::f32) return {&scratch, run(std::integral_constant<DType, DType::f32>{})};
  return {&scratch, run(std::integral_constant<DType, DType::f16>{})};
}

#define UMMRM_INSTANCES(name, ...)                                                        \
  GroupedInstance ummrm::cuda::sm80::name(int tile, DType dtype) {                        \
    return tile == 0 ? instance<__VA_ARGS__, 0>(dtype) : instance<__VA_ARGS__, 1>(dtype); \
  }
UMMRM_INSTANCES(forward, false, true, false)
UMMRM_INSTANCES(input_grad, false, false, false)
UMMRM_INSTANCES(weight_grad, true, false, false)
UMMRM_INSTANCES(weight_grad_f32, true, false, true)
GroupedGlu ummrm::cuda::sm80::glu(int) { return {}; }  // test_expert_glu.cpp's
GroupedGluBackward ummrm::cuda::sm80::glu_backward(int) { return {}; }
int ummrm::cuda::sum_dots(const ExpertGluBackward&, const float*, int64_t, Stream) { return cudaErrorInvalidValue; }

static bool image = true;
bool ummrm::cuda::sm80::has_image() { return image; }

struct Problem {
  DType dtype;
  int64_t tokens = 5, num_shared = 2, num_experts = 4, slots = 12, in = 16, out = 24;
  std::vector<int32_t> offsets = {0, 7, 7, 8, 10};
  Random random{3};
  Array shared = random.array(dtype, tokens*in), routed = random.array(dtype, slots*in);
  Array grads_shared = random.array(dtype, num_shared*tokens*out), grads_routed = random.array(dtype, slots*out);
  Array shared_proj = random.array(dtype, num_shared*in*out), routed_proj = random.array(dtype, num_experts*in*out);
  Array shared_bias = random.array(dtype, num_shared*out), routed_bias = random.array(dtype, num_experts*out);

  explicit Problem(DType dtype) : dtype(dtype) {}

  ExpertGemm gemm(bool bias_shared, bool bias_routed, void* to) const {
    return {dtype,
            tokens,
            num_shared,
            num_experts,
            slots,
            in,
            out,
            false,
            true,
            shared.data(),
            routed.data(),
            shared_proj.data(),
            routed_proj.data(),
            bias_shared ? shared_bias.data() : nullptr,
            bias_routed ? routed_bias.data() : nullptr,
            offsets.data(),
            to,
            0,
            true};
  }
  ExpertGemmWgrad wgrad(DType grad_dtype, void* to_shared, void* to_routed) const {
    return {dtype,
            grad_dtype,
            tokens,
            num_shared,
            num_experts,
            slots,
            in,
            out,
            true,
            false,
            shared.data(),
            routed.data(),
            grads_shared.data(),
            grads_routed.data(),
            offsets.data(),
            to_shared,
            to_routed,
            0,
            true};
  }
  // The expert of a row of the combined buffer and its row of the input, of a kind; -1 for no expert.
  int64_t expert_of(int64_t sorted) const {
    int64_t expert = 0;
    while (expert < num_experts && sorted >= offsets[expert + 1]) ++expert;
    return expert < num_experts ? expert : -1;
  }
};

// A workspace of just the asked size on a 256-byte boundary, poisoned, so that ASan sees what passes its end.
struct Exact {
  void* data;
  explicit Exact(int64_t bytes) : data(::operator new (static_cast<size_t>(bytes), std::align_val_t{256})) {
    CHECK(bytes > 0 && bytes % 256 == 0, "a workspace of %lld bytes", static_cast<long long>(bytes));
    std::memset(data, 0xff, static_cast<size_t>(bytes));
  }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { ::operator delete (data, std::align_val_t{256}); }
};

static void forward(DType dtype, bool bias_shared, bool bias_routed, const TileChoice* choice) {
  const Problem in(dtype);
  const int64_t shared_rows = in.num_shared * in.tokens, rows = shared_rows + in.slots;
  Placed out(dtype, rows * in.out, true);
  const ExpertGemm args = in.gemm(bias_shared, bias_routed, out.data());
  CHECK(sm80::serves(args), "such sizes are served");
  const Exact memory(choice == nullptr ? sm80::workspace(args) : sm80::workspace(args, *choice));
  const int before = runs;
  check_launch(choice == nullptr ? sm80::expert_gemm(args, memory.data, nullptr)
                                 : sm80::expert_gemm(args, *choice, memory.data, nullptr),
               "expert_gemm");
  CHECK(runs == before + 1, "one product a call");
  if (choice != nullptr) CHECK(last_tile == choice->tile, "the tile that was asked for");
  const Array got = out.array();
  for (int64_t row = 0; row < rows; ++row) {
    const bool shared = row < shared_rows;
    const int64_t expert = shared ? row / in.tokens : in.expert_of(row - shared_rows);
    for (int64_t j = 0; j < in.out; ++j) {
      double want = 0;
      const int64_t proj = (expert * in.out + j) * in.in;
      for (int64_t k = 0; k < in.in && expert >= 0; ++k) {
        want += shared ? in.shared[row % in.tokens * in.in + k] * in.shared_proj[proj + k]
                       : in.routed[(row - shared_rows) * in.in + k] * in.routed_proj[proj + k];
      }
      if (expert >= 0 && shared && bias_shared) want += in.shared_bias[expert * in.out + j];
      if (expert >= 0 && !shared && bias_routed) want += in.routed_bias[expert * in.out + j];
      check_close(got, row * in.out + j, want, expert < 0 ? 0 : 2 * epsilon(dtype) * (std::fabs(want) + 1e-3), "out");
    }
  }
}

static void gradients(DType dtype, DType grad_dtype, bool add) {
  const Problem in(dtype);
  const int64_t size = in.in * in.out;
  Random random(8);
  const Array shared_before = random.array(grad_dtype, in.num_shared * size);
  const Array routed_before = random.array(grad_dtype, in.num_experts * size);
  const Array nothing_shared(grad_dtype, in.num_shared * size), nothing_routed(grad_dtype, in.num_experts * size);
  Placed shared(add ? shared_before : nothing_shared, true), routed(add ? routed_before : nothing_routed, true);
  ExpertGemmWgrad args = in.wgrad(grad_dtype, shared.data(), routed.data());
  args.add = add;
  CHECK(sm80::serves(args), "such sizes are served");
  const Exact memory(sm80::workspace(args));
  check_launch(sm80::expert_gemm_wgrad(args, memory.data, nullptr), "expert_gemm_wgrad");
  const Array got_shared = shared.array(), got_routed = routed.array();
  for (int64_t group = 0; group < in.num_shared + in.num_experts; ++group) {
    const bool is_shared = group < in.num_shared;
    const int64_t expert = is_shared ? group : group - in.num_shared;
    const int64_t first = is_shared ? 0 : in.offsets[expert], last = is_shared ? in.tokens : in.offsets[expert + 1];
    for (int64_t i = 0; i < size; ++i) {
      double want = add ? (is_shared ? shared_before : routed_before)[expert * size + i] : 0;
      for (int64_t row = first; row < last; ++row) {
        want += is_shared ? in.grads_shared[(expert * in.tokens + row) * in.out + i / in.in] *
                                in.shared[row * in.in + i % in.in]
                          : in.grads_routed[row * in.out + i / in.in] * in.routed[row * in.in + i % in.in];
      }
      const double tolerance = first == last ? 0 : 2 * epsilon(grad_dtype) * (std::fabs(want) + 1e-3);
      check_close(is_shared ? got_shared : got_routed, expert * size + i, want, tolerance, "gradient");
    }
  }
}

// Some of the device's eight multiprocessors are left to others, never all, and its results are the same.
static void spare_multiprocessors() {
  const Problem in(DType::bf16);
  const int64_t rows = in.num_shared * in.tokens + in.slots;
  Array first(DType::bf16, 0);
  for (const int spare : {0, 3, 7, 8, 100, -5}) {
    Placed out(DType::bf16, rows * in.out, true);
    ExpertGemm args = in.gemm(true, true, out.data());
    args.spare_multiprocessors = spare;
    const Exact memory(sm80::workspace(args));
    check_launch(sm80::expert_gemm(args, memory.data, nullptr), "expert_gemm");
    CHECK(last_sms == (spare < 0 ? 8 : spare < 8 ? 8 - spare : 1), "%d spared, %d taken", spare, last_sms);
    const Array got = out.array();
    if (spare == 0) first = got;
    CHECK(got.same_bits(first), "another result");
  }
}

// A row of zeros takes a piece of its own, where one kind of expert alone has a bias.
static void zero_row_has_room() {
  const Problem in(DType::bf16);
  const auto bytes = [&](bool shared, bool routed) { return sm80::workspace(in.gemm(shared, routed, nullptr)); };
  CHECK(bytes(true, true) == bytes(false, false), "no row for two biases, nor for none");
  CHECK(bytes(true, false) == bytes(true, true) + 256 && bytes(false, true) == bytes(true, false),
        "a row for one bias");
}

static void served() {
  alignas(16) char memory[32];
  const auto gemm = [&](auto change) {
    ExpertGemm args = {DType::bf16, 64,     1,      8,      128,     64,     128,     false, true,
                       memory,      memory, memory, memory, nullptr, memory, nullptr, memory};
    change(args);
    return sm80::serves(args);
  };
  CHECK(gemm([](ExpertGemm&) {}), "plain sizes");
  CHECK(gemm([](ExpertGemm& a) { a.dtype = DType::f16; }), "f16");
  CHECK(gemm([](ExpertGemm& a) { a.tokens = a.slots = 0; }), "nothing at all");
  CHECK(!gemm([](ExpertGemm& a) { a.dtype = DType::f32; }), "fp32 is exact elsewhere");
  CHECK(gemm([](ExpertGemm& a) { a.dtype = DType::f32, a.allow_tf32 = true; }), "and rounded here");
  image = false;
  CHECK(!gemm([](ExpertGemm& a) { a.dtype = DType::f32, a.allow_tf32 = true; }), "where the device has the code");
  CHECK(gemm([](ExpertGemm&) {}), "which is asked for fp32 alone");
  image = true;
  CHECK(!gemm([](ExpertGemm& a) { a.dtype = DType::f64, a.allow_tf32 = true; }), "fp64 never");
  CHECK(!gemm([](ExpertGemm& a) { a.in = 60; }), "rows off 16-byte boundaries");
  CHECK(!gemm([](ExpertGemm& a) { a.out_width = 4; }), "rows of less than 16 bytes");
  CHECK(!gemm([](ExpertGemm& a) { a.in = 0; }), "nothing to sum");
  CHECK(!gemm([&](ExpertGemm& a) { a.routed_rows = memory + 2; }), "rows at an odd address");
  CHECK(!gemm([&](ExpertGemm& a) { a.routed_bias = memory + 8; }), "a bias at an odd address");
  CHECK(!gemm([&](ExpertGemm& a) { a.shared_bias = memory + 8; }), "a bias at an odd address");
  CHECK(!gemm([](ExpertGemm& a) { a.num_experts = kMaxGroups; }), "more groups than a launch takes");
  CHECK(!gemm([](ExpertGemm& a) { a.slots = int64_t{1} << 31; }), "rows past int32");
  CHECK(!gemm([](ExpertGemm& a) { a.slots = int64_t{1} << 30, a.out_width = 1 << 20; }), "tiles past int32");
  const auto wgrad = [&](auto change) {
    ExpertGemmWgrad args = {DType::bf16, DType::f32, 64,     1,      8,      128,     64,     128,    true,
                            true,        memory,     memory, memory, memory, nullptr, memory, nullptr};
    change(args);
    return sm80::serves(args);
  };
  CHECK(wgrad([](ExpertGemmWgrad&) {}), "fp32 gradients of the shared experts alone");
  CHECK(wgrad([](ExpertGemmWgrad& a) { a.grad_dtype = DType::bf16; }), "gradients of the rows' type");
  CHECK(!wgrad([](ExpertGemmWgrad& a) { a.grad_dtype = DType::f16; }), "gradients of another type");
  CHECK(!wgrad([](ExpertGemmWgrad& a) { a.dtype = DType::f32; }), "fp32 is exact elsewhere");
  CHECK(wgrad([](ExpertGemmWgrad& a) { a.dtype = DType::f32, a.allow_tf32 = true; }), "and rounded here");
  CHECK(!wgrad([](ExpertGemmWgrad& a) { a.grad_width = 100; }), "rows off 16-byte boundaries");
  CHECK(!wgrad([&](ExpertGemmWgrad& a) { a.shared_grad = memory + 4; }), "a result at an odd address");
}

int main() {
  const TileChoice choices[] = {{0, 24}, {1, 8}};
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    for (const bool shared : {true, false}) {
      for (const bool routed : {true, false}) {
        forward(dtype, shared, routed, nullptr);
        for (const TileChoice& choice : choices) forward(dtype, shared, routed, &choice);
      }
    }
    for (const bool add : {false, true}) {
      gradients(dtype, dtype, add);
      gradients(dtype, DType::f32, add);
    }
  }
  spare_multiprocessors();
  zero_row_has_room();
  served();
  return finish();
}
