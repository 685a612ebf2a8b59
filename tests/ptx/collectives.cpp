// What lanes of a warp do together: PTX ISA 9.7.9.6 (shfl), 9.7.13.9 to 9.7.13.13 (vote, match, activemask, redux,
// elect). The scheduler has brought the lanes of the mask together before any of these runs.
#include "form.h"

namespace ptx {
namespace {

enum Shuffle { kUp, kDown, kButterfly, kIndex };  // Instruction::a

Outcome shuffle(const Step& step) {
  const Values a(step, 1), by(step, 2), clamp(step, 3);
  uint64_t from[kLanes];
  for_lanes(step.lanes, [&](int l) { from[l] = a[l]; });
  uint64_t* out = result(step, 0);
  uint64_t* inside = step.operand(0).second >= 0 ? step.warp.reg(step.operand(0).second) : nullptr;
  uint64_t offsets[kLanes], clamps[kLanes];
  for_lanes(step.lanes, [&](int l) { offsets[l] = by[l] & 31, clamps[l] = clamp[l]; });
  for_lanes(step.lanes, [&](int l) {
    const int offset = static_cast<int>(offsets[l]), segment = static_cast<int>(clamps[l] >> 8 & 31);
    const int last = (l & segment) | (static_cast<int>(clamps[l] & 31) & ~segment), first = l & segment;
    int source = 0;
    bool valid = false;
    switch (step.in.a) {
      case kUp: source = l - offset, valid = source >= last; break;
      case kDown: source = l + offset, valid = source <= last; break;
      case kButterfly: source = l ^ offset, valid = source <= last; break;
      default: source = first | (offset & ~segment), valid = source <= last;
    }
    if (!valid) source = l;
    if ((step.lanes >> source & 1) == 0)
      step.fail("a shuffle from lane " + std::to_string(source) + ", which is not there");
    out[l] = from[source];
    if (inside != nullptr) inside[l] = valid;
  });
  return Outcome::done;
}

enum Vote { kBallot, kAll, kAny, kUniform };  // Instruction::a

Outcome vote(const Step& step) {
  const Values a(step, 1);
  uint32_t yes = 0;
  for_lanes(step.lanes, [&](int l) { yes |= uint32_t{a[l] != 0} << l; });
  const uint64_t answers[] = {yes, yes == step.lanes, yes != 0, yes == step.lanes || yes == 0};
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = answers[step.in.a]; });
  return Outcome::done;
}

Outcome match(const Step& step) {
  const Values a(step, 1);
  uint64_t from[kLanes];
  for_lanes(step.lanes, [&](int l) { from[l] = truncated(a[l], bytes_of(step.in.type)); });
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) {
    uint64_t same = 0;
    for_lanes(step.lanes, [&](int other) { same |= uint64_t{from[other] == from[l]} << other; });
    out[l] = same;
  });
  return Outcome::done;
}

Outcome elect(const Step& step) {
  const int leader = step.first_lane();
  uint64_t* who = step.operand(0).kind == Operand::Kind::reg ? step.warp.reg(step.operand(0).reg) : nullptr;
  uint64_t* elected = step.operand(0).second >= 0 ? step.warp.reg(step.operand(0).second) : nullptr;
  for_lanes(step.lanes, [&](int l) {
    if (who != nullptr) who[l] = static_cast<uint64_t>(leader);
    if (elected != nullptr) elected[l] = l == leader;
  });
  return Outcome::done;
}

enum Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };  // Instruction::a

Outcome reduce(const Step& step) {
  const Values a(step, 1);
  const Type t = step.in.type;
  uint64_t total = extended(a[step.first_lane()], t);
  for_lanes(step.lanes & (step.lanes - 1), [&](int l) {
    const uint64_t next = extended(a[l], t);
    const bool less = is_signed(t) ? static_cast<int64_t>(next) < static_cast<int64_t>(total) : next < total;
    switch (step.in.a) {
      case kAdd: total += next; break;
      case kMin: total = less ? next : total; break;
      case kMax: total = less ? total : next; break;
      case kAnd: total &= next; break;
      case kOr: total |= next; break;
      default: total ^= next;
    }
  });
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = truncated(total, 4); });
  return Outcome::done;
}

Outcome active(const Step& step) {
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = step.lanes; });
  return Outcome::done;
}

}  // namespace

void collectives(Form& form, Instruction& in) {
  const std::string_view op = form.opcode();
  if (op == "activemask") {
    in.type = form.take_type();
    in.execute = &active;
    return;
  }
  if (!form.take("sync")) return;
  if (op == "shfl") {
    in.a = form.take_one({"up", "down", "bfly", "idx"});
    in.type = form.take_type();
    in.members = 4;
    if (in.a >= 0 && in.type == Type::b32) in.execute = &shuffle;
  } else if (op == "vote") {
    in.a = form.take_one({"ballot", "all", "any", "uni"});
    in.type = form.take_type();
    in.members = 2;
    if (in.a >= 0 && (in.type == Type::b32) == (in.a == kBallot)) in.execute = &vote;
  } else if (op == "match") {
    in.members = 2;
    const bool any = form.take("any");
    in.type = form.take_type();
    if (any && (in.type == Type::b32 || in.type == Type::b64)) in.execute = &match;
  } else if (op == "elect") {
    in.members = 1;
    in.execute = &elect;
  } else if (op == "redux") {
    in.a = form.take_one({"add", "min", "max", "and", "or", "xor"});
    in.type = form.take_type();
    in.members = 2;
    if (in.a >= 0 && bytes_of(in.type) == 4 && !is_float(in.type)) in.execute = &reduce;
  }
}

}  // namespace ptx
