// Is the machine a test? One synchronising instruction of a compiled product is left out at a time, and the product run
// in several orders: wrong numbers, or what the machine says, are noticed. At least three in four of all that are
// executed have to be; the rest is what mutations.txt allows, with the reason why leaving it out does no harm.
//
//   ptx_run_mutations MUTATIONS.TXT ARCH TILE [PRODUCT]...
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

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

struct Way {
  size_t of_case;
  Order order;
  unsigned seed;  // 0: in order
  int multiprocessors;
};
// The first ones notice most; the later ones are for what they let pass.
// The seed says who is slow (scheduler.cpp): here each group of warps, each block of a cluster, and each warp that
// copies.
constexpr Way kWays[] = {{2, Order::late, 0, 2},    {2, Order::late, 3, 2},   {2, Order::late, 7, 2},
                         {2, Order::late, 1, 2},    {2, Order::late, 5, 2},   {2, Order::late, 2, 2},
                         {2, Order::late, 6, 2},    {2, Order::late, 10, 2},  {2, Order::late, 14, 2},
                         {5, Order::late, 11, 2},   {5, Order::random, 3, 2}, {5, Order::random, 1, 2},
                         {2, Order::at_once, 7, 2}, {1, Order::late, 3, 4}};

// What is wrong with the product; "hang" for a loop without an end or a deadlock.
std::string verdict(int arch, int tile, Product product, const Way& way) {
  static const std::vector<Case> all = cases(ummrm::DType::bf16);
  options.order = way.order, options.shuffle = way.seed != 0, options.seed = way.seed;
  runtime::device.number = way.multiprocessors;
  runtime::device.multiprocessors = way.multiprocessors;
  try {
    return fault_of(arch, tile, product, all[way.of_case]).empty() ? "" : "wrong numbers";
  } catch (const Error& error) {
    const std::string text = error.what();
    return text.substr(0, text.find_first_of("\n:")).substr(0, 60);
  }
}

struct Tally {
  int sites = 0, unnoticed = 0;
};

struct Allowed {
  int most;
  std::string reason;
};

// Lines of `product opcode most reason`; # begins a comment.
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
  options.most_instructions = 30000000;  // thirty times what a run takes
  int sites = 0, noticed = 0, faults = 0;
  for (const Product product : kProducts) {
    bool wanted = count == 4;
    for (int i = 4; i < count; ++i) wanted |= std::string(arguments[i]) == name_of(product);
    if (!wanted) continue;
    const auto start = std::chrono::steady_clock::now();
    Kernel* kernel = nullptr;
    runtime::on_launch = [&](const runtime::Started& started) {
      if (started.kernel.name.find("cutlass") != std::string::npos) kernel = &started.kernel;
    };
    for (const Way& way : kWays) {
      const std::string fault = verdict(arch, tile, product, way);
      if (!fault.empty()) return std::printf("%s is wrong as it is: %s\n", name_of(product), fault.c_str()), 1;
    }
    runtime::on_launch = nullptr;
    std::map<std::string, Tally> tallies;
    for (Instruction& instruction : kernel->code) {
      const auto is = [&](const char* prefix) { return instruction.text.starts_with(prefix); };
      if (instruction.runs == 0 || std::none_of(std::begin(kSynchronising), std::end(kSynchronising), is)) continue;
      const Instruction kept = instruction;
      leave_out(instruction);
      std::string found;
      for (const Way& way : kWays) {
        if (found.empty()) found = verdict(arch, tile, product, way);
      }
      instruction = kept;
      Tally& tally = tallies[kept.text];
      ++tally.sites, ++sites;
      noticed += !found.empty();
      tally.unnoticed += found.empty();
      std::printf("sm_%d tile %d %s line %d %s: %s\n", arch, tile, name_of(product), kept.line, kept.text.c_str(),
                  found.empty() ? "not noticed" : found.c_str());
      std::fflush(stdout);
    }
    for (const auto& [opcode, tally] : tallies) {
      const auto row = allowed.find(opcode);
      const int most = row == allowed.end() ? 0 : row->second.most;
      if (tally.unnoticed <= most) continue;
      ++faults;
      std::printf("%s: %d of %d %s were not noticed, %d have a reason in %s\n", name_of(product), tally.unnoticed,
                  tally.sites, opcode.c_str(), most, arguments[1]);
    }
    std::printf("%s: %.0f s\n", name_of(product),
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::printf("%d of %d noticed, %.0f%%\n", noticed, sites, 100. * noticed / std::max(sites, 1));
  return faults != 0 || sites == 0 || 4 * noticed < 3 * sites;
}
