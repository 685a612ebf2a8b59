// What the machine under torch is told: UMMRM_PTX=arch=90,order=late,seed=3,sms=4 when it is loaded. Tests choose it
// before Python starts; the product reads no environment.
#include <dlfcn.h>

#include <cstdlib>
#include <sstream>
#include <string>

#include "memory.h"
#include "runtime.h"

namespace {

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
      } else {
        throw ptx::Error("UMMRM_PTX knows arch, sms, seed and order, got '" + part + "'");
      }
    }
    using BlockOf = bool(uint64_t, uint64_t*, uint64_t*);
    auto* block_of = reinterpret_cast<BlockOf*>(dlsym(RTLD_DEFAULT, "ummrm_block_of"));
    if (block_of == nullptr) throw ptx::Error("device_allocator.so must be in LD_PRELOAD, or no tensor is known");
    ptx::ask_for_memory(block_of);
  }
} at_load;

}  // namespace
