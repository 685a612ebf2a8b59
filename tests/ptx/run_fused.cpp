// The products that end in registers, compiled, run on the machine (fused_case.h). Asynchronous work is late and warps
// are shuffled, and with `all` also in order, at once and at random.
//
//   ptx_run_fused ARCH [TILE [all [SEED]]]     80 or 90; the first two tiles; seed 3
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fused_case.h"
#include "runtime.h"

using namespace ptx;

namespace {

struct Way {
  Order order;
  bool shuffle;
};
constexpr Way kWays[] = {{Order::late, true}, {Order::at_once, false}, {Order::late, false}, {Order::random, true}};

}  // namespace

int main(int count, char** arguments) {
  const int arch = count > 1 ? std::atoi(arguments[1]) : 80, only = count > 2 ? std::atoi(arguments[2]) : -1;
  const bool all = count > 3 && std::strcmp(arguments[3], "all") == 0;
  const unsigned seed = count > 4 ? static_cast<unsigned>(std::atoi(arguments[4])) : 3;
  int runs = 0, wrong = 0;
  runtime::device = {0, arch / 10, arch % 10, 4};
  for (int tile = 0; tile < 2; ++tile) {
    if (only >= 0 && tile != only) continue;
    for (const Fused product : kFused) {
      for (const FusedCase& which : fused_cases()) {
        for (const Way& way : kWays) {
          options.order = way.order, options.shuffle = way.shuffle, options.seed = seed + static_cast<unsigned>(runs);
          runtime::device.number = runs % 3;
          runtime::device.multiprocessors = 2 + runs % 3 * 2;
          ++runs;
          std::string fault;
          try {
            fault = fault_of(arch, tile, product, which, options.seed);
          } catch (const Error& error) {
            fault = error.what();
          }
          if (!fault.empty()) {
            ++wrong;
            std::printf("sm_%d tile %d %s, %d tokens, seed %u: %s\n", arch, tile, name_of(product), which.tokens,
                        options.seed, fault.substr(0, 1000).c_str());
          }
          if (!all) break;
        }
      }
    }
  }
  std::printf("%d of %d wrong\n", wrong, runs);
  return wrong != 0 || runs == 0;
}
