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
