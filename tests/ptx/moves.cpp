// Values moved, chosen and compared, addresses converted, and what changes nothing here: PTX ISA 9.7.6, 9.7.9.1 to
// 9.7.9.20 and 9.7.12. The scheduler itself does branches and exits.
#include <cmath>

#include "form.h"
#include "halves.h"
#include "memory.h"

namespace ptx {
namespace {

Outcome nothing(const Step&) { return Outcome::done; }

Outcome trap(const Step& step) { step.fail("trap"); }

Outcome move(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  const int bytes = bytes_of(step.in.type);
  for_lanes(step.lanes, [&](int l) { out[l] = truncated(a[l], bytes); });
  return Outcome::done;
}

Outcome move_predicate(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = a[l] != 0; });
  return Outcome::done;
}

Outcome unpack(const Step& step) {
  const Values a(step, 1);
  const auto& parts = step.operand(0).items;
  const int bytes = bytes_of(step.in.type) / static_cast<int>(parts.size());
  uint64_t whole[kLanes];  // one of the parts may be the register that is taken apart
  for_lanes(step.lanes, [&](int l) { whole[l] = a[l]; });
  for (size_t i = 0; i < parts.size(); ++i) {
    uint64_t* out = result(step, parts[i]);
    for_lanes(step.lanes, [&](int l) { out[l] = truncated(whole[l] >> 8 * bytes * static_cast<int>(i), bytes); });
  }
  return Outcome::done;
}

Outcome pack(const Step& step) {
  const auto& parts = step.operand(1).items;
  const int bytes = bytes_of(step.in.type) / static_cast<int>(parts.size());
  uint64_t whole[kLanes] = {};
  for (size_t i = 0; i < parts.size(); ++i) {
    const Values part(step, parts[i]);
    for_lanes(step.lanes, [&](int l) { whole[l] |= truncated(part[l], bytes) << 8 * bytes * static_cast<int>(i); });
  }
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = whole[l]; });
  return Outcome::done;
}

Outcome select(const Step& step) {
  const Values a(step, 1), b(step, 2), which(step, 3);
  uint64_t* out = result(step, 0);
  const int bytes = bytes_of(step.in.type);
  for_lanes(step.lanes, [&](int l) { out[l] = truncated(which[l] != 0 ? a[l] : b[l], bytes); });
  return Outcome::done;
}

// a: generic becomes shared; b: shared becomes generic. Other spaces are the host's memory.
Outcome convert_address(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) {
    const uint64_t from = a[l];
    out[l] = step.in.a != 0 ? from & 0xffffffff : step.in.b != 0 ? kSharedWindow | from : from;
  });
  return Outcome::done;
}

Outcome map_address(const Step& step) {  // of one's own block to that of another in the cluster
  const Values a(step, 1), rank(step, 2);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = (a[l] & kOffsetMask) | (rank[l] + 1) << kRankShift; });
  return Outcome::done;
}

// ---- setp, 9.7.6.2

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
enum Combination { kAlone, kAnd, kOr, kXor };

template <class T>
bool holds(int comparison, T a, T b) {
  switch (comparison) {
    case kEq: return a == b;
    case kNe: return a != b;
    case kLt: return a < b;
    case kLe: return a <= b;
    case kGt: return a > b;
    default: return a >= b;
  }
}

// Ordered comparisons are false with a NaN, the others true.
bool holds_of_floats(int comparison, double a, double b) {
  const bool unordered = std::isnan(a) || std::isnan(b);
  if (comparison == kNum) return !unordered;
  if (comparison == kNan) return unordered;
  if (unordered) return comparison >= kEqu;
  return holds(comparison % kEqu, a, b);
}

double as_double(uint64_t bits, Type type) {
  switch (type) {
    case Type::f64: return as<double>(bits);
    case Type::f32: return as<float>(bits);
    case Type::f16: return from_f16(static_cast<uint16_t>(bits));
    default: return from_bf16(static_cast<uint16_t>(bits));
  }
}

template <auto compare>
Outcome set_predicate(const Step& step) {
  const Values a(step, 1), b(step, 2);
  uint64_t scratch[kLanes];
  const uint64_t* with = step.in.b == kAlone ? nullptr : values(step, step.operand(3), scratch);
  uint64_t* out = result(step, 0);
  uint64_t* opposite = step.operand(0).second >= 0 ? step.warp.reg(step.operand(0).second) : nullptr;
  for_lanes(step.lanes, [&](int l) {
    const bool found = compare(step.in, a[l], b[l]);
    const auto combined = [&](bool value) {
      if (with == nullptr) return value;
      const bool other = with[l] != 0;
      return step.in.b == kAnd ? value && other : step.in.b == kOr ? value || other : value != other;
    };
    const bool yes = combined(found), no = combined(!found);  // before the register that `with` may be is written
    out[l] = yes;
    if (opposite != nullptr) opposite[l] = no;
  });
  return Outcome::done;
}

void comparison(Form& form, Instruction& in) {
  in.a = form.take_one({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
  if (in.a < 0) {
    in.a = form.take_one({"lo", "ls", "hi", "hs"});  // of numbers without a sign
    if (in.a < 0) return;
    in.a += kLt;
  }
  in.b = form.take_one({"and", "or", "xor"}) + 1;
  in.type = form.take_type();
  if (is_float(in.type)) {
    in.execute = &set_predicate<[](const Instruction& i, uint64_t a, uint64_t b) {
      return holds_of_floats(i.a, as_double(a, i.type), as_double(b, i.type));
    }>;
  } else if (in.type != Type::none && in.type != Type::pred && in.a < kEqu) {
    in.execute = &set_predicate<[](const Instruction& i, uint64_t a, uint64_t b) {
      const uint64_t x = extended(a, i.type), y = extended(b, i.type);
      return is_signed(i.type) ? holds(i.a, static_cast<int64_t>(x), static_cast<int64_t>(y)) : holds(i.a, x, y);
    }>;
  }
}

}  // namespace

void moves(Form& form, Instruction& in) {
  const std::string_view op = form.opcode();
  if (op == "bra") {
    form.take("uni");
    in.flow = Flow::branch;
    in.execute = &nothing;
  } else if (op == "ret" || op == "exit") {
    form.take("uni");
    in.flow = Flow::exit;
    in.execute = &nothing;
  } else if (op == "trap") {
    in.execute = &trap;
  } else if (op == "prefetch" || op == "prefetchu" || op == "nanosleep" || op == "griddepcontrol") {
    while (!form.left().empty()) form.take(form.left()[0]);  // where and how far is for hardware
    in.execute = &nothing;
  } else if (op == "setp") {
    comparison(form, in);
  } else if (op == "cvta") {
    const bool to = form.take("to");
    const Space space = form.take_space();
    in.type = form.take_type();
    const bool shared = space == Space::shared || space == Space::cluster;
    in.a = to && shared;
    in.b = !to && shared;
    if (in.type == Type::u64) in.execute = &convert_address;
  } else if (op == "mapa") {
    form.take_space();
    in.type = form.take_type();
    if (in.type == Type::u32) in.execute = &map_address;
  } else {
    in.type = form.take_type();
    if (in.type == Type::none) return;
    const auto listed = [&](size_t i) { return in.operands[i].kind == Operand::Kind::list; };
    if (op == "selp") {
      in.execute = &select;
    } else {
      in.execute = in.type == Type::pred ? &move_predicate : listed(0) ? &unpack : listed(1) ? &pack : &move;
    }
  }
}

}  // namespace ptx
