// Text to kernels: directives, variables, scopes, labels and statements (PTX ISA 4, 5.4 and 11). Operands are read
// here too; what an opcode means is the decoder's. A name or a directive that is not known is an error with its line.
#include <cstdlib>
#include <cstring>
#include <map>

#include "memory.h"
#include "scanner.h"

namespace ptx {
namespace {

constexpr std::pair<const char*, Special> kSpecials[] = {{"%tid.x", Special::tid_x},
                                                         {"%tid.y", Special::tid_y},
                                                         {"%tid.z", Special::tid_z},
                                                         {"%ntid.x", Special::ntid_x},
                                                         {"%ntid.y", Special::ntid_y},
                                                         {"%ntid.z", Special::ntid_z},
                                                         {"%ctaid.x", Special::ctaid_x},
                                                         {"%ctaid.y", Special::ctaid_y},
                                                         {"%ctaid.z", Special::ctaid_z},
                                                         {"%nctaid.x", Special::nctaid_x},
                                                         {"%nctaid.y", Special::nctaid_y},
                                                         {"%nctaid.z", Special::nctaid_z},
                                                         {"%laneid", Special::laneid},
                                                         {"%warpid", Special::warpid},
                                                         {"%cluster_ctarank", Special::cluster_ctarank},
                                                         {"%cluster_nctarank", Special::cluster_nctarank},
                                                         {"%cluster_ctaid.x", Special::cluster_ctaid_x},
                                                         {"%cluster_ctaid.y", Special::cluster_ctaid_y},
                                                         {"%cluster_ctaid.z", Special::cluster_ctaid_z},
                                                         {"%cluster_nctaid.x", Special::cluster_nctaid_x},
                                                         {"%cluster_nctaid.y", Special::cluster_nctaid_y},
                                                         {"%cluster_nctaid.z", Special::cluster_nctaid_z},
                                                         {"%clusterid.x", Special::clusterid_x},
                                                         {"%clusterid.y", Special::clusterid_y},
                                                         {"%clusterid.z", Special::clusterid_z},
                                                         {"%nclusterid.x", Special::nclusterid_x},
                                                         {"%nclusterid.y", Special::nclusterid_y},
                                                         {"%nclusterid.z", Special::nclusterid_z},
                                                         {"%smid", Special::smid},
                                                         {"%clock", Special::clock},
                                                         {"%clock64", Special::clock64}};

struct Symbol {
  enum class Where { shared, dynamic, global, parameter } where;
  uint64_t at;
};

class Parser {
 public:
  explicit Parser(std::string_view text) : tokens_(scan(text)) {}

  Module module() {
    while (token().kind != Token::Kind::end) {
      const Token word = next();
      const std::string_view w = word.text;
      if (w == ".version" || w == ".address_size") {
        next();
      } else if (w == ".target") {
        module_.target = next().text;
        while (take(",")) next();
      } else if (w == ".file") {
        skip_line(word.line);
      } else if (w == ".extern") {
        expect(".shared");
        variable(Where::dynamic, module_symbols_, module_shared_);
      } else if (w == ".shared") {
        variable(Where::shared, module_symbols_, module_shared_);
      } else if (w == ".global" || w == ".const") {
        variable(Where::global, module_symbols_, module_shared_);
      } else if (w == ".entry") {
        entry();
      } else if (w != ".visible" && w != ".weak" && w != ".common") {
        fail("a directive that is not known here, " + std::string(w), word.line);
      }
    }
    return std::move(module_);
  }

 private:
  using Where = Symbol::Where;
  using Symbols = std::map<std::string, Symbol, std::less<>>;
  struct Scope {
    int id;
    std::map<std::string, int, std::less<>> registers;
  };
  struct Jump {
    size_t instruction;
    std::string label;
    std::vector<int> scopes;  // where it stands, outermost first
  };

