// Is the machine a test? One synchronising instruction of a compiled product is left out at a time, and the product run
// in several orders: wrong numbers, or what the machine says, are noticed. Some do nothing in any of these runs, which
// the machine counts (races.h: a wait for nothing, say). Of the others at least three in four have to be noticed; the
// rest is what mutations.txt allows, with the reason why leaving it out does no harm.
//
//   ptx_run_mutations MUTATIONS.TXT ARCH TILE [PRODUCT]...
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>

#include "fused_case.h"
#include "product_case.h"
#include "runtime.h"

using namespace ptx;

namespace {

constexpr const char* kSynchronising[] = {"bar.sync",
                                          "barrier.cluster.",
                                          "cp.async.bulk.commit_group",
                                          "cp.async.bulk.wait_group",
                                          "cp.async.commit_group",
                                          "cp.async.wait_",
                                          "fence.mbarrier_init",
                                          "fence.proxy.",
                                          "mbarrier.arrive",
                                          "mbarrier.try_wait",
                                          "tensormap.cp_fenceproxy",
                                          "wgmma.commit_group",
                                          "wgmma.fence",
                                          "wgmma.wait_group"};

bool synchronises(const Instruction& in) {
  return in.runs != 0 && std::any_of(std::begin(kSynchronising), std::end(kSynchronising),
                                     [&](const char* prefix) { return in.text.starts_with(prefix); });
}

struct Way {
  size_t of_case;
  Order order;
  unsigned seed;  // 0: in order
  int multiprocessors;
};
// The first ones notice most; the later ones are for what they let pass. The seed says who is slow (scheduler.cpp).
constexpr size_t kWide = 100, kMany = 101;  // widest, of_many
constexpr Way kWays[] = {{1, Order::late, 0, 2},
                         {2, Order::late, 3, 2},
                         {kWide, Order::late, 0, 2},
                         {kMany, Order::at_once, 0, 2},
                         {5, Order::random, 1, 2}};
// And for waits: which stage of a ring is the last one hangs on how many steps there were.
constexpr size_t kOfDepth = 200;  // and so many steps
constexpr Way kWaysOfWaits[] = {{kOfDepth + 1, Order::at_once, 0, 2}, {kOfDepth + 2, Order::at_once, 0, 2},
                                {kOfDepth + 3, Order::late, 0, 2},    {kOfDepth + 4, Order::late, 0, 2},
                                {kOfDepth + 5, Order::late, 0, 2},    {kOfDepth + 6, Order::late, 0, 2},
                                {kOfDepth + 7, Order::late, 0, 2}};
constexpr size_t kWaysOfIdle = 1;  // for what does nothing

struct Product16 {  // a product and its twin in f16, if it has one
  const char* name;
  std::function<std::string(ummrm::DType, size_t of_case)> fault;
  bool twin;
};

int depth_of(size_t of_case) { return static_cast<int>(of_case - kOfDepth); }

std::vector<Product16> products(int arch, int tile) {
  std::vector<Product16> all;
  for (const Product product : kProducts) {
    const auto fault = [=](ummrm::DType dtype, size_t of_case) {
      if (of_case > kOfDepth) return fault_of(arch, tile, product, of_depth(product, dtype, depth_of(of_case)));
      if (of_case == kMany) return fault_of(arch, tile, product, of_many(dtype));
      return fault_of(arch, tile, product, of_case == kWide ? widest(dtype) : cases(dtype)[of_case]);
    };
    all.push_back({name_of(product), fault, true});
  }
  for (const Fused product : kFused) {
    if (tile > 1) break;
    const auto fault = [=](ummrm::DType, size_t of_case) {
      if (of_case > kOfDepth) return fault_of(arch, tile, product, of_depth(product, depth_of(of_case)), 3);
      if (of_case == kMany) return fault_of(arch, tile, product, of_many(), 3);
      return fault_of(arch, tile, product, fused_cases()[of_case % fused_cases().size()], 3);
    };
    all.push_back({name_of(product), fault, false});
  }
  return all;
}

// What is wrong with the product.
std::string verdict(const Product16& product, const Way& way, ummrm::DType dtype = ummrm::DType::bf16) {
  options.order = way.order, options.shuffle = way.seed != 0, options.seed = way.seed;
  runtime::device.number = way.multiprocessors;
  runtime::device.multiprocessors = way.multiprocessors;
  try {
    return product.fault(dtype, way.of_case).empty() ? "" : "wrong numbers";
  } catch (const Error& error) {
    const std::string text = error.what();
    return text.substr(0, text.find_first_of("\n")).substr(0, 200);
  }
}

// The kernel of the product that was run in a way, and what it took.
Kernel* kernel_of(const Product16& product, const Way& way, ummrm::DType dtype, uint64_t& instructions) {
  Kernel* kernel = nullptr;
  runtime::on_launch = [&](const runtime::Started& started) {  // what it is held to comes after it
    if (kernel == nullptr && started.kernel.name.find("cutlass") != std::string::npos) kernel = &started.kernel;
  };
  counts = {};
  const std::string fault = verdict(product, way, dtype);
  runtime::on_launch = nullptr;
  instructions = std::max(instructions, counts.instructions);
  if (!fault.empty()) {
    std::printf("%s is wrong as it is: %s\n", product.name, fault.c_str());
    std::exit(1);
  }
  return kernel;
}

struct Tally {
  int sites = 0, idle = 0, unnoticed = 0;  // idle ones that were not noticed are not among the latter
};

struct Allowed {
  int most;
  std::string reason;
};

// Lines of `opcode most reason`; # begins a comment.
std::map<std::string, Allowed> read(const char* path) {
  std::ifstream file(path);
  if (!file) {
    std::printf("cannot read %s\n", path);
    std::exit(2);
  }
  std::map<std::string, Allowed> allowed;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    std::string opcode, reason;
    int most = 0;
    words >> opcode >> most;
    std::getline(words >> std::ws, reason);
    allowed[opcode] = {most, reason};
  }
  return allowed;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return std::printf("usage: %s MUTATIONS.TXT ARCH TILE [PRODUCT]...\n", arguments[0]), 2;
  const auto allowed = read(arguments[1]);
  const int arch = std::atoi(arguments[2]), tile = std::atoi(arguments[3]);
  runtime::device = {0, arch / 10, arch % 10, 2};
  int sites = 0, noticed = 0, idle = 0, faults = 0, twins = 0;
  for (const Product16& product : products(arch, tile)) {
    bool wanted = count == 4;
    for (int i = 4; i < count; ++i) wanted |= std::string(arguments[i]) == product.name;
    if (!wanted) continue;
    const auto start = std::chrono::steady_clock::now();
    uint64_t most = 0;
    Kernel* kernel = nullptr;
    options.most_instructions = UINT64_MAX;
    std::vector<Way> ways(std::begin(kWays), std::end(kWays));
    ways.insert(ways.end(), std::begin(kWaysOfWaits), std::end(kWaysOfWaits));
    for (const Way& way : ways) kernel = kernel_of(product, way, ummrm::DType::bf16, most);
    if (product.twin) {
      const Kernel* twin = nullptr;
      for (const Way& way : ways) twin = kernel_of(product, way, ummrm::DType::f16, most);
      const auto order = [](const Kernel& of) {
        std::string all;
        for (const Instruction& in : of.code) all += synchronises(in) ? in.text + "\n" : "";
        return all;
      };
      if (twin == kernel || order(*twin) != order(*kernel)) {
        ++faults;
        std::printf("%s in f16 has other synchronising instructions than in bf16\n", product.name);
      }
      ++twins;
    }
    options.most_instructions = 10 * most;  // for loops without an end
    std::vector<Instruction*> left_out;
    std::vector<bool> does_nothing;
    for (Instruction& in : kernel->code) {
      if (!synchronises(in)) continue;
      left_out.push_back(&in);
      does_nothing.push_back(in.may_be_idle && in.effects == 0);
    }
    std::map<std::string, Tally> tallies;
    int of_product = 0;
    for (size_t i = 0; i < left_out.size(); ++i) {
      Instruction& instruction = *left_out[i];
      const Instruction kept = instruction;
      leave_out(instruction);
      std::string found;
      const bool waits = kept.text.find("wait.parity") != std::string::npos;
      const size_t most_ways = does_nothing[i] ? kWaysOfIdle : waits ? ways.size() : std::size(kWays);
      for (size_t way = 0; way < most_ways && found.empty(); ++way) found = verdict(product, ways[way]);
      instruction = kept;
      Tally& tally = tallies[kept.text];
      ++tally.sites, ++sites;
      const bool nothing = found.empty() && does_nothing[i];
      noticed += !found.empty(), of_product += !found.empty();
      idle += nothing, tally.idle += nothing;
      tally.unnoticed += found.empty() && !nothing;
      std::printf("sm_%d tile %d %s line %d %s: %s\n", arch, tile, product.name, kept.line, kept.text.c_str(),
                  nothing         ? "does nothing"
                  : found.empty() ? "not noticed"
                                  : found.c_str());
      std::fflush(stdout);
    }
    for (const auto& [opcode, tally] : tallies) {
      const auto row = allowed.find(opcode);
      const int most_allowed = row == allowed.end() ? 0 : row->second.most;
      if (tally.unnoticed <= most_allowed) continue;
      ++faults;
      std::printf("%s: %d of %d %s were not noticed, %d have a reason in %s\n", product.name, tally.unnoticed,
                  tally.sites, opcode.c_str(), most_allowed, arguments[1]);
    }
    std::printf("%s: %d of %zu noticed, %.0f s\n", product.name, of_product, left_out.size(),
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf(
      "tile %d: of %d, %d noticed, %d do nothing, %d are allowed; %.0f%% of those that do something are noticed\n",
      tile, sites, noticed, idle, sites - noticed - idle, 100. * noticed / std::max(sites - idle, 1));
  std::printf("%d products have the same instructions in f16\n", twins);
  return faults != 0 || sites == 0 || 4 * noticed < 3 * (sites - idle);
}
