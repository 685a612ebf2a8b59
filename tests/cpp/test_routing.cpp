// routing.h: route against plain loops in double, its backward against finite differences of those loops, ties, NaN and
// masks; the sort of slots against std::stable_sort.
#include "ummrm/routing.h"

#include <numeric>

#include "routing_truth.h"

using namespace testing;
using ummrm::Gate;

struct Routed {
  Array shared, routed, mean_prob, mean_z;
  std::vector<int32_t> indices, counts;
  int64_t live;
};

struct Case {
  DType type;
  int64_t tokens, experts, top_k;
  Gate gate;
  bool masked, noisy;
};

struct Inputs {
  Array logits, clean;
  std::vector<char> mask;
};

static Inputs inputs_of(const Case& c, uint64_t seed) {
  Random random(seed);
  Inputs in{random.array(c.type, c.tokens * c.experts, 2), random.array(c.type, c.tokens * c.experts, 2),
            std::vector<char>(c.tokens, 1)};
  for (int64_t i = 0; i < c.tokens * c.experts / 3; ++i) in.logits.set(i, std::nearbyint(in.logits[i]));  // ties
  for (int64_t t = 0; c.masked && t < c.tokens; ++t) in.mask[t] = random.below(3) != 0;
  return in;
}

static Routed run(const Case& c, const Inputs& in, int64_t threads) {
  const DType acc = accumulator(c.type);
  const int64_t blocks = (c.tokens + ummrm::cpu::kRouteBlock - 1) / ummrm::cpu::kRouteBlock;
  Routed r{Array(acc, c.tokens),
           Array(acc, c.tokens * c.top_k),
           Array(acc, c.experts),
           Array(acc, 1),
           std::vector<int32_t>(c.tokens * c.top_k, -9),
           std::vector<int32_t>(c.experts, -9),
           0};
  std::vector<double> prob(blocks * c.experts, NAN), z(blocks, NAN);
  std::vector<int32_t> count(blocks * c.experts, -9);
  std::vector<int64_t> live(blocks, -9);
  const ummrm::Route args{c.type,
                          in.logits.data(),
                          c.noisy ? in.clean.data() : nullptr,
                          c.masked ? reinterpret_cast<const bool*>(in.mask.data()) : nullptr,
                          c.tokens,
                          c.experts,
                          c.top_k,
                          c.gate,
                          kFixedWeight,
                          r.shared.data(),
                          r.routed.data(),
                          r.indices.data(),
                          prob.data(),
                          z.data(),
                          count.data(),
                          live.data()};
  launch(blocks, threads, [&](int64_t begin, int64_t end) { ummrm::cpu::route(args, begin, end); });
  ummrm::cpu::route_finish(args, r.counts.data(), r.mean_prob.data(), r.mean_z.data());
  r.live = std::accumulate(live.begin(), live.end(), int64_t{0});
  return r;
}

static void forward(const Case& c) {
  const Inputs in = inputs_of(c, 17 + c.tokens);
  const Routed got = run(c, in, 1), again = run(c, in, 3);
  CHECK(got.mean_prob.same_bits(again.mean_prob) && got.mean_z.same_bits(again.mean_z) && got.counts == again.counts &&
            got.routed.same_bits(again.routed),
        "route depends on the threads");
  CHECK(check_routed(c, in, got, 16 * epsilon(accumulator(c.type))) == got.live, "live tokens");
}

// grad_logits and grad_clean, in that order.
static std::pair<Array, Array> gradients(const Case& c, const Inputs& in, const Routed& r, const Array& gs,
                                         const Array& gr, const Array& gp, const Array& gz) {
  Array grad(c.type, c.tokens * c.experts), grad_clean(c.type, c.tokens * c.experts);
  const ummrm::RouteBackward args{c.type,
                                  in.logits.data(),
                                  c.noisy ? in.clean.data() : nullptr,
                                  c.masked ? reinterpret_cast<const bool*>(in.mask.data()) : nullptr,
                                  c.tokens,
                                  c.experts,
                                  c.top_k,
                                  c.gate,
                                  kFixedWeight,
                                  r.live,
                                  r.indices.data(),
                                  gs.data(),
                                  gr.data(),
                                  gp.data(),
                                  gz.data(),
                                  grad.data(),
                                  c.noisy ? grad_clean.data() : nullptr};
  launch(c.tokens, 3, [&](int64_t begin, int64_t end) { ummrm::cpu::route_backward(args, begin, end); });
  return {grad, grad_clean};
}

