// The CUDA kernels of permute.h on the emulator, against plain loops in double.
#include "permute.cu"

#include <numeric>

#include "emulated.h"

using namespace testing;

struct Case {
  DType type;
  int64_t tokens, top_k, hidden, num_shared, live;
  bool weighted, aligned;
};

struct Inputs {
  Array x, rows, grad, shared_weight, routed_weights;
  std::vector<int32_t> slot_to_sorted, sorted_to_slot;
};

static Inputs inputs_of(const Case& c) {
  Random random(c.tokens * 31 + c.hidden);
  const int64_t slots = c.tokens * c.top_k;
  Inputs in{random.array(c.type, c.tokens * c.hidden),
            random.array(c.type, (c.num_shared * c.tokens + slots) * c.hidden),
            random.array(c.type, c.tokens * c.hidden),
            random.array(DType::f32, c.tokens),
            random.array(DType::f32, slots),
            std::vector<int32_t>(slots),
            std::vector<int32_t>(slots)};
  std::iota(in.sorted_to_slot.begin(), in.sorted_to_slot.end(), 0);
  for (int64_t i = slots - 1; i > 0; --i) std::swap(in.sorted_to_slot[i], in.sorted_to_slot[random.below(i + 1)]);
  for (int64_t r = 0; r < slots; ++r) in.slot_to_sorted[in.sorted_to_slot[r]] = static_cast<int32_t>(r);
  // Rows past the live ones are never read: NaN there must not come through.
  for (int64_t i = (c.num_shared * c.tokens + c.live) * c.hidden; i < in.rows.size; ++i) in.rows.set(i, NAN);
  return in;
}

static void copies(const Case& c) {
  const Inputs in = inputs_of(c);
  const int64_t slots = c.tokens * c.top_k;
  const auto live = static_cast<int32_t>(c.live);
  const auto run = [&] {
    Placed x(in.x, c.aligned), out(c.type, slots * c.hidden, c.aligned);
    const ummrm::Permute args{x.data(),  in.sorted_to_slot.data(), -1, c.top_k, c.hidden * ummrm::element_bytes(c.type),
                              out.data()};
    check_launch(ummrm::cuda::permute(args, slots, &live, nullptr), "permute");
    return out.array();
  };
  const Array out = under_all_orders("permute", run, [](const Array& a, const Array& b) { return a.same_bits(b); });
  for (int64_t i = 0; i < slots * c.hidden; ++i) {
    const int64_t row = i / c.hidden, token = in.sorted_to_slot[row] / c.top_k;
    check_close(out, i, row < c.live ? in.x[token * c.hidden + i % c.hidden] : 0, 0, "permuted");
  }
}

static void sums(const Case& c) {
  const Inputs in = inputs_of(c);
  const auto live = static_cast<int32_t>(c.live);
  const auto run = [&] {
    Placed rows(in.rows, c.aligned), out(c.type, c.tokens * c.hidden, c.aligned);
    const ummrm::Unpermute args{c.type,
                                rows.data(),
                                in.slot_to_sorted.data(),
                                c.weighted ? in.shared_weight.data() : nullptr,
                                c.weighted ? in.routed_weights.data() : nullptr,
                                c.tokens,
                                c.hidden,
                                c.top_k,
                                c.num_shared,
                                -1,
                                out.data()};
    check_launch(ummrm::cuda::unpermute(args, &live, nullptr), "unpermute");
    return out.array();
  };
  const Array out = under_all_orders("unpermute", run, [](const Array& a, const Array& b) { return a.same_bits(b); });
  for (int64_t i = 0; i < c.tokens * c.hidden; ++i) {
    const int64_t t = i / c.hidden, h = i % c.hidden;
    double want = 0, size = 0;
    const auto add = [&](double scale, int64_t row) {
      want += scale * in.rows[row * c.hidden + h];
      size += std::fabs(scale * in.rows[row * c.hidden + h]);
    };
    for (int64_t s = 0; s < c.num_shared; ++s)
      add(c.weighted ? in.shared_weight[t] / static_cast<double>(c.num_shared) : 1, s * c.tokens + t);
    for (int64_t slot = t * c.top_k; slot < (t + 1) * c.top_k; ++slot) {
      const int64_t row = in.slot_to_sorted[slot];
      if (row < c.live) add(c.weighted ? in.routed_weights[slot] : 1, c.num_shared * c.tokens + row);
    }
    check_close(out, i, want, 1e-6 * size + epsilon(c.type) * std::fabs(want), "unpermuted");
  }
}

