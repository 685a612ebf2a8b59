// Routing of one token from its definition (p = softmax, the K largest with ties to the lower index, then the gate),
// and the gradients of a loss in its outputs by finite differences: what the routing kernels are held to.
#pragma once

#include <functional>
#include <numeric>

#include "testing.h"
#include "ummrm/routing.h"

namespace testing {

inline constexpr double kFixedWeight = 0.3;  // fixed_shared_weight of all tests

struct Token {
  std::vector<double> p;
  double lse;
};

inline Token softmax(const std::vector<double>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  Token token{std::vector<double>(logits.size()), 0};
  double sum = 0;
  for (size_t e = 0; e < logits.size(); ++e) sum += token.p[e] = std::exp(logits[e] - top);
  for (double& p : token.p) p /= sum;
  token.lse = top + std::log(sum);
  return token;
}

inline std::vector<int64_t> largest(const std::vector<double>& logits, int64_t k) {
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  order.resize(k);
  return order;
}

inline void gates(ummrm::Gate gate, const std::vector<double>& p, const std::vector<int64_t>& chosen, double* shared,
                  std::vector<double>& routed) {
  const bool fixed = gate == ummrm::Gate::fixed;
  routed.assign(chosen.size(), 0);
  double total = 0;
  for (size_t j = 0; j < chosen.size(); ++j) total += routed[j] = fixed ? p[chosen[j]] : std::exp(p[chosen[j]]);
  const double top = p[chosen[0]];
  for (double& r : routed) r *= (fixed ? 1 - kFixedWeight : top) / total;
  *shared = fixed ? kFixedWeight : 1 - top;
}

inline std::vector<double> row(const Array& logits, int64_t t, int64_t n) {
  std::vector<double> out(n);
  for (int64_t e = 0; e < n; ++e) out[e] = logits[t * n + e];
  return out;
}

// Holds what route gave (`got`) of a test's case and inputs to the definition; returns the number of live tokens.
// Inputs have a mask for every token, all live in a case without one.
template <class Case, class Inputs, class Routed>
int64_t check_routed(const Case& c, const Inputs& in, const Routed& got, double tolerance) {
  std::vector<double> mean_prob(c.experts, 0), routed;
  std::vector<int32_t> counts(c.experts, 0);
  double mean_z = 0, shared = 0;
  int64_t live = 0;
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (!in.mask[t]) {
      check_close(got.shared, t, 1, 0, "shared weight of a masked token");
      for (int64_t k = 0; k < c.top_k; ++k) {
        check_close(got.routed, t * c.top_k + k, 0, 0, "routed weight of a masked token");
        CHECK(got.indices[t * c.top_k + k] == -1, "index of a masked token");
      }
      continue;
    }
    ++live;
    const auto logits = row(in.logits, t, c.experts);
    const auto chosen = largest(logits, c.top_k);
    gates(c.gate, softmax(logits).p, chosen, &shared, routed);
    check_close(got.shared, t, shared, tolerance, "shared weight");
    for (int64_t k = 0; k < c.top_k; ++k) {
      CHECK(got.indices[t * c.top_k + k] == chosen[k], "token %lld, choice %lld", static_cast<long long>(t),
            static_cast<long long>(k));
      check_close(got.routed, t * c.top_k + k, routed[k], tolerance, "routed weight");
      ++counts[chosen[k]];
    }
    const Token clean = softmax(row(c.noisy ? in.clean : in.logits, t, c.experts));
    for (int64_t e = 0; e < c.experts; ++e) mean_prob[e] += clean.p[e];
    mean_z += clean.lse * clean.lse;
  }
  const double count = static_cast<double>(std::max<int64_t>(live, 1));
  CHECK(got.counts == counts, "tokens per expert");
  check_close(got.mean_z, 0, mean_z / count, tolerance * (1 + mean_z / count), "mean z");
  for (int64_t e = 0; e < c.experts; ++e)
    check_close(got.mean_prob, e, mean_prob[e] / count, tolerance, "mean probability");
  return live;
}

// Gradients of what route returns, in token t's part of the loss.
struct RouteGrads {
  const Array &shared, &routed, &prob, &z;
};

inline double slope(const std::function<double(const std::vector<double>&)>& loss, std::vector<double> x, int64_t e) {
  const double h = 1e-5;
  x[e] += h;
  const double up = loss(x);
  x[e] -= 2 * h;
  return (up - loss(x)) / (2 * h);
}

// d loss / d logits[e] through the gates, with the choice held.
inline double slope_of_gates(ummrm::Gate gate, const RouteGrads& grads, const std::vector<double>& logits,
                             const std::vector<int64_t>& chosen, int64_t t, int64_t e) {
  const auto loss = [&](const std::vector<double>& x) {
    double shared = 0;
    std::vector<double> routed;
    gates(gate, softmax(x).p, chosen, &shared, routed);
    double sum = gate == ummrm::Gate::fixed ? 0 : grads.shared[t] * shared;
    const auto top_k = static_cast<int64_t>(chosen.size());
    for (int64_t k = 0; k < top_k; ++k) sum += grads.routed[t * top_k + k] * routed[k];
    return sum;
  };
  return slope(loss, logits, e);
}

// d loss / d clean[e] through the means over `live` tokens.
inline double slope_of_means(const RouteGrads& grads, const std::vector<double>& clean, double live, int64_t e) {
  const auto loss = [&](const std::vector<double>& x) {
    const Token token = softmax(x);
    double sum = grads.z[0] * token.lse * token.lse / live;
    for (size_t i = 0; i < x.size(); ++i) sum += grads.prob[static_cast<int64_t>(i)] * token.p[i] / live;
    return sum;
  };
  return slope(loss, clean, e);
}

}  // namespace testing
