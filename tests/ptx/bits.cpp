// Logic and shifts, and what looks at single bits: PTX ISA 9.7.1.12 to 9.7.1.21, 9.7.8 and prmt of 9.7.9.
#include "form.h"

namespace ptx {
namespace {

// The result of a lane from its operands, cut to the type's size.
template <int operands, auto op>
Outcome each(const Step& step) {
  const int bytes = bytes_of(step.in.type);
  const Values a(step, 1), b(step, operands > 1 ? 2 : 1), c(step, operands > 2 ? 3 : 1), d(step, operands > 3 ? 4 : 1);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) {
    if constexpr (operands == 1) out[l] = truncated(op(step.in, a[l]), bytes);
    if constexpr (operands == 2) out[l] = truncated(op(step.in, a[l], b[l]), bytes);
    if constexpr (operands == 3) out[l] = truncated(op(step.in, a[l], b[l], c[l]), bytes);
    if constexpr (operands == 4) out[l] = truncated(op(step.in, a[l], b[l], c[l], d[l]), bytes);
  });
  return Outcome::done;
}

unsigned width(const Instruction& in) { return static_cast<unsigned>(8 * bytes_of(in.type)); }
uint64_t low_bits(uint64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Shifts by a register's full 32 bits: all of a value may be shifted out, 9.7.8.7.
constexpr auto kLeft = [](const Instruction& in, uint64_t a, uint64_t by) {
  by &= 0xffffffff;
  return by >= width(in) ? 0 : a << by;
};
constexpr auto kRight = [](const Instruction& in, uint64_t a, uint64_t by) {
  by &= 0xffffffff;
  const uint64_t value = extended(a, in.type);
  if (is_signed(in.type)) {
    return static_cast<uint64_t>(static_cast<int64_t>(value) >> std::min<uint64_t>(by, width(in) - 1));
  }
  return by >= width(in) ? 0 : value >> by;
};

// b above a, shifted: 9.7.8.9. a: to the left; b: by the amount modulo 32, else at most 32.
constexpr auto kFunnel = [](const Instruction& in, uint64_t a, uint64_t b, uint64_t by) {
  const uint64_t both = truncated(a, 4) | b << 32;
  by = in.b != 0 ? by & 31 : std::min<uint64_t>(by & 0xffffffff, 32);
  return in.a != 0 ? both << by >> 32 : both >> by;
};

constexpr auto kLookUp = [](const Instruction&, uint64_t a, uint64_t b, uint64_t c, uint64_t table) {
  uint64_t out = 0;
  for (unsigned row = 0; row < 8; ++row) {
    if ((table >> row & 1) != 0) out |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return out;
};

constexpr auto kReversed = [](const Instruction& in, uint64_t a) {
  uint64_t out = 0;
  for (unsigned bit = 0; bit < width(in); ++bit) out |= (a >> bit & 1) << (width(in) - 1 - bit);
  return out;
};

// Insert: `count` low bits of a into b from bit `at` on.
constexpr auto kInserted = [](const Instruction& in, uint64_t a, uint64_t b, uint64_t at, uint64_t count) {
  at &= 255, count &= 255;
  const uint64_t mask = at >= width(in) ? 0 : low_bits(count) << at;
  return (b & ~mask) | (at >= width(in) ? 0 : a << at & mask);
};

// Extract `count` bits from bit `at` on; signed types go on with the uppermost of them, 9.7.1.17.
constexpr auto kExtracted = [](const Instruction& in, uint64_t a, uint64_t at, uint64_t count) {
  at &= 255, count &= 255;
  const unsigned bits = width(in);
  const uint64_t value = truncated(a, bytes_of(in.type));
  if (count == 0) return uint64_t{0};
  const uint64_t field = at < bits ? value >> at & low_bits(count) : 0;
  const uint64_t top = std::min<uint64_t>(at + count - 1, bits - 1);
  if (!is_signed(in.type) || (value >> top & 1) == 0) return field;
  const uint64_t there = at < bits ? std::min<uint64_t>(count, bits - at) : 0;
  return field | ~low_bits(there);
};

constexpr auto kPermuted = [](const Instruction&, uint64_t a, uint64_t b, uint64_t selector) {
  const uint64_t bytes = truncated(a, 4) | b << 32;
  uint64_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t choice = selector >> 4 * i & 15, byte = bytes >> 8 * (choice & 7) & 255;
    out |= ((choice & 8) != 0 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return out;
};

// What counts answers in 32 bits, whatever it counts in.
template <auto op>
Outcome count(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = truncated(op(step.in, truncated(a[l], bytes_of(step.in.type))), 4); });
  return Outcome::done;
}

constexpr auto kOnes = [](const Instruction&, uint64_t a) { return static_cast<uint64_t>(__builtin_popcountll(a)); };
constexpr auto kLeadingZeros = [](const Instruction& in, uint64_t a) -> uint64_t {
  return a == 0 ? width(in) : static_cast<unsigned>(__builtin_clzll(a)) - (64 - width(in));
};
// The uppermost bit that is not the sign, or its distance from the top (a); all ones: there is none.
constexpr auto kFound = [](const Instruction& in, uint64_t a) -> uint64_t {
  if (is_signed(in.type) && (a >> (width(in) - 1) & 1) != 0) a = truncated(~a, bytes_of(in.type));
  if (a == 0) return ~uint64_t{0};
  const uint64_t bit = 63 - static_cast<unsigned>(__builtin_clzll(a));
  return in.a != 0 ? width(in) - 1 - bit : bit;
};

// Predicates hold zero or anything else.
template <auto op>
Outcome of_predicates(const Step& step) {
  const Values a(step, 1), b(step, step.in.operands.size() > 2 ? 2 : 1);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = op(a[l] != 0, b[l] != 0); });
  return Outcome::done;
}

}  // namespace