struct Grads {
  Array rows, shared, routed;
};

static void backward(const Case& c) {
  const Inputs in = inputs_of(c);
  const int64_t slots = c.tokens * c.top_k, shared_rows = c.num_shared * c.tokens;
  const auto live = static_cast<int32_t>(c.live);
  const auto run = [&] {
    Placed rows(in.rows, c.aligned), grad(in.grad, c.aligned), grad_rows(c.type, in.rows.size, c.aligned);
    Array grad_shared(DType::f32, c.tokens), grad_routed(DType::f32, slots);
    const ummrm::UnpermuteBackward args{c.type,
                                        grad.data(),
                                        rows.data(),
                                        in.slot_to_sorted.data(),
                                        c.weighted ? in.shared_weight.data() : nullptr,
                                        c.weighted ? in.routed_weights.data() : nullptr,
                                        c.tokens,
                                        c.hidden,
                                        c.top_k,
                                        c.num_shared,
                                        -1,
                                        grad_rows.data(),
                                        c.weighted ? grad_shared.data() : nullptr,
                                        c.weighted ? grad_routed.data() : nullptr};
    check_launch(ummrm::cuda::unpermute_backward(args, &live, nullptr), "unpermute_backward");
    return Grads{grad_rows.array(), grad_shared, grad_routed};
  };
  const Grads got = under_all_orders("unpermute_backward", run, [](const Grads& a, const Grads& b) {
    return a.rows.same_bits(b.rows) && a.shared.same_bits(b.shared) && a.routed.same_bits(b.routed);
  });
  for (int64_t t = 0; t < c.tokens; ++t) {
    double shared_dot = 0, shared_size = 0;
    // Checks the gradient of a row; adds to the dot and to the size of its terms.
    const auto check_row = [&](int64_t row, double scale, bool alive, double* dot, double* size) {
      for (int64_t h = 0; h < c.hidden; ++h) {
        const double g = in.grad[t * c.hidden + h], want = alive ? scale * g : 0;
        check_close(got.rows, row * c.hidden + h, want, (epsilon(c.type) + 1e-6) * std::fabs(want), "grad of rows");
        if (!alive) continue;
        *dot += g * in.rows[row * c.hidden + h];
        *size += std::fabs(g * in.rows[row * c.hidden + h]);
      }
    };
    for (int64_t s = 0; s < c.num_shared; ++s) {
      const double scale = c.weighted ? in.shared_weight[t] / static_cast<double>(c.num_shared) : 1;
      check_row(s * c.tokens + t, scale, true, &shared_dot, &shared_size);
    }
    const double shares = static_cast<double>(std::max<int64_t>(c.num_shared, 1));
    if (c.weighted) check_close(got.shared, t, shared_dot / shares, 1e-6 * shared_size, "grad of shared weight");
    for (int64_t slot = t * c.top_k; slot < (t + 1) * c.top_k; ++slot) {
      double dot = 0, size = 0;
      const int64_t row = in.slot_to_sorted[slot];
      check_row(shared_rows + row, c.weighted ? in.routed_weights[slot] : 1, row < c.live, &dot, &size);
      if (c.weighted) check_close(got.routed, slot, dot, 1e-6 * size, "grad of routed weight");
    }
  }
}

int main() {
  for (const DType type : kCudaTypes) {
    for (const bool weighted : {false, true}) {
      for (const bool aligned : {true, false}) {
        // tokens, top_k, hidden, shared experts, live rows
        for (const auto& [t, k, h, s, live] : {std::tuple{3, 2, 8, 1, 4},
                                               {5, 3, 37, 2, 15},
                                               {4, 1, 1, 0, 3},
                                               {2, 2, 16, 1, 0},
                                               {0, 2, 8, 1, 0},
                                               {3, 2, 0, 1, 6},
                                               {7, 16, 640, 1, 100},
                                               {2, 2, 2312, 1, 3}}) {
          if (kSmallOnly && h > 100) continue;
          const Case c{type, t, k, h, s, live, weighted, aligned};
          if (weighted) copies(c);
          sums(c);
          backward(c);
        }
      }
    }
  }
  Array x(DType::f64, 1);
  const int32_t live = 1;
  CHECK(ummrm::cuda::unpermute({DType::f64, x.data(), &live, nullptr, nullptr, 1, 1, 1, 0, 1, x.data()}, &live,
                               nullptr) != 0,
        "fp64 is refused");
  return finish();
}
