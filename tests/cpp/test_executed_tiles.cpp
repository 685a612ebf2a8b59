// What the chosen tiles compute beside what was asked for, on Hopper: groups are rounded up to whole tiles and these to
// whole clusters, whose blocks multiply zeros and store nothing. Bounded for sizes at which a careless choice wastes
// most, odd multiples of 128, with groups as uneven as a router makes them.
#include "../../kernels/cuda/expert_tiles.h"

#include "testing.h"

using namespace testing;
using namespace ummrm::cuda;

static int64_t rounded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

// Rows of the groups: a shared expert's, which are all, and those of `experts` routed ones, some with several times as
// many as others, which sum to tokens * top_k.
static std::vector<int64_t> groups_of(int64_t tokens, int64_t experts, int64_t top_k, std::mt19937_64& engine) {
  std::vector<int64_t> rows(experts + 1, 0);
  rows[0] = tokens;
  std::vector<double> share(experts);
  std::uniform_real_distribution<double> uneven(0.3, 1.7);
  double total = 0;
  for (double& s : share) total += s = uneven(engine);
  int64_t left = tokens * top_k;
  for (int64_t e = 0; e < experts; ++e) {
    rows[e + 1] =
        e + 1 == experts ? left : static_cast<int64_t>(static_cast<double>(tokens * top_k) * share[e] / total);
    left -= rows[e + 1];
  }
  return rows;
}

// Multiplications: of the chosen tiles, of tiles of 128 x 128 without clusters, below which no kernel here goes, and of
// the product itself.
struct Work {
  double executed = 0, least = 0, needed = 0;
};

static Work work_of(const std::vector<int64_t>& rows, ExpertProduct product, int64_t columns, int64_t other) {
  int64_t all = 0;
  for (const int64_t r : rows) all += r;
  const auto groups = static_cast<int64_t>(rows.size());
  const TileShape tile = kSm90Tiles[choose_tile(90, 132, {product, groups, all / groups, columns, other}).tile];
  Work work;
  for (const int64_t r : rows) {
    const bool reduced = product == ExpertProduct::weight_grad;
    const int64_t m = reduced ? other : r, k = reduced ? r : other;
    work.executed += static_cast<double>(rounded(m, tile.m * tile.cluster_m)) *
                     static_cast<double>(rounded(columns, tile.n * tile.cluster_n)) *
                     static_cast<double>(rounded(k, tile.k));
    work.least += static_cast<double>(rounded(m, 128)) * static_cast<double>(rounded(columns, 128)) *
                  static_cast<double>(rounded(k, 64));
    work.needed += static_cast<double>(m) * static_cast<double>(columns) * static_cast<double>(k);
  }
  return work;
}

int main() {
  std::mt19937_64 engine(17);
  struct Bound {
    int64_t tokens;
    double over_least, over_needed;
  };
  for (const Bound& bound : {Bound{1024, 1.09, 1.26}, Bound{2048, 1.09, 1.17}, Bound{4096, 1.06, 1.11},
                             Bound{8192, 1.04, 1.06}, Bound{16384, 1.03, 1.03}}) {
    const int64_t tokens = bound.tokens;
    double single = 0, over_least = 0, over_needed = 0;
    for (const int64_t hidden : {896, 1152, 1408, 2816, 4864}) {
      for (const int64_t inner : {896, 1152, 1408, 2816, 4864}) {
        const auto rows = groups_of(tokens, 8, 2, engine);
        Work layer;
        const auto add = [&](ExpertProduct product, int64_t columns, int64_t other) {
          const Work work = work_of(rows, product, columns, other);
          layer.executed += work.executed;
          layer.least += work.least;
          layer.needed += work.needed;
          single = std::max(single, work.executed / work.least);
        };
        add(ExpertProduct::forward, 2 * inner, hidden);
        add(ExpertProduct::forward, hidden, inner);
        add(ExpertProduct::input_grad, inner, hidden);
        add(ExpertProduct::input_grad, hidden, 2 * inner);
        add(ExpertProduct::weight_grad, hidden, 2 * inner);
        add(ExpertProduct::weight_grad, inner, hidden);
        over_least = std::max(over_least, layer.executed / layer.least);
        over_needed = std::max(over_needed, layer.executed / layer.needed);
      }
    }
    std::printf("T = %lld: a product at most %.3f, a layer %.3f of the least, %.3f of what was asked for\n",
                static_cast<long long>(tokens), single, over_least, over_needed);
    CHECK(single <= 1.15 && over_least <= bound.over_least && over_needed <= bound.over_needed,
          "tiles compute too much at T = %lld", static_cast<long long>(tokens));
  }
  return finish();
}
