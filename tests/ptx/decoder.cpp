// Opcodes to the families that execute them, and types (PTX ISA 5.2).
#include <map>

#include "form.h"

namespace ptx {
namespace {

constexpr std::pair<std::string_view, Type> kTypes[] = {
    {"pred", Type::pred}, {"b8", Type::b8},   {"b16", Type::b16},     {"b32", Type::b32},       {"b64", Type::b64},
    {"u8", Type::u8},     {"u16", Type::u16}, {"u32", Type::u32},     {"u64", Type::u64},       {"s8", Type::s8},
    {"s16", Type::s16},   {"s32", Type::s32}, {"s64", Type::s64},     {"f16", Type::f16},       {"bf16", Type::bf16},
    {"f32", Type::f32},   {"f64", Type::f64}, {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}, {"tf32", Type::tf32}};

const std::map<std::string_view, Family>& families() {
  static const std::map<std::string_view, Family> table = [] {
    std::map<std::string_view, Family> made;
    const auto add = [&](Family family, std::initializer_list<std::string_view> opcodes) {
      for (const std::string_view opcode : opcodes) made[opcode] = family;
    };
    add(arithmetic, {"add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "abs", "neg", "copysign", "ex2",
                     "lg2", "rcp", "rsqrt", "sqrt", "tanh"});
    add(bit_logic,
        {"and", "or", "xor", "not", "shl", "shr", "shf", "lop3", "popc", "brev", "clz", "bfind", "bfi", "bfe", "prmt"});
    add(moves, {"mov", "selp", "setp", "cvta", "mapa", "bra", "ret", "exit", "trap", "prefetch", "prefetchu",
                "nanosleep", "griddepcontrol"});
    add(conversion, {"cvt"});
    add(memory, {"ld", "st", "atom", "red", "membar", "fence"});
    add(collectives, {"shfl", "vote", "match", "elect", "redux", "activemask"});
    add(barriers, {"bar", "barrier", "mbarrier"});
    add(matrices, {"ldmatrix", "stmatrix", "mma"});
    add(copies, {"cp"});
    add(tensors, {"tensormap"});
    add(products, {"wgmma", "setmaxnreg"});
    return made;
  }();
  return table;
}

// Of a wgmma, whose registers no other instruction may touch while it is under way.
void mark_accumulators(Kernel& kernel) {
  std::vector<bool> accumulator(static_cast<size_t>(kernel.registers));
  const auto product = [](const Instruction& in) { return in.text.starts_with("wgmma.mma_async"); };
  for (const Instruction& in : kernel.code) {
    if (!product(in)) continue;
    kernel.has_products = true;
    for (const Operand& item : in.operands[0].items) accumulator[static_cast<size_t>(item.reg)] = true;
  }
  for (Instruction& in : kernel.code) {
    if (product(in)) continue;
    const auto touches = [&](const Operand& operand) {
      return operand.reg >= 0 && accumulator[static_cast<size_t>(operand.reg)];
    };
    for (const Operand& operand : in.operands) {
      in.on_accumulators |= touches(operand) || std::any_of(operand.items.begin(), operand.items.end(), touches);
    }
  }
}

void place_dynamic(Operand& operand, uint32_t base) {  // see the parser
  if (operand.kind == Operand::Kind::none) {
    operand.kind = Operand::Kind::constant;
    operand.value = base;
  }
  for (Operand& item : operand.items) place_dynamic(item, base);
}

}  // namespace

Type type_named(std::string_view name) {
  for (const auto& [text, type] : kTypes) {
    if (text == name) return type;
  }
  return Type::none;
}

int bytes_of(Type type) {
  switch (type) {
    case Type::b8:
    case Type::u8:
    case Type::s8: return 1;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16: return 2;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64: return 8;
    default: return 4;
  }
}

bool is_signed(Type type) { return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64; }
bool is_float(Type type) { return type == Type::f16 || type == Type::bf16 || type == Type::f32 || type == Type::f64; }

void leave_out(Instruction& instruction) {
  instruction.execute = [](const Step&) { return Outcome::done; };
  if (instruction.text.find("_wait.parity") != std::string::npos) {
    instruction.execute = [](const Step& step) {
      uint64_t* over = result(step, 0);
      for_lanes(step.lanes, [&](int lane) { over[lane] = 1; });
      return Outcome::done;
    };
  }
  instruction.members = Instruction::kAlone;
  instruction.may_sleep = false;
}

void decode(Kernel& kernel) {
  for (Instruction& in : kernel.code) {
    for (Operand& operand : in.operands) place_dynamic(operand, dynamic_base(kernel));
    Form form(in);
    const auto family = families().find(form.opcode());
    if (family != families().end()) family->second(form, in);
    const std::string at = "ptx line " + std::to_string(in.line) + ": ";
    if (in.execute == nullptr) throw Error(at + "the machine has no " + in.text + ", in " + kernel.name);
    if (!form.left().empty()) {
      throw Error(at + "the machine has no ." + std::string(form.left()[0]) + " of " + in.text + ", in " + kernel.name);
    }
  }
  mark_accumulators(kernel);
  const auto has = [&](const char* prefix) {
    return std::any_of(kernel.code.begin(), kernel.code.end(),
                       [&](const Instruction& in) { return in.text.starts_with(prefix); });
  };
  kernel.reads_ahead = has("mma.sync") && (has("cp.async.ca") || has("cp.async.cg"));
  kernel.decoded = true;
}

}  // namespace ptx
