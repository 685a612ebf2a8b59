// How the decoder reads an opcode: its modifiers are taken one by one by whoever knows them, and what nobody took is an
// error. So no modifier that changes a meaning is passed over.
#pragma once

#include <algorithm>

#include "machine.h"

namespace ptx {

class Form {
 public:
  explicit Form(const Instruction& instruction) {
    const std::string& text = instruction.text;
    for (size_t at = 0; at <= text.size();) {
      const size_t end = std::min(text.find('.', at), text.size());
      left_.push_back(std::string_view(text).substr(at, end - at));
      at = end + 1;
    }
    opcode_ = left_[0];
    left_.erase(left_.begin());
  }
  std::string_view opcode() const { return opcode_; }
  const std::vector<std::string_view>& left() const { return left_; }

  bool take(std::string_view modifier) {
    const auto found = std::find(left_.begin(), left_.end(), modifier);
    if (found == left_.end()) return false;
    left_.erase(found);
    return true;
  }
  // The first of these that is there, as an index; else `otherwise`.
  int take_one(std::initializer_list<std::string_view> modifiers, int otherwise = -1) {
    int index = 0;
    for (const std::string_view modifier : modifiers) {
      if (take(modifier)) return index;
      ++index;
    }
    return otherwise;
  }
  Type take_type() {
    for (size_t i = 0; i < left_.size(); ++i) {
      const Type type = type_named(left_[i]);
      if (type == Type::none) continue;
      left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(i));
      return type;
    }
    return Type::none;
  }
  // A modifier of a letter and a number, as .x4 or .m64n128k16: the number behind the prefix.
  int take_number(std::string_view prefix) {
    for (size_t i = 0; i < left_.size(); ++i) {
      const std::string_view word = left_[i];
      if (word.substr(0, prefix.size()) != prefix || word.size() == prefix.size()) continue;
      int number = 0;
      for (const char c : word.substr(prefix.size())) {
        if (c < '0' || c > '9') break;
        number = 10 * number + c - '0';
      }
      if (number == 0) continue;
      left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(i));
      return number;
    }
    return 0;
  }
  Space take_space() {
    if (take("global") || take("const")) return Space::global;
    if (take("shared::cluster")) return Space::cluster;
    if (take("shared") || take("shared::cta")) return Space::shared;
    if (take("param")) return Space::parameter;
    return Space::generic;
  }

 private:
  std::string_view opcode_;
  std::vector<std::string_view> left_;
};

// A family of instructions: sets `execute` and what else it keeps, or leaves it null for a form that it does not have.
using Family = void (*)(Form& form, Instruction& in);

void arithmetic(Form& form, Instruction& in);   // arithmetic.cpp: + - * / and the functions of a float
void bit_logic(Form& form, Instruction& in);    // bits.cpp
void moves(Form& form, Instruction& in);        // moves.cpp: mov, selp, setp, cvta, mapa, and what does nothing here
void conversion(Form& form, Instruction& in);   // conversion.cpp: cvt
void memory(Form& form, Instruction& in);       // loads_stores.cpp: ld, st, atom, red, fences
void collectives(Form& form, Instruction& in);  // collectives.cpp: what lanes of a warp do together
void barriers(Form& form, Instruction& in);     // barriers.cpp: bar, barrier, mbarrier
void matrices(Form& form, Instruction& in);     // matrices.cpp: ldmatrix, stmatrix, mma
void copies(Form& form, Instruction& in);       // copies.cpp and tensors.cpp: cp
void tensors(Form& form, Instruction& in);      // tensors.cpp: cp.async.bulk, tensormap
void products(Form& form, Instruction& in);     // wgmma.cpp: wgmma, setmaxnreg

}  // namespace ptx
