// What the machine under torch is told: UMMRM_PTX=arch=90,order=late,seed=3,sms=4 when it is loaded; with fusions=all
// the fused products are taken, and launches=NAME makes it an error of the process if no kernel of such a name ran.
// Tests choose it before Python starts; the product reads no environment.
#include <dlfcn.h>

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

#include "memory.h"
#include "runtime.h"
#include "ummrm/expert_glu.h"

namespace {

struct Awaited {
  std::string name;
  uint64_t launches = 0;
};
std::vector<Awaited> awaited;

void check_launches() {
  int missing = 0;
  for (const Awaited& kernel : awaited) {
    std::printf("%s: %llu launches\n", kernel.name.c_str(), static_cast<unsigned long long>(kernel.launches));
    missing += kernel.launches == 0;
  }
  std::fflush(nullptr);
  if (missing != 0) _exit(1);
}

struct AtLoad {
  AtLoad() {
    const char* given = std::getenv("UMMRM_PTX");
    if (given == nullptr) return;  // built, not run
    std::istringstream parts(given);
    for (std::string part; std::getline(parts, part, ',');) {
      const size_t equals = part.find('=');
      const std::string name = part.substr(0, equals), value = equals == part.npos ? "" : part.substr(equals + 1);
      if (name == "arch") {
        ptx::runtime::device.major = std::stoi(value) / 10;
        ptx::runtime::device.minor = std::stoi(value) % 10;
      } else if (name == "sms") {
        ptx::runtime::device.multiprocessors = std::stoi(value);
      } else if (name == "seed") {
        ptx::options.shuffle = true;
        ptx::options.seed = static_cast<unsigned>(std::stoul(value));
      } else if (name == "order") {
        ptx::options.order = value == "late"     ? ptx::Order::late
                             : value == "random" ? ptx::Order::random
                                                 : ptx::Order::at_once;
      } else if (name == "fusions" && value == "all") {
        ummrm::cuda::use_fusions(ummrm::cuda::Fusions::all);
      } else if (name == "launches") {
        awaited.push_back({value});
      } else {
        throw ptx::Error("UMMRM_PTX knows arch, sms, seed, order, fusions=all and launches, got '" + part + "'");
      }
    }
    if (!awaited.empty()) {
      ptx::runtime::on_launch = [](const ptx::runtime::Started& started) {
        for (Awaited& kernel : awaited) kernel.launches += started.kernel.name.find(kernel.name) != std::string::npos;
      };
      std::atexit(&check_launches);
    }
    using BlockOf = bool(uint64_t, uint64_t*, uint64_t*);
    auto* block_of = reinterpret_cast<BlockOf*>(dlsym(RTLD_DEFAULT, "ummrm_block_of"));
    if (block_of == nullptr) throw ptx::Error("device_allocator.so must be in LD_PRELOAD, or no tensor is known");
    ptx::ask_for_memory(block_of);
  }
} at_load;

}  // namespace