void bit_logic(Form& form, Instruction& in) {
  const std::string_view op = form.opcode();
  in.type = form.take_type();
  if (in.type == Type::pred) {
    if (op == "and") in.execute = &of_predicates<[](bool a, bool b) { return a && b; }>;
    if (op == "or") in.execute = &of_predicates<[](bool a, bool b) { return a || b; }>;
    if (op == "xor") in.execute = &of_predicates<[](bool a, bool b) { return a != b; }>;
    if (op == "not") in.execute = &of_predicates<[](bool a, bool) { return !a; }>;
    return;
  }
  if (op == "and") in.execute = &each<2, [](const Instruction&, uint64_t a, uint64_t b) { return a & b; }>;
  if (op == "or") in.execute = &each<2, [](const Instruction&, uint64_t a, uint64_t b) { return a | b; }>;
  if (op == "xor") in.execute = &each<2, [](const Instruction&, uint64_t a, uint64_t b) { return a ^ b; }>;
  if (op == "not") in.execute = &each<1, [](const Instruction&, uint64_t a) { return ~a; }>;
  if (op == "shl") in.execute = &each<2, kLeft>;
  if (op == "shr") in.execute = &each<2, kRight>;
  if (op == "shf") {
    in.a = form.take_one({"r", "l"});
    in.b = form.take_one({"clamp", "wrap"});
    if (in.a >= 0 && in.b >= 0) in.execute = &each<3, kFunnel>;
  }
  if (op == "lop3") in.execute = &each<4, kLookUp>;
  if (op == "brev") in.execute = &each<1, kReversed>;
  if (op == "bfi") in.execute = &each<4, kInserted>;
  if (op == "bfe") in.execute = &each<3, kExtracted>;
  if (op == "prmt") in.execute = &each<3, kPermuted>;
  if (op == "popc") in.execute = &count<kOnes>;
  if (op == "clz") in.execute = &count<kLeadingZeros>;
  if (op == "bfind") {
    in.a = form.take("shiftamt");
    in.execute = &count<kFound>;
  }
}

}  // namespace ptx