  [[noreturn]] static void fail(const std::string& what, int line) {
    throw Error("ptx line " + std::to_string(line) + ": " + what);
  }
  const Token& token(size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  Token next() {
    const Token found = token();
    if (found.kind == Token::Kind::end) fail("the text ends too soon", found.line);
    ++at_;
    return found;
  }
  bool is(std::string_view text) const { return token().text == text && token().kind != Token::Kind::text; }
  bool take(std::string_view text) { return is(text) && ++at_; }
  void expect(std::string_view text) {
    if (!take(text)) {
      fail("expected '" + std::string(text) + "', found '" + std::string(token().text) + "'", token().line);
    }
  }
  void skip_line(int line) {
    while (token().line == line && token().kind != Token::Kind::end) ++at_;
  }
  int64_t whole_number() {
    const bool negative = take("-");
    const Token found = next();
    if (found.kind != Token::Kind::number)
      fail("expected a number, found '" + std::string(found.text) + "'", found.line);
    const auto magnitude = static_cast<int64_t>(std::strtoull(std::string(found.text).c_str(), nullptr, 0));
    return negative ? -magnitude : magnitude;
  }

  // .align n, a type, a name, perhaps [n], perhaps = {...}; PTX ISA 5.4.
  void variable(Where where, Symbols& symbols, int& shared) {
    int align = 1;
    Type type = Type::none;
    std::string name;
    while (name.empty()) {
      const Token word = next();
      if (word.text == ".align") {
        align = static_cast<int>(whole_number());
      } else if (word.text[0] == '.') {
        type = type_named(word.text.substr(1));
        if (type == Type::none)
          fail("a variable's attribute that is not known here, " + std::string(word.text), word.line);
      } else {
        name = word.text;
      }
    }
    const int each = bytes_of(type);
    int64_t count = 1;
    while (take("[")) {
      count *= is("]") ? 0 : whole_number();
      expect("]");
    }
    std::vector<int64_t> values;
    if (take("=")) {
      if (take("{")) {
        while (!take("}")) {
          values.push_back(whole_number());
          take(",");
        }
      } else {
        values.push_back(whole_number());
      }
    }
    expect(";");
    align = std::max(align, each);
    if (where == Where::global) {
      auto global = std::make_unique<Global>(static_cast<size_t>(count * each), static_cast<size_t>(align));
      for (size_t i = 0; i < values.size() && i < static_cast<size_t>(count); ++i) {
        const size_t bytes = static_cast<size_t>(each);
        std::memcpy(global->data() + i * bytes, &values[i], bytes);
      }
      symbols[name] = {Where::global, reinterpret_cast<uint64_t>(global->data())};
      module_.globals.push_back(std::move(global));
    } else if (where == Where::dynamic || count == 0) {
      symbols[name] = {Where::dynamic, 0};
    } else {
      shared = (shared + align - 1) / align * align;
      symbols[name] = {Where::shared, static_cast<uint64_t>(shared)};
      shared += static_cast<int>(count) * each;
    }
  }

  void parameters() {
    while (!take(")")) {
      expect(".param");
      Parameter parameter{"", 0, 0};
      int align = 1;
      while (parameter.name.empty()) {
        const Token word = next();
        if (word.text == ".align") {
          align = static_cast<int>(whole_number());
        } else if (word.text[0] == '.') {  // .ptr and a state space say what an address points to
          if (const Type type = type_named(word.text.substr(1)); type != Type::none) parameter.bytes = bytes_of(type);
        } else {
          parameter.name = word.text;
        }
      }
      align = std::max(align, parameter.bytes);
      if (take("[")) {
        parameter.bytes *= static_cast<int>(whole_number());
        expect("]");
      }
      parameter.offset = (kernel_->parameter_bytes + align - 1) / align * align;
      kernel_->parameter_bytes = parameter.offset + parameter.bytes;
      symbols_[parameter.name] = {Where::parameter, static_cast<uint64_t>(parameter.offset)};
      kernel_->parameters.push_back(parameter);
      take(",");
    }
  }

  void entry() {
    kernel_ = &module_.kernels.emplace_back();
    kernel_->name = next().text;
    symbols_ = module_symbols_;
    scopes_.assign(1, {0, {}});
    scopes_made_ = 0;
    labels_.clear();
    jumps_.clear();
    int shared = module_shared_;
    if (take("(")) parameters();
    while (!take("{")) {  // PTX ISA 11.4: what the code was compiled for
      const Token word = next();
      if (word.text == ".maxntid") kernel_->max_threads = 1;
      while (token().kind == Token::Kind::number) {
        const int value = static_cast<int>(whole_number());
        if (word.text == ".maxntid") kernel_->max_threads *= value;
        take(",");
      }
    }
    while (!scopes_.empty()) {
      if (take("{")) {
        scopes_.push_back({++scopes_made_, {}});
      } else if (take("}")) {
        scopes_.pop_back();
      } else if (!take(";")) {
        statement(shared);
      }
    }
    kernel_->static_shared = shared;
    for (const Jump& jump : jumps_) {
      Instruction& instruction = kernel_->code[jump.instruction];
      for (auto scope = jump.scopes.rbegin(); scope != jump.scopes.rend() && instruction.target < 0; ++scope) {
        const auto label = labels_.find({*scope, jump.label});
        if (label != labels_.end()) instruction.target = label->second;
      }
      if (instruction.target < 0) fail("there is no label " + jump.label, instruction.line);
    }
    Instruction end;
    end.text = "exit";
    end.line = token().line;
    kernel_->code.push_back(end);
  }

  void statement(int& shared) {
    const int line = token().line;
    Instruction instruction;
    if (take("@")) {
      instruction.guard_negated = take("!");
      instruction.guard = reg_of(next());
    }
    const Token word = next();
    if (word.kind != Token::Kind::word) fail("unexpected '" + std::string(word.text) + "'", line);
    if (take(":")) {
      labels_[{scopes_.back().id, std::string(word.text)}] = static_cast<int>(kernel_->code.size());
    } else if (word.text == ".reg") {
      registers();
    } else if (word.text == ".shared") {
      variable(Where::shared, symbols_, shared);
    } else if (word.text == ".pragma") {
      next();
      expect(";");
    } else if (word.text == ".loc") {
      skip_line(line);
    } else if (word.text[0] == '.') {
      fail("a directive that is not known here, " + std::string(word.text), line);
    } else {
      instruction.text = word.text;
      instruction.line = line;
      if (instruction.text.substr(0, instruction.text.find('.')) == "bra") {
        std::vector<int> within;
        for (const Scope& scope : scopes_) within.push_back(scope.id);
        jumps_.push_back({kernel_->code.size(), std::string(next().text), within});
      }
      while (!is(";") && !is("}")) {  // inline assembly may leave out the last semicolon of a scope
        instruction.operands.push_back(operand());
        if (!take(",")) break;
      }
      if (!is("}")) expect(";");
      kernel_->code.push_back(std::move(instruction));
    }
  }

  void registers() {
    next();  // a type: every register holds 64 bits here
    do {
      const std::string name(next().text);
      if (take("<")) {
        const int64_t count = whole_number();
        expect(">");
        for (int64_t i = 0; i < count; ++i) scopes_.back().registers[name + std::to_string(i)] = kernel_->registers++;
      } else {
        scopes_.back().registers[name] = kernel_->registers++;
      }
    } while (take(","));
    expect(";");
  }

  int find_register(std::string_view name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->registers.find(name);
      if (found != scope->registers.end()) return found->second;
    }
    return -1;
  }
  int reg_of(const Token& name) const {
    const int found = find_register(name.text);
    if (found < 0) fail("there is no register " + std::string(name.text), name.line);
    return found;
  }

