// Bugs planted in Hopper's compiled products (planting.h).
//
//   ptx_run_planted [TILE]
#include <algorithm>
#include <cstdlib>
#include <map>

#include "planting.h"

using namespace ptx;
using namespace ptx::planting;

namespace {

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

struct Row {
  const char* name;
  Product product;
  Plant plant;
};

const std::vector<Row>& rows() {
  static const std::vector<Row> all = {
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

}  // namespace

int main(int count, char** arguments) {
  const int tile = count > 1 ? std::atoi(arguments[1]) : 1;
  runtime::device = {0, 9, 0, 2};
  options.most_instructions = 30000000;
  std::vector<Bug> bugs;
  for (const Row& row : rows()) {
    const auto run = [&row, tile] { return fault_of(90, tile, row.product, smallest(ummrm::DType::bf16)); };
    bugs.push_back({row.name, run, row.plant});
  }
  return missed_of(bugs) != 0;
}