static void backward(const Case& c) {
  const Inputs in = inputs_of(c, 5 + c.tokens);
  Inputs wide_in{Array(DType::f64, in.logits.size), Array(DType::f64, in.clean.size), in.mask};
  for (int64_t i = 0; i < in.logits.size; ++i) {
    wide_in.logits.set(i, in.logits[i]);
    wide_in.clean.set(i, in.clean[i]);
  }
  Random random(9);
  const DType acc = accumulator(c.type);
  const Array gs = random.array(acc, c.tokens), gr = random.array(acc, c.tokens * c.top_k),
              gp = random.array(acc, c.experts), gz = random.array(acc, 1);
  const auto [grad, grad_clean] = gradients(c, in, run(c, in, 2), gs, gr, gp, gz);

  // Others' terms of the loss are constant in one token's logits.
  const RouteGrads grads{gs, gr, gp, gz};
  const double live = static_cast<double>(std::max<int64_t>(run(c, in, 1).live, 1));
  for (int64_t t = 0; t < c.tokens; ++t) {
    const auto logits = row(wide_in.logits, t, c.experts), clean = row(wide_in.clean, t, c.experts);
    const auto chosen = largest(logits, c.top_k);
    for (int64_t e = 0; e < c.experts; ++e) {
      const bool dead = c.masked && !in.mask[t];
      const double of_gates = dead ? 0 : slope_of_gates(c.gate, grads, logits, chosen, t, e);
      const double of_statistics = dead ? 0 : slope_of_means(grads, c.noisy ? clean : logits, live, e);
      const double tolerance =
          dead ? 0 : 2e-9 + 32 * epsilon(acc) + 2 * epsilon(c.type) * (std::fabs(of_gates) + std::fabs(of_statistics));
      check_close(grad, t * c.experts + e, c.noisy ? of_gates : of_gates + of_statistics, tolerance, "grad of logits");
      if (c.noisy) check_close(grad_clean, t * c.experts + e, of_statistics, tolerance, "grad of clean logits");
    }
  }
}

static void special_values() {
  const double inf = INFINITY;
  for (const DType type : kTypes) {
    const Case c{type, 4, 4, 2, Gate::shared_complement, false, false};
    Inputs in{Array(type, 16), Array(type, 16), std::vector<char>(4, 1)};
    const double logits[16] = {1, NAN, 3, 4, inf, 0, 0, 0, -inf, -inf, -inf, -inf, -inf, 2, -inf, -inf};
    for (int64_t i = 0; i < 16; ++i) in.logits.set(i, logits[i]);
    const Routed got = run(c, in, 1);
    const std::vector<int32_t> want{0, 1, 0, 1, 0, 1, 1, 0};  // NaN rows by index; the last row ranks -inf after 2
    CHECK(got.indices == want, "indices of rows with NaN and infinities");
    for (int64_t t = 0; t < 3; ++t)
      CHECK(std::isnan(got.shared[t]) && std::isnan(got.routed[2 * t + 1]), "NaN propagates in row %d",
            static_cast<int>(t));
    check_close(got.shared, 3, 0, 0, "a certain choice leaves the shared expert nothing");
    CHECK(std::isnan(got.mean_prob[0]), "NaN propagates to the statistics");
  }
}

static void sorting(int64_t slots, int64_t experts, int64_t threads) {
  Random random(slots);
  std::vector<int32_t> expert(slots), forward(slots, -9), backward(slots, -9), offsets(experts + 1, -9), want(slots);
  for (int32_t& e : expert) e = static_cast<int32_t>(random.below(experts + 1)) - 1;
  const int64_t blocks = (slots + ummrm::cpu::kSortBlock - 1) / ummrm::cpu::kSortBlock;
  std::vector<int64_t> next(blocks * (experts + 1), -9);
  const ummrm::SortSlots args{expert.data(),   slots,          experts,    forward.data(),
                              backward.data(), offsets.data(), next.data()};
  launch(blocks, threads, [&](int64_t b, int64_t e) { ummrm::cpu::sort_slots_count(args, b, e); });
  ummrm::cpu::sort_slots_scan(args);
  launch(blocks, threads, [&](int64_t b, int64_t e) { ummrm::cpu::sort_slots_scatter(args, b, e); });
  std::iota(want.begin(), want.end(), 0);
  const auto key = [&](int32_t slot) { return expert[slot] < 0 ? experts : expert[slot]; };
  std::stable_sort(want.begin(), want.end(), [&](int32_t a, int32_t b) { return key(a) < key(b); });
  CHECK(backward == want, "sorted order");
  for (int64_t r = 0; r < slots; ++r) CHECK(forward[backward[r]] == r, "the two maps are inverse");
  for (int64_t e = 0; e <= experts; ++e) {
    const auto below = std::count_if(expert.begin(), expert.end(), [&](int32_t x) { return x >= 0 && x < e; });
    CHECK(offsets[e] == below, "offset %lld", static_cast<long long>(e));
  }
}

int main() {
  for (const DType type : kTypes) {
    for (const Gate gate : {Gate::shared_complement, Gate::fixed}) {
      for (const bool masked : {false, true}) {
        for (const bool noisy : {false, true}) {
          for (const auto& [tokens, experts, top_k] :
               {std::tuple{600, 7, 5}, {33, 3, 1}, {5, 1, 1}, {17, 40, 8}, {0, 4, 2}}) {
            const Case c{type, tokens, experts, top_k, gate, masked, noisy};
            forward(c);
            if (tokens < 100) backward(c);
          }
        }
      }
    }
  }
  special_values();
  sorting(0, 3, 1);
  sorting(100, 1, 1);
  sorting(20000, 7, 3);
  return finish();
}
