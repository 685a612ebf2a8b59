// Every tensor-core product of an architecture, compiled, run on the machine to the right numbers: with asynchronous
// work as late as the program allows and warps, clusters and lanes shuffled; with `all` also in order, at once, and at
// random.
//
//   ptx_run_products ARCH [TILE [all [SEED]]]     80 or 90; all tiles; seed 3
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "expert_tiles.h"
#include "product_case.h"
#include "runtime.h"

using namespace ptx;
using ummrm::DType;

namespace {

struct Way {
  Order order;
  bool shuffle;
  const char* name;
};
constexpr Way kWays[] = {{Order::late, true, "late, shuffled"},
                         {Order::at_once, false, "at once, in order"},
                         {Order::late, false, "late, in order"},
                         {Order::random, true, "at random, shuffled"}};

int runs = 0, wrong = 0;

void run(int arch, int tile, Product product, const Case& which, const Way& way, unsigned seed) {
  options.order = way.order, options.shuffle = way.shuffle, options.seed = seed + static_cast<unsigned>(runs);
  // Devices of another number, since host code remembers what it asked one.
  runtime::device.number = runs % 3;
  runtime::device.multiprocessors = 2 + runs % 3 * 2;
  ++runs;
  std::string fault;
  try {
    fault = fault_of(arch, tile, product, which);
  } catch (const Error& error) {
    fault = error.what();
  }
  if (fault.empty()) return;
  ++wrong;
  std::printf("sm_%d tile %d %s, %d tokens, %s, seed %u: %s\n", arch, tile, name_of(product), which.tokens, way.name,
              options.seed, fault.substr(0, 2000).c_str());
}

// Of a product that a device has run before, the host asks nothing again: its calls are its launches, and which device
// it is.
void check_calls(int arch, int tile, Product product, DType dtype) {
  constexpr const char* kOnce[] = {"cuTensorMapEncodeTiled",
                                   "cudaFuncSetAttribute",
                                   "cudaFuncGetAttributes",
                                   "cudaDeviceGetAttribute",
                                   "cudaGetDriverEntryPointByVersion",
                                   "cudaOccupancyMaxActiveBlocksPerMultiprocessor"};
  const Case which = smallest(dtype);
  run(arch, tile, product, which, kWays[0], 3);
  --runs;  // so that the next one is on the same device
  runtime::calls().clear();
  run(arch, tile, product, which, kWays[0], 3);
  uint64_t launches = 0;
  for (const auto& [name, times] : runtime::calls()) {
    if (name.find("LaunchKernel") != std::string::npos) launches += times;
    for (const char* once : kOnce) {
      if (name != once) continue;
      ++wrong;
      std::printf("sm_%d tile %d %s: %s was called again\n", arch, tile, name_of(product), once);
    }
  }
  if (launches != 2) {  // the groups' tables, and the product
    ++wrong;
    std::printf("sm_%d tile %d %s: %llu launches\n", arch, tile, name_of(product),
                static_cast<unsigned long long>(launches));
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int arch = count > 1 ? std::atoi(arguments[1]) : 80, only = count > 2 ? std::atoi(arguments[2]) : -1;
  const bool all = count > 3 && std::strcmp(arguments[3], "all") == 0;
  const unsigned seed = count > 4 ? static_cast<unsigned>(std::atoi(arguments[4])) : 3;
  const int tiles = arch == 90 ? ummrm::cuda::kSm90TileCount : ummrm::cuda::kSm80TileCount;
  runtime::device = {0, arch / 10, arch % 10, 4};
  for (int tile = 0; tile < tiles; ++tile) {
    if (only >= 0 && tile != only) continue;
    for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
      if (dtype == DType::f32 && (arch != 80 || tile != 0)) continue;  // TF32, of one tile
      for (const Product product : kProducts) {
        if (dtype == DType::f32 && product == Product::weight_grad_f32) continue;
        counts = {};
        const auto start = std::chrono::steady_clock::now();
        for (const Case& which : cases(dtype)) {
          for (const Way& way : kWays) {
            run(arch, tile, product, which, way, seed);
            if (!all) break;
          }
        }
        check_calls(arch, tile, product, dtype);
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        std::printf(
            "sm_%d tile %d %s %s: %.1f s, %.1f million instructions of warps, %llu wgmma, %llu mma, %llu loads, %llu "
            "stores\n",
            arch, tile, name_of(product),
            dtype == DType::bf16  ? "bf16"
            : dtype == DType::f16 ? "f16"
                                  : "tf32",
            seconds, static_cast<double>(counts.instructions) / 1e6, static_cast<unsigned long long>(counts.products),
            static_cast<unsigned long long>(counts.mma), static_cast<unsigned long long>(counts.tensor_loads),
            static_cast<unsigned long long>(counts.tensor_stores));
        std::fflush(stdout);
      }
    }
  }
  std::printf("%d of %d wrong\n", wrong, runs);
  return wrong != 0 || runs == 0;
}
