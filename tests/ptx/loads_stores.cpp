// Loads, stores, atomic operations and fences: PTX ISA 9.7.9.8 to 9.7.9.12 and 9.7.13. Memory here is one and in order,
// so a fence matters to the shadow state alone.
#include "form.h"
#include "memory.h"
#include "races.h"
#include "shadow.h"

namespace ptx {
namespace {

size_t parts_of(const Operand& operand) { return operand.kind == Operand::Kind::list ? operand.items.size() : 1; }
const Operand& part_of(const Operand& operand, size_t i) {
  return operand.kind == Operand::Kind::list ? operand.items[i] : operand;
}

// Of ld and st: volatile, relaxed and the like are no races (PTX ISA 8.7).
bool strong(const Instruction& in) { return in.a != 0; }

Outcome load(const Step& step) {
  const Operand& to = step.operand(0);
  const int bytes = bytes_of(step.in.type), all = bytes * static_cast<int>(parts_of(to));
  const unsigned char* from[kLanes];
  unsigned char garbage[64];
  std::memset(garbage, 0xff, sizeof garbage);
  for_lanes(step.lanes, [&](int l) {
    const Place place = place_of(step, step.in.space, address(step, step.operand(1), l), all);
    from[l] = place.at;
    if (step.launch.kernel.reads_ahead && place.block != nullptr) {
      if (!shadow::written(*place.block, place.offset, all)) from[l] = garbage;
    } else {
      shadow::check_written(step, place, all);
      if (!strong(step.in)) races::read(step, place, all);
    }
  });
  for (size_t i = 0; i < parts_of(to); ++i) {
    uint64_t* out = result(step, part_of(to, i));
    for_lanes(step.lanes, [&](int l) {
      uint64_t value = 0;
      std::memcpy(&value, from[l] + i * static_cast<size_t>(bytes), static_cast<size_t>(bytes));
      out[l] = extended(value, step.in.type);
    });
  }
  return Outcome::done;
}

Outcome store(const Step& step) {
  const Operand& from = step.operand(1);
  const int bytes = bytes_of(step.in.type), all = bytes * static_cast<int>(parts_of(from));
  unsigned char* to[kLanes];
  for_lanes(step.lanes, [&](int l) {
    const Place place = place_of(step, step.in.space, address(step, step.operand(0), l), all);
    shadow::wrote(step.warp, place, all);
    if (!strong(step.in)) races::wrote(step, place, all);
    to[l] = place.at;
  });
  for (size_t i = 0; i < parts_of(from); ++i) {
    const Values part(step, part_of(from, i));
    for_lanes(step.lanes, [&](int l) {
      const uint64_t value = part[l];
      std::memcpy(to[l] + i * static_cast<size_t>(bytes), &value, static_cast<size_t>(bytes));
    });
  }
  return Outcome::done;
}

// ---- atom and red, 9.7.13.5

enum Atomic { kAdd, kExchange, kCompare, kMin, kMax, kOr, kAnd, kXor, kIncrement, kDecrement };  // Instruction::a

uint64_t updated(const Instruction& in, uint64_t old, uint64_t operand, uint64_t third) {
  const Type t = in.type;
  const auto less = [&](uint64_t a, uint64_t b) {
    return is_signed(t) ? static_cast<int64_t>(a) < static_cast<int64_t>(b) : a < b;
  };
  switch (in.a) {
    case kAdd:
      if (t == Type::f32) return bits_of(as<float>(old) + as<float>(operand));
      if (t == Type::f64) return bits_of(as<double>(old) + as<double>(operand));
      return old + operand;
    case kExchange: return operand;
    case kCompare: return old == operand ? third : old;
    case kMin: return less(operand, old) ? operand : old;
    case kMax: return less(old, operand) ? operand : old;
    case kOr: return old | operand;
    case kAnd: return old & operand;
    case kXor: return old ^ operand;
    case kIncrement: return old >= operand ? 0 : old + 1;
    default: return old == 0 || old > operand ? operand : old - 1;
  }
}

Outcome atomic(const Step& step) {
  const size_t memory_operand = static_cast<size_t>(step.in.b);  // red has no result, so its address comes first
  const int bytes = bytes_of(step.in.type);
  const Values operand(step, memory_operand + 1);
  const size_t last = step.in.operands.size() - 1;
  const Values third(step, last);
  uint64_t* out = memory_operand == 0 ? nullptr : result(step, 0);
  for_lanes(step.lanes, [&](int l) {
    const Place place = place_of(step, step.in.space, address(step, step.operand(memory_operand), l), bytes);
    shadow::check_written(step, place, bytes);
    uint64_t old = 0;
    std::memcpy(&old, place.at, static_cast<size_t>(bytes));
    const uint64_t given = third[l],
                   next = updated(step.in, extended(old, step.in.type), extended(operand[l], step.in.type), given);
    std::memcpy(place.at, &next, static_cast<size_t>(bytes));
    shadow::wrote(step.warp, place, bytes);
    if (out != nullptr) out[l] = old;
  });
  ++step.launch.events;
  return Outcome::done;
}

// ---- fences, 9.7.13.4

Outcome fence(const Step&) { return Outcome::done; }

Outcome fence_async(const Step& step) {
  shadow::fence_async(step);
  return Outcome::done;
}

Outcome fence_map(const Step& step) {
  for_lanes(step.lanes, [&](int l) { shadow::map_fenced(step, address(step, step.operand(0), l)); });
  return Outcome::done;
}

Outcome fence_barriers(const Step& step) {
  races::made_barriers_are_fenced(step.warp);
  shadow::fence_barriers(step.warp);
  return Outcome::done;
}

void fences(Form& form, Instruction& in) {
  const bool barriers = form.take("mbarrier_init");
  const int order = form.take_one({"acq_rel", "sc", "acquire", "release"});
  form.take_one({"cta", "cluster", "gpu", "sys"});
  in.execute = barriers ? &fence_barriers : order >= 0 ? &fence : nullptr;
  if (!form.take("proxy")) return;
  const bool alias = form.take("alias"), async = form.take("async");
  if (form.take("tensormap::generic")) {
    in.execute = order == 2 ? &fence_map : order == 3 ? &fence : nullptr;
  } else if (async) {
    const Space space = form.take_space();
    in.execute = space == Space::global ? &fence : &fence_async;
    in.may_be_idle = space != Space::global;
  } else if (alias) {
    in.execute = &fence;
  }
}

// What says to whom and how soon an access is visible, and how it is cached; here all are visible at once.
// Returns whether it is strong.
bool take_visibility(Form& form) {
  bool strong = false;
  for (const char* word : {"volatile", "relaxed", "acquire", "release", "acq_rel"}) strong |= form.take(word);
  for (const char* word : {"weak", "cta", "cluster", "gpu", "sys", "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"}) {
    form.take(word);
  }
  for (size_t i = 0; i < form.left().size();) {
    const std::string_view word = form.left()[i];
    if (word.starts_with("L1::") || word.starts_with("L2::")) {
      form.take(word);
    } else {
      ++i;
    }
  }
  return strong;
}

}  // namespace

void memory(Form& form, Instruction& in) {
  const std::string_view op = form.opcode();
  if (op == "fence") return fences(form, in);
  if (op == "membar") {
    if (form.take_one({"cta", "gl", "sys"}) >= 0) in.execute = &fence;
    return;
  }
  in.space = form.take_space();  // before the scopes, of which one is called cluster
  in.a = take_visibility(form);
  if (op == "ld" || op == "st") {
    const size_t parts = static_cast<size_t>(form.take_one({"v2", "v4", "v8"}));
    in.type = form.take_type();
    const size_t given = parts_of(in.operands[op == "ld" ? 0 : 1]);
    const bool matches = given == (parts == 0 ? 2 : parts == 1 ? 4 : parts == 2 ? 8 : 1);
    if (in.type != Type::none && matches) in.execute = op == "ld" ? &load : &store;
    return;
  }
  in.a = form.take_one({"add", "exch", "cas", "min", "max", "or", "and", "xor", "inc", "dec"});
  in.b = op == "atom";
  in.type = form.take_type();
  const bool possible = !is_float(in.type) || ((in.type == Type::f32 || in.type == Type::f64) && in.a == kAdd);
  if (in.a >= 0 && in.type != Type::none && possible) in.execute = &atomic;
}

}  // namespace ptx
