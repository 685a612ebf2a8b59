// permute.h against plain loops in double, with dead slots, several shared experts, with and without gate weights; and
// at offsets beyond 2^31 elements.
#include "ummrm/permute.h"

#include <sys/mman.h>

#include <numeric>

#include "testing.h"

using namespace testing;

struct Case {
  DType type;
  int64_t tokens, hidden, top_k, num_shared, live;
  bool weighted;
};

static std::vector<int32_t> shuffled(Random& random, int64_t n) {
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
  return order;
}

static void gather(const Case& c, Random& random) {
  const int64_t slots = c.tokens * c.top_k;
  const Array x = random.array(c.type, c.tokens * c.hidden);
  const std::vector<int32_t> sorted_to_slot = shuffled(random, slots);
  Array out(c.type, slots * c.hidden);
  const ummrm::Permute args{x.data(),  sorted_to_slot.data(), c.live, c.top_k, c.hidden * ummrm::element_bytes(c.type),
                            out.data()};
  launch(slots, 3, [&](int64_t begin, int64_t end) { ummrm::cpu::permute(args, begin, end); });
  for (int64_t r = 0; r < slots; ++r) {
    for (int64_t h = 0; h < c.hidden; ++h) {
      const double want = r < c.live ? x[sorted_to_slot[r] / c.top_k * c.hidden + h] : 0;
      check_close(out, r * c.hidden + h, want, 0, "permuted");
    }
  }
}

static void scatter(const Case& c, Random& random) {
  const int64_t slots = c.tokens * c.top_k, shared_rows = c.num_shared * c.tokens;
  Array rows = random.array(c.type, (shared_rows + slots) * c.hidden);
  for (int64_t i = (shared_rows + c.live) * c.hidden; i < rows.size; ++i) rows.set(i, NAN);  // must not be read
  const std::vector<int32_t> slot_to_sorted = shuffled(random, slots);
  const DType acc = accumulator(c.type);
  const Array shared_weight = random.array(acc, c.tokens), routed_weights = random.array(acc, slots);
  const Array grad = random.array(c.type, c.tokens * c.hidden);
  Array out(c.type, c.tokens * c.hidden), grad_rows(c.type, rows.size), grad_shared(acc, c.tokens),
      grad_routed(acc, slots);

  const void* sw = c.weighted ? shared_weight.data() : nullptr;
  const void* rw = c.weighted ? routed_weights.data() : nullptr;
  const ummrm::Unpermute forward{c.type,   rows.data(), slot_to_sorted.data(), sw,     rw,        c.tokens,
                                 c.hidden, c.top_k,     c.num_shared,          c.live, out.data()};
  launch(c.tokens, 3, [&](int64_t begin, int64_t end) { ummrm::cpu::unpermute(forward, begin, end); });
  const ummrm::UnpermuteBackward backward{c.type,
                                          grad.data(),
                                          rows.data(),
                                          slot_to_sorted.data(),
                                          sw,
                                          rw,
                                          c.tokens,
                                          c.hidden,
                                          c.top_k,
                                          c.num_shared,
                                          c.live,
                                          grad_rows.data(),
                                          c.weighted ? grad_shared.data() : nullptr,
                                          c.weighted ? grad_routed.data() : nullptr};
  launch(c.tokens, 3, [&](int64_t begin, int64_t end) { ummrm::cpu::unpermute_backward(backward, begin, end); });

  for (int64_t t = 0; t < c.tokens; ++t) {
    const double scale = c.weighted && c.num_shared > 0 ? shared_weight[t] / static_cast<double>(c.num_shared) : 1;
    double shared_dot = 0;
    for (int64_t h = 0; h < c.hidden; ++h) {
      double want = 0, magnitude = 0;
      const double g = grad[t * c.hidden + h];
      const auto add = [&](int64_t row, double weight) {
        want += weight * rows[row * c.hidden + h];
        magnitude += std::fabs(weight * rows[row * c.hidden + h]);
        check_close(grad_rows, row * c.hidden + h, weight * g, 2 * epsilon(c.type) * std::fabs(weight * g),
                    "grad of row");
      };
      for (int64_t s = 0; s < c.num_shared; ++s) {
        add(s * c.tokens + t, scale);
        shared_dot += g * rows[(s * c.tokens + t) * c.hidden + h];
      }
      for (int64_t k = 0; k < c.top_k; ++k) {
        const int64_t slot = t * c.top_k + k, row = slot_to_sorted[slot];
        if (row < c.live) {
          add(shared_rows + row, c.weighted ? routed_weights[slot] : 1);
        } else {
          check_close(grad_rows, (shared_rows + row) * c.hidden + h, 0, 0, "grad of dead row");
        }
      }
      check_close(out, t * c.hidden + h, want, epsilon(c.type) * std::fabs(want) + 8 * epsilon(acc) * magnitude,
                  "unpermuted");
    }
    if (!c.weighted) continue;
    const double tolerance = 64 * epsilon(acc) * static_cast<double>(c.hidden + 1);
    check_close(grad_shared, t, c.num_shared > 0 ? shared_dot / static_cast<double>(c.num_shared) : 0, tolerance,
                "grad of shared weight");
    for (int64_t slot = t * c.top_k; slot < (t + 1) * c.top_k; ++slot) {
      double want = 0;
      const int64_t row = slot_to_sorted[slot];
      for (int64_t h = 0; row < c.live && h < c.hidden; ++h)
        want += grad[t * c.hidden + h] * rows[(shared_rows + row) * c.hidden + h];
      check_close(grad_routed, slot, want, tolerance, "grad of routed weight");
    }
  }
}

