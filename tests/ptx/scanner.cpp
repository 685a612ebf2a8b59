// See scanner.h.
#include "scanner.h"

#include <cctype>
#include <string>

#include "program.h"

namespace ptx {
namespace {

bool in_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '.' || c == '%';
}

}  // namespace

std::vector<Token> scan(std::string_view text) {
  std::vector<Token> tokens;
  int line = 1;
  const auto starts = [&](size_t at, std::string_view what) { return text.substr(at, what.size()) == what; };
  for (size_t at = 0; at < text.size();) {
    const char c = text[at];
    size_t end = at + 1;
    if (c == '\n') {
      ++line;
    } else if (starts(at, "//")) {
      while (end < text.size() && text[end] != '\n') ++end;
    } else if (starts(at, "/*")) {
      end = text.find("*/", at + 2);
      if (end == text.npos) throw Error("ptx line " + std::to_string(line) + ": a comment without an end");
      for (size_t i = at; i < end; ++i) line += text[i] == '\n';
      end += 2;
    } else if (c == '"') {
      end = text.find('"', at + 1);
      if (end == text.npos) throw Error("ptx line " + std::to_string(line) + ": a string without an end");
      tokens.push_back({Token::Kind::text, text.substr(at + 1, end - at - 1), line});
      ++end;
    } else if (in_word(c)) {
      while (end < text.size() && (in_word(text[end]) || starts(end, "::"))) end += text[end] == ':' ? 2 : 1;
      const bool number = std::isdigit(static_cast<unsigned char>(c));
      tokens.push_back({number ? Token::Kind::number : Token::Kind::word, text.substr(at, end - at), line});
    } else if (!std::isspace(static_cast<unsigned char>(c))) {
      tokens.push_back({Token::Kind::sign, text.substr(at, 1), line});
    }
    at = end;
  }
  tokens.push_back({Token::Kind::end, "end of text", line});
  return tokens;
}

}  // namespace ptx
