// PTX text cut into words, numbers and punctuation (PTX ISA 4.1 to 4.5).
#pragma once

#include <string_view>
#include <vector>

namespace ptx {

struct Token {
  enum class Kind : unsigned char { word, number, text, sign, end } kind;
  std::string_view text;
  int line;
};

// Words hold the dots and double colons of opcodes; the last token is `end`.
std::vector<Token> scan(std::string_view text);

}  // namespace ptx