  Operand list_until(std::string_view end) {
    Operand list;
    list.kind = Operand::Kind::list;
    while (!take(end)) {
      list.items.push_back(operand());
      take(",");
    }
    return list;
  }

  // PTX ISA 6.4: registers, constants, addresses in brackets, vectors in braces, d|p, and _ for what nobody wants.
  Operand operand() {
    Operand result;
    if (take("{")) return list_until("}");
    if (take("[")) {
      Operand list = list_until("]");
      return list.items.size() == 1 ? list.items[0] : list;
    }
    if (take("!")) {
      result = operand();
      result.negated = true;
      return result;
    }
    if (token().kind == Token::Kind::number || is("-")) return constant();
    const Token name = next();
    if (name.text == "_") {
      result.kind = Operand::Kind::sink;
      if (take("|")) result.second = reg_of(next());
      return result;
    }
    for (const auto& [text, special] : kSpecials) {
      if (name.text == text) {
        result.kind = Operand::Kind::special;
        result.value = static_cast<uint64_t>(special);
        return result;
      }
    }
    if (const int reg = find_register(name.text); reg >= 0) {
      result.kind = Operand::Kind::reg;
      result.reg = reg;
      if (take("|")) result.second = reg_of(next());
    } else {
      const auto symbol = symbols_.find(name.text);
      if (symbol == symbols_.end()) fail("an operand that is not known here, " + std::string(name.text), name.line);
      result.kind = symbol->second.where == Where::parameter ? Operand::Kind::parameter : Operand::Kind::constant;
      result.value = symbol->second.at;
      if (symbol->second.where == Where::shared) result.value += kSharedBase;
      if (symbol->second.where == Where::dynamic)
        result.kind = Operand::Kind::none;  // until all that is static is known
    }
    if (take("+")) result.offset = whole_number();
    return result;
  }

  Operand constant() {
    Operand result;
    result.kind = Operand::Kind::constant;
    const std::string_view text = token().text;
    const bool bits = text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1]) != nullptr;
    if (bits) {  // 0f and 0d: the bits of a float, PTX ISA 4.5.2
      result.value = std::strtoull(std::string(next().text.substr(2)).c_str(), nullptr, 16);
    } else {
      result.value = static_cast<uint64_t>(whole_number());
    }
    return result;
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  Module module_;
  Symbols module_symbols_, symbols_;
  int module_shared_ = 0;
  Kernel* kernel_ = nullptr;
  std::vector<Scope> scopes_;
  int scopes_made_ = 0;
  std::map<std::pair<int, std::string>, int> labels_;
  std::vector<Jump> jumps_;
};

}  // namespace

Module parse(std::string_view text) { return Parser(text).module(); }

Module::Module() = default;
Module::Module(Module&&) = default;
Module::~Module() = default;

Kernel* Module::find(std::string_view name) {
  for (Kernel& kernel : kernels) {
    if (kernel.name == name) return &kernel;
  }
  return nullptr;
}

}  // namespace ptx