// Reserved, not committed: only the pages at the far end are ever touched.
struct Reserved {
  size_t bytes;
  void* memory;
  explicit Reserved(size_t bytes)
      : bytes(bytes),
        memory(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~Reserved() { munmap(memory, bytes); }
};

static void beyond_int32() {
  const DType type = DType::bf16;
  const int64_t hidden = 1024, tokens = (int64_t{1} << 31) / hidden + 3, top_k = 1, last = tokens - 1;
  Reserved x(tokens * hidden * 2), rows(2 * tokens * hidden * 2), out(tokens * hidden * 2);
  CHECK(x.memory != MAP_FAILED && rows.memory != MAP_FAILED && out.memory != MAP_FAILED,
        "cannot reserve address space");
  if (failures > 0) return;
  std::vector<int32_t> identity(tokens);
  std::iota(identity.begin(), identity.end(), 0);
  for (int64_t h = 0; h < hidden; ++h) {
    put(type, x.memory, last * hidden + h, 1 + h % 7);
    put(type, rows.memory, last * hidden + h, 1);                 // shared
    put(type, rows.memory, (tokens + last) * hidden + h, h % 5);  // routed
  }
  const ummrm::Permute forward{x.memory, identity.data(), tokens, top_k, hidden * 2, out.memory};
  ummrm::cpu::permute(forward, last, tokens);
  for (int64_t h = 0; h < hidden; ++h) {
    CHECK(at(type, out.memory, last * hidden + h) == 1 + h % 7, "permute at element %lld",
          static_cast<long long>(last * hidden + h));
  }
  const ummrm::Unpermute back{type,  rows.memory, identity.data(), nullptr,   nullptr, tokens, hidden,
                              top_k, 1,           tokens,          out.memory};
  ummrm::cpu::unpermute(back, last, tokens);
  for (int64_t h = 0; h < hidden; ++h) {
    CHECK(at(type, out.memory, last * hidden + h) == 1 + h % 5, "unpermute at element %lld",
          static_cast<long long>(last * hidden + h));
  }
}

int main() {
  Random random(3);
  for (const DType type : kTypes) {
    for (const bool weighted : {true, false}) {
      for (const Case& c : {Case{type, 7, 515, 3, 1, 15, weighted},
                            {type, 5, 3, 1, 2, 5, weighted},
                            {type, 4, 40, 2, 0, 0, weighted},
                            {type, 1, 1, 1, 1, 1, weighted},
                            {type, 0, 8, 2, 1, 0, weighted}}) {
        gather(c, random);
        scatter(c, random);
      }
    }
  }
  const std::vector<int32_t> values{0, 3, -1, 7};
  CHECK(ummrm::cpu::first_out_of_range(values.data(), 0, 4, -1, 8) == -1, "all in range");
  CHECK(ummrm::cpu::first_out_of_range(values.data(), 0, 4, 0, 7) == 2, "finds the first");
  beyond_int32();
  return finish();
}
