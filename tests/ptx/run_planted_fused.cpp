// Bugs planted in the products that end in registers, Ampere's and Hopper's, as compiled (planting.h).
//
//   ptx_run_planted_fused ARCH [TILE]     80 or 90; the first tile
#include <cstdlib>

#include "fused_case.h"
#include "planting.h"

using namespace ptx;
using namespace ptx::planting;

namespace {

// A word of 4 or 8 bytes among the parameters that holds this, the first or the last one, is changed by so much.
template <class Word>
Plant in_parameters(const std::function<Word()>& holds, int64_t by, bool last = false) {
  return [=](const runtime::Started& started) {
    char* found = nullptr;
    for (size_t at = 0; at + sizeof(Word) <= started.parameters.size(); at += sizeof(Word)) {
      Word word;
      std::memcpy(&word, started.parameters.data() + at, sizeof word);
      if (word == holds() && (last || found == nullptr)) found = started.parameters.data() + at;
    }
    if (found == nullptr) return false;
    const auto word = static_cast<Word>(holds() + static_cast<Word>(by));
    std::memcpy(found, &word, sizeof word);
    return true;
  };
}

uint64_t address_of(const void* at) { return reinterpret_cast<uint64_t>(at); }

// What is in the buffer of the sum is read as zeros.
Plant zeros_read() {
  return [=](const runtime::Started& started) {
    auto found = executed(started.kernel, "ld.v4");                                // Hopper's
    if (found.empty()) found = executed(started.kernel, "ld.global.L2::128B.v4");  // Ampere's, by CUTLASS
    for (Instruction* in : found) {
      change(*in).execute = [](const Step& step) {
        for (const Operand& item : step.operand(0).items) {
          uint64_t* out = result(step, item);
          for_lanes(step.lanes, [&](int lane) { out[lane] = 0; });
        }
        return Outcome::done;
      };
    }
    return !found.empty();
  };
}

struct Row {
  const char* name;
  Fused product;
  Plant plant;
};

const std::vector<Row>& rows() {
  // The tables of the groups have how many rows each has, as 4 bytes of 8.
  const auto rows_of_a_group = [](int by) {
    return in_tables([by](uint64_t& word, const Handed&) {
      const auto low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 32);
      const auto rows = static_cast<uint32_t>(smallest_fused().counts.back());
      if (low != rows && high != rows) return false;
      word += low == rows ? static_cast<uint64_t>(by) : static_cast<uint64_t>(by) << 32;
      return true;
    });
  };
  static const std::vector<Row> all = {
      {"gate's columns are paired with up's 8 before", Fused::glu,
       in_parameters<uint32_t>([] { return static_cast<uint32_t>(fused_handed.width); }, -8)},
      {"a row is 8 gate and 8 up columns shorter", Fused::glu,
       in_parameters<uint64_t>([] { return static_cast<uint64_t>(fused_handed.width); }, -8, true)},
      {"a bias row is that of the expert before", Fused::glu, in_tables([](uint64_t& word, const Handed& to) {
         const auto second = address_of(to.bias) + 2 * static_cast<uint64_t>(to.out);
         if (word < second || word >= second + 4 * static_cast<uint64_t>(to.out)) return false;
         word -= 2 * static_cast<uint64_t>(to.out);
         return true;
       })},
      {"the activation goes to the row below", Fused::glu,
       in_parameters<uint64_t>([] { return address_of(fused_handed.activation); }, 16)},
      {"the last row of a group is left out", Fused::glu, rows_of_a_group(-1)},
      {"a sum of the main loop is left out", Fused::glu,
       [](const runtime::Started& started) {
         return without("wgmma.mma_async", false)(started) || without("mma.sync", false)(started);
       }},
      {"a row is weighted by the weight of the next", Fused::glu_backward,
       in_parameters<uint64_t>([] { return address_of(fused_handed.row_weights); }, 4)},
      {"a part of a gate's dot is dropped", Fused::glu_backward, without("st.global.f32", false)},
      {"lanes are left out of a gate's dot", Fused::glu_backward,
       [](const runtime::Started& started) {
         const auto found = executed(started.kernel, "shfl.sync.bfly");
         if (found.empty()) return false;
         change(*found.back()).execute = [](const Step& step) {
           uint64_t* out = result(step, 0);
           for_lanes(step.lanes, [&](int lane) { out[lane] = 0; });
           return Outcome::done;
         };
         return true;
       }},
      {"the weighted activation goes to the row below", Fused::glu_backward,
       in_parameters<uint64_t>([] { return address_of(fused_handed.activation); }, 16)},
      {"the last row of a group is left out", Fused::glu_backward, rows_of_a_group(-1)},
      {"the pre-activation of another column is read", Fused::glu_backward,
       in_parameters<uint64_t>([] { return static_cast<uint64_t>(fused_handed.width); }, -8, true)},
      {"the sum leaves out what was there", Fused::sum, zeros_read()},
      {"the sum leaves out what was there, fp32", Fused::sum_f32, zeros_read()},
      {"the last row of a group is left out", Fused::sum, rows_of_a_group(-1)},
      {"the last row of a group is left out, fp32", Fused::sum_f32, rows_of_a_group(-1)},
  };
  return all;
}

}  // namespace

int main(int count, char** arguments) {
  const int arch = count > 1 ? std::atoi(arguments[1]) : 80, tile = count > 2 ? std::atoi(arguments[2]) : 0;
  runtime::device = {0, arch / 10, arch % 10, 2};
  options.most_instructions = 30000000;
  std::vector<Bug> bugs;
  for (const Row& row : rows()) {
    const auto run = [&row, arch, tile] { return fault_of(arch, tile, row.product, smallest_fused(), 3); };
    bugs.push_back({row.name, run, row.plant});
  }
  return missed_of(bugs) != 0;
}
