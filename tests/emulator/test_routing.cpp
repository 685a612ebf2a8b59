// The CUDA kernels of routing.h on the emulator: route against its definition in double, its backward against finite
// differences, ties, NaN and masks; the sort of slots against std::stable_sort.
#include "routing.cu"

#include "emulated.h"
#include "routing_truth.h"

using namespace testing;
using ummrm::Gate;

struct Case {
  DType type;
  int64_t tokens, experts, top_k;
  Gate gate;
  int masked;  // 0 none, 1 a third, 2 all
  bool noisy;
};

struct Inputs {
  Array logits, clean;
  std::vector<char> mask;
  const bool* mask_or_null(const Case& c) const {
    return c.masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
  }
};

struct Routed {
  Array shared, routed, mean_prob, mean_z;
  std::vector<int32_t> indices, counts;
  bool operator==(const Routed& o) const {
    return shared.same_bits(o.shared) && routed.same_bits(o.routed) && mean_prob.same_bits(o.mean_prob) &&
           mean_z.same_bits(o.mean_z) && indices == o.indices && counts == o.counts;
  }
};

static Inputs inputs_of(const Case& c) {
  Random random(17 + c.tokens + c.experts);
  Inputs in{random.array(c.type, c.tokens * c.experts, 2), random.array(c.type, c.tokens * c.experts, 2),
            std::vector<char>(c.tokens, 1)};
  for (int64_t i = 0; i < c.tokens * c.experts / 2; ++i) in.logits.set(i, std::nearbyint(in.logits[i]));  // ties
  for (int64_t t = 0; t < c.tokens; ++t) {
    in.mask[t] = c.masked == 0 || (c.masked == 1 && random.below(3) != 0);
    if (in.mask[t]) continue;
    in.logits.set(t * c.experts, NAN);  // what a masked token holds reaches nothing
    in.clean.set(t * c.experts, NAN);
  }
  return in;
}

static Routed run(const Case& c, const Inputs& in) {
  const auto once = [&] {
    Routed r{
        Array(DType::f32, c.tokens), Array(DType::f32, c.tokens * c.top_k),        Array(DType::f32, c.experts),
        Array(DType::f32, 1),        std::vector<int32_t>(c.tokens * c.top_k, -9), std::vector<int32_t>(c.experts, -9)};
    std::vector<unsigned char> workspace(ummrm::cuda::route_workspace(c.tokens, c.experts), 0xff);
    const ummrm::Route args{c.type,
                            in.logits.data(),
                            c.noisy ? in.clean.data() : nullptr,
                            in.mask_or_null(c),
                            c.tokens,
                            c.experts,
                            c.top_k,
                            c.gate,
                            kFixedWeight,
                            r.shared.data(),
                            r.routed.data(),
                            r.indices.data(),
                            nullptr,
                            nullptr,
                            nullptr,
                            nullptr};
    check_launch(ummrm::cuda::route(args, r.counts.data(), static_cast<float*>(r.mean_prob.data()),
                                    static_cast<float*>(r.mean_z.data()), workspace.data(), nullptr),
                 "route");
    return r;
  };
  return under_all_orders("route", once, [](const Routed& a, const Routed& b) { return a == b; });
}

