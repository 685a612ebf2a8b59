// Bugs that are planted in compiled products, in what the host hands them or in their PTX: each must be noticed, in
// some order, and without it all must be right. What is planted is taken out again before the next.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "product_case.h"
#include "runtime.h"

namespace ptx::planting {

// Called when the product's kernel is about to run; true: it is planted.
using Plant = std::function<bool(const runtime::Started&)>;

struct Bug {
  std::string name;
  std::function<std::string()> run;  // the product: what is wrong with it
  Plant plant;
};

// ---- in the program: `kept` remembers what was there

inline std::vector<std::pair<Instruction*, Instruction>> kept;

inline Instruction& change(Instruction& in) {
  kept.emplace_back(&in, in);
  return in;
}

// The instructions that begin so, of those that the last right run came to.
inline std::vector<Instruction*> executed(Kernel& kernel, const std::string& prefix) {
  std::vector<Instruction*> found;
  for (Instruction& in : kernel.code) {
    if (in.text.starts_with(prefix) && in.runs > 0) found.push_back(&in);
  }
  return found;
}

inline Plant without(const std::string& prefix, bool all) {
  return [=](const runtime::Started& started) {
    const auto found = executed(started.kernel, prefix);
    for (size_t i = 0; i < found.size(); ++i) {
      if (all || i + 1 == found.size()) leave_out(change(*found[i]));
    }
    return !found.empty();
  };
}

// What a constant or a register holds in operand `i` of these instructions is one more, or `by`.
inline Plant shifted(const std::string& prefix, size_t operand, int64_t by,
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

// ---- in what the host hands over: tensor maps are parameters, the groups' tables lie in the workspace

inline Plant in_maps(const std::function<void(TensorMap&)>& spoil) {
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
inline Plant in_tables(const std::function<bool(uint64_t&, const Handed&)>& spoil) {
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

// Prints what became of each; returns how many were missed.
int missed_of(const std::vector<Bug>& bugs);

}  // namespace ptx::planting
