// Bugs planted in Hopper's compiled products, in what the host hands them or in their PTX: each must be noticed, in
// some order, and without it all must be right. What is planted is taken out again before the next.
//
//   ptx_run_planted [TILE]
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>

#include "product_case.h"
#include "runtime.h"

using namespace ptx;

namespace {

struct Bug {
  const char* name;
  Product product;
  // Called when the product's kernel is about to run; true: it is planted.
  std::function<bool(const runtime::Started&)> plant;
};

// ---- in the program: `kept` remembers what was there

std::vector<std::pair<Instruction*, Instruction>> kept;

Instruction& change(Instruction& in) {
  kept.emplace_back(&in, in);
  return in;
}

// The instructions that begin so, of those that the last right run came to.
std::vector<Instruction*> executed(Kernel& kernel, const std::string& prefix) {
  std::vector<Instruction*> found;
  for (Instruction& in : kernel.code) {
    if (in.text.starts_with(prefix) && in.runs > 0) found.push_back(&in);
  }
  return found;
}

std::function<bool(const runtime::Started&)> without(const std::string& prefix, bool all) {
  return [=](const runtime::Started& started) {
    const auto found = executed(started.kernel, prefix);
    for (size_t i = 0; i < found.size(); ++i) {
      if (all || i + 1 == found.size()) leave_out(change(*found[i]));
    }
    return !found.empty();
  };
}

// What a constant or a register holds in operand `i` of these instructions is one more, or `by`.
std::function<bool(const runtime::Started&)> shifted(const std::string& prefix, size_t operand, int64_t by,
                                                     const std::function<bool(const Instruction&)>& which = nullptr) {
  return [=](const runtime::Started& started) {
    bool planted = false;
    for (Instruction* in : executed(started.kernel, prefix)) {
      if (which != nullptr && !which(*in)) continue;
      Operand& changed = change(*in).operands[operand];
      if (changed.kind == Operand::Kind::constant) {
        changed.value += static_cast<uint64_t>(by);
      } else {
        changed.offset += by;
      }
      planted = true;
    }
    return planted;
  };
}

// A ring of stages begins again where its index equals a constant; the commonest such constant is the main loop's.
bool one_stage_more(const runtime::Started& started) {
  std::map<uint64_t, std::vector<Instruction*>> compared;
  for (const char* comparison : {"setp.eq.s32", "setp.ne.s32", "setp.eq.b32", "setp.ne.b32"}) {
    for (Instruction* in : executed(started.kernel, comparison)) {
      const Operand& last = in->operands[2];
      if (last.kind == Operand::Kind::constant && last.value >= 3 && last.value <= 12)
        compared[last.value].push_back(in);
    }
  }
  const auto commonest = std::max_element(
      compared.begin(), compared.end(), [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
  if (commonest == compared.end()) return false;
  for (Instruction* in : commonest->second) ++change(*in).operands[2].value;
  return true;
}

// ---- in what the host hands over: tensor maps are parameters, the groups' tables lie in the workspace

std::function<bool(const runtime::Started&)> in_maps(const std::function<void(TensorMap&)>& spoil) {
  return [=](const runtime::Started& started) {
    bool planted = false;
    for (size_t at = 0; at + 128 <= started.parameters.size(); at += 64) {
      TensorMap map;
      std::memcpy(&map, started.parameters.data() + at, sizeof map);
      if (map.mark != TensorMap::kMark) continue;
      spoil(map);
      std::memcpy(started.parameters.data() + at, &map, sizeof map);
      planted = true;
    }
    return planted;
  };
}

// The tables of the groups hold addresses and strides of 8 bytes; `spoil` gets each word and says whether it changed
// it.
std::function<bool(const runtime::Started&)> in_tables(const std::function<bool(uint64_t&, const Handed&)>& spoil) {
  return [=](const runtime::Started&) {
    bool planted = false;
    for (size_t at = 0; at + 8 <= handed.workspace_bytes; at += 8) {
      uint64_t word;
      std::memcpy(&word, handed.workspace + at, 8);
      if (!spoil(word, handed)) continue;
      std::memcpy(handed.workspace + at, &word, 8);
      planted = true;
    }
    return planted;
  };
}

const std::vector<Bug>& bugs() {
  static const std::vector<Bug> all = {
      {"a row stride of the operand is 8 too long", Product::forward, in_tables([](uint64_t& word, const Handed& to) {
         if (word != static_cast<uint64_t>(to.in)) return false;
         word += 8;
         return true;
       })},
      {"a bias row is that of the expert before", Product::forward, in_tables([](uint64_t& word, const Handed& to) {
         const auto second = reinterpret_cast<uint64_t>(to.bias) + 2 * static_cast<uint64_t>(to.out);
         if (word < second || word >= second + 4 * static_cast<uint64_t>(to.out)) return false;
         word -= 2 * static_cast<uint64_t>(to.out);
         return true;
       })},
      {"a band of columns begins 8 columns late", Product::forward, in_tables([](uint64_t& word, const Handed& to) {
         const auto first = reinterpret_cast<uint64_t>(to.result);
         const uint64_t row = 2 * static_cast<uint64_t>(to.out), band = 2 * static_cast<uint64_t>(to.band);
         if (word < first || word >= first + row * static_cast<uint64_t>(to.rows)) return false;
         if ((word - first) % row != band) return false;
         word += 16;
         return true;
       })},
      {"a box is half as wide", Product::forward, in_maps([](TensorMap& map) { map.box[0] /= 2; })},
      {"a box is half as high", Product::input_grad, in_maps([](TensorMap& map) { map.box[1] /= 2; })},
      {"a tile is swizzled otherwise", Product::weight_grad,
       in_maps([](TensorMap& map) { map.swizzle = Swizzle::of_64; })},
      {"a tensor map is used without its fence", Product::forward, without("fence.proxy.tensormap", true)},
      {"a tensor map keeps the last group's address", Product::forward,
       without("tensormap.replace.tile.global_address", true)},
      {"a group has one row more (its map)", Product::forward,
       shifted("tensormap.replace.tile.global_dim", 2, 1,
               [](const Instruction& in) { return in.operands[1].value == 1; })},
      {"a ring has a stage more than its memory", Product::forward, one_stage_more},
      {"one product of the main loop is left out", Product::forward, without("wgmma.mma_async", false)},
      {"accumulators are read before the products are done", Product::forward, without("wgmma.wait_group", true)},
      {"products begin without wgmma.fence", Product::weight_grad, without("wgmma.fence", true)},
      {"a result is stored without fence.proxy.async", Product::forward, without("fence.proxy.async", true)},
      {"a stage expects 128 bytes too many", Product::input_grad, shifted("mbarrier.arrive.expect_tx", 2, 128)},
      {"a stage is given back by none of its readers", Product::forward,
       without("mbarrier.arrive.shared::cluster", true)},
      {"clusters are one block", Product::forward,
       [](const runtime::Started& started) {
         started.cluster = {1, 1, 1};
         return true;
       }},
      {"the blocks of a cluster stand the other way", Product::forward,
       [](const runtime::Started& started) {
         if (started.grid.x % started.cluster.y != 0 || started.grid.y % started.cluster.x != 0) {
           std::swap(started.grid.x, started.grid.y);
         }
         std::swap(started.cluster.x, started.cluster.y);
         return true;
       }},
  };
  return all;
}

std::string run(int tile, Product product, Order order, unsigned seed) {
  options.order = order, options.shuffle = seed != 0, options.seed = seed;
  try {
    return fault_of(90, tile, product, smallest(ummrm::DType::bf16));
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int tile = count > 1 ? std::atoi(arguments[1]) : 1;
  runtime::device = {0, 9, 0, 2};
  options.most_instructions = 30000000;
  int missed = 0;
  for (const Bug& bug : bugs()) {
    const auto is_product = [](const runtime::Started& started) {
      return started.kernel.name.find("cutlass") != std::string::npos;
    };
    runtime::on_launch = nullptr;
    std::string right = run(tile, bug.product, Order::late, 3);
    bool planted = false;
    std::string found;
    runtime::on_launch = [&](const runtime::Started& started) {
      if (is_product(started)) planted |= bug.plant(started);
    };
    for (const auto& [order, seed] : {std::pair{Order::late, 0u}, {Order::late, 3u}, {Order::random, 4u}}) {
      if (found.empty()) found = run(tile, bug.product, order, seed);
      for (auto change = kept.rbegin(); change != kept.rend(); ++change) *change->first = change->second;
      kept.clear();
    }
    const bool caught = right.empty() && planted && !found.empty();
    missed += !caught;
    std::printf("%s: %s%s\n", bug.name,
                caught    ? "caught, "
                : planted ? "NOT CAUGHT "
                          : "NOT PLANTED ",
                (right.empty() ? found : "wrong without it: " + right).substr(0, 160).c_str());
    std::fflush(stdout);
  }
  std::printf("%zu of %zu caught\n", bugs().size() - static_cast<size_t>(missed), bugs().size());
  return missed != 0;
}