static void backward(const Case& c, const Inputs& in, const Routed& routed) {
  Random random(9);
  const Array gs = random.array(DType::f32, c.tokens), gr = random.array(DType::f32, c.tokens * c.top_k);
  const Array gp = random.array(DType::f32, c.experts), gz = random.array(DType::f32, 1);
  const auto once = [&] {
    std::pair<Array, Array> grads{Array(c.type, c.tokens * c.experts), Array(c.type, c.tokens * c.experts)};
    const ummrm::RouteBackward args{c.type,
                                    in.logits.data(),
                                    c.noisy ? in.clean.data() : nullptr,
                                    in.mask_or_null(c),
                                    c.tokens,
                                    c.experts,
                                    c.top_k,
                                    c.gate,
                                    kFixedWeight,
                                    -1,
                                    routed.indices.data(),
                                    gs.data(),
                                    gr.data(),
                                    gp.data(),
                                    gz.data(),
                                    grads.first.data(),
                                    c.noisy ? grads.second.data() : nullptr};
    check_launch(ummrm::cuda::route_backward(args, routed.counts.data(), nullptr), "route_backward");
    return grads;
  };
  const auto [grad, grad_clean] = under_all_orders("route_backward", once, [](const auto& a, const auto& b) {
    return a.first.same_bits(b.first) && a.second.same_bits(b.second);
  });
  const RouteGrads grads{gs, gr, gp, gz};
  const double live = static_cast<double>(std::max<int64_t>(std::count(in.mask.begin(), in.mask.end(), 1), 1));
  for (int64_t t = 0; t < c.tokens; ++t) {
    const auto logits = row(in.logits, t, c.experts), clean = row(c.noisy ? in.clean : in.logits, t, c.experts);
    const auto chosen = largest(logits, c.top_k);
    for (int64_t e = 0; e < c.experts; ++e) {
      const bool dead = !in.mask[t];
      const double of_gates = dead ? 0 : slope_of_gates(c.gate, grads, logits, chosen, t, e);
      const double of_means = dead ? 0 : slope_of_means(grads, clean, live, e);
      const double size = std::fabs(of_gates) + std::fabs(of_means);
      const double tolerance = dead ? 0 : 2e-9 + 64 * epsilon(DType::f32) + 2 * epsilon(c.type) * size;
      check_close(grad, t * c.experts + e, c.noisy ? of_gates : of_gates + of_means, tolerance, "grad of logits");
      if (c.noisy) check_close(grad_clean, t * c.experts + e, of_means, tolerance, "grad of clean logits");
    }
  }
}

static void special_values() {
  const double inf = INFINITY;
  for (const DType type : kCudaTypes) {
    const Case c{type, 5, 4, 2, Gate::shared_complement, 0, false};
    Inputs in{Array(type, 20), Array(type, 20), std::vector<char>(5, 1)};
    const double logits[20] = {1,    NAN,  3,    4, inf,  0,    0,    0,    -inf, -inf,
                               -inf, -inf, -inf, 2, -inf, -inf, -500, -500, -600, -500};
    for (int64_t i = 0; i < 20; ++i) in.logits.set(i, logits[i]);
    const Routed got = run(c, in);
    const std::vector<int32_t> want{0, 1, 0, 1, 0, 1, 1, 0, 0, 1};  // NaN rows by index; -inf ranks after 2
    CHECK(got.indices == want, "indices of rows with NaN and infinities");
    for (int64_t t = 0; t < 3; ++t)
      CHECK(std::isnan(got.shared[t]) && std::isnan(got.routed[2 * t + 1]), "NaN propagates in row %d",
            static_cast<int>(t));
    check_close(got.shared, 3, 0, 0, "a certain choice leaves the shared expert nothing");
    check_close(got.shared, 4, 2.0 / 3, 1e-6, "logits whose exponentials underflow");
    CHECK(std::isnan(got.mean_prob[0]), "NaN propagates to the statistics");
  }
}

int main() {
  for (const DType type : kCudaTypes) {
    for (const Gate gate : {Gate::shared_complement, Gate::fixed}) {
      for (const int masked : {0, 1, 2}) {
        for (const bool noisy : {false, true}) {
          // Every layout of lanes, full and ragged; more than one block of tokens; no token.
          for (const auto& [tokens, experts, top_k] : {std::tuple{300, 7, 5},
                                                       {33, 3, 1},
                                                       {5, 1, 1},
                                                       {9, 12, 4},
                                                       {5, 16, 16},
                                                       {3, 32, 2},
                                                       {4, 40, 8},
                                                       {2, 100, 3},
                                                       {2, 250, 16},
                                                       {2, 256, 1},
                                                       {0, 4, 2}}) {
            if (experts > 16 && masked != 1) continue;
            if (kSmallOnly && (experts > 16 || tokens == 33)) continue;
            const Case c{type, tokens, experts, top_k, gate, masked, noisy};
            const Inputs in = inputs_of(c);
            const Routed routed = run(c, in);
            check_routed(c, in, routed, 32 * epsilon(DType::f32));
            if (tokens < 100) backward(c, in, routed);
          }
        }
      }
    }
  }
  special_values();
  CHECK(ummrm::cuda::route({DType::f32, nullptr, nullptr, nullptr, 1, 257, 1, Gate::fixed, 0, nullptr, nullptr, nullptr,
                            nullptr, nullptr, nullptr, nullptr},
                           nullptr, nullptr, nullptr, nullptr, nullptr) != 0,
        "more experts than there are lanes for are refused");
  return finish();
}
