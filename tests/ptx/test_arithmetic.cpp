// Whole numbers, floats, bits, conversions and comparisons, each opcode against C++ that says the same in another way:
// with random operands and with those at the edges of every type.
#include <cfenv>
#include <limits>

#include "snippet.h"

using namespace snippet;
using testing::Random;

namespace {

// Runs `body` with operands in %d1 to %d3, %r1.., %f1.., %e1.. and %p1 (the lowest bit of the third), and returns what
// it leaves in a register of the kind: d, r, f, e, h or p.
std::vector<uint64_t> results(const std::string& body, char kind, const std::vector<uint64_t>& operands) {
  const size_t lanes = operands.size() / 3;
  Device<uint64_t> in(operands), out(lanes);
  std::string text =
      "mul.wide.u32 %d9, %r0, 24; add.u64 %d8, %d0, %d9; mul.wide.u32 %d9, %r0, 8; add.u64 %d7, %d1, %d9;";
  for (const char* i : {"1", "2", "3"}) {
    const std::string n(i), offset = std::to_string(8 * (i[0] - '1'));
    text += "ld.global.u64 %d" + n + ", [%d8+" + offset + "]; cvt.u32.u64 %r" + n + ", %d" + n + "; mov.b32 %f" + n +
            ", %r" + n + "; mov.b64 %e" + n + ", %d" + n + "; cvt.u16.u64 %h" + n + ", %d" + n + ";";
  }
  text += "and.b32 %r9, %r3, 1; setp.ne.u32 %p1, %r9, 0;\n" + body + "\n";
  const std::string from(1, kind);
  if (kind == 'r' || kind == 'f') text += "mov.b32 %r8, %" + from + "0; cvt.u64.u32 %d0, %r8;";
  if (kind == 'e') text += "mov.b64 %d0, %e0;";
  if (kind == 'h') text += "cvt.u64.u16 %d0, %h0;";
  if (kind == 'p') text += "selp.b64 %d0, 1, 0, %p0;";
  text += "st.global.u64 [%d7], %d0;";
  CHECK_PASSES(run(kernel(text, 2), {in.data(), out.data()}, {.block = {static_cast<unsigned>(lanes)}}));
  std::vector<uint64_t> got(lanes);
  for (size_t i = 0; i < lanes; ++i) got[i] = out[i];
  return got;
}

constexpr size_t kLanes = 512;

std::vector<uint64_t> whole_operands() {
  Random random(5);
  std::vector<uint64_t> edges = {0,
                                 1,
                                 2,
                                 7,
                                 31,
                                 32,
                                 33,
                                 63,
                                 64,
                                 0x7f,
                                 0x80,
                                 0xff,
                                 0x7fff,
                                 0x8000,
                                 0xffff,
                                 0x7fffffff,
                                 0x80000000,
                                 0xffffffff,
                                 0x100000000,
                                 0x7fffffffffffffff,
                                 0x8000000000000000,
                                 ~uint64_t{0}};
  std::vector<uint64_t> all(3 * kLanes);
  for (uint64_t& value : all) {
    const uint64_t bits = uint64_t{random.bits()} << 32 | random.bits();
    const auto which = random.below(3);
    value = which == 0   ? edges[static_cast<size_t>(random.below(static_cast<int64_t>(edges.size())))]
            : which == 1 ? bits
                         : bits >> random.below(64);
  }
  return all;
}

std::vector<uint64_t> float_operands() {
  Random random(6);
  constexpr float kEdges[] = {0.f,    -0.f,   1.f,    -1.f,         0.5f,         1.5f,     2.5f,      3e38f,
                              -3e38f, 1e-40f, 1e-45f, 2147483648.f, 4294967296.f, INFINITY, -INFINITY, NAN};
  std::vector<uint64_t> all(3 * kLanes);
  for (uint64_t& value : all) {
    const float number = random.below(3) == 0 ? kEdges[random.below(16)] : static_cast<float>(random.normal() * 8);
    value = ptx::bits_of(number);
  }
  return all;
}

using Reference = std::function<uint64_t(uint64_t, uint64_t, uint64_t)>;

void check(const std::string& body, char kind, const Reference& reference, bool floats = false, double tolerance = 0) {
  const std::vector<uint64_t> operands = floats ? float_operands() : whole_operands();
  const std::vector<uint64_t> got = results(body, kind, operands);
  for (size_t i = 0; i < kLanes; ++i) {
    const uint64_t a = operands[3 * i], b = operands[3 * i + 1], c = operands[3 * i + 2], want = reference(a, b, c);
    bool same = got[i] == want;
    if (kind == 'f') {
      const auto x = ptx::as<float>(got[i]), y = ptx::as<float>(want);
      same |= (std::isnan(x) && std::isnan(y)) || std::fabs(x - y) <= tolerance * std::fabs(y);
    }
    if (same) continue;
    CHECK(same, "%s of %llx, %llx, %llx is %llx, should be %llx", body.c_str(), static_cast<unsigned long long>(a),
          static_cast<unsigned long long>(b), static_cast<unsigned long long>(c),
          static_cast<unsigned long long>(got[i]), static_cast<unsigned long long>(want));
    return;
  }
}

// The type's own arithmetic, in 128 bits: cut to the result afterwards.
template <class T, class Out = T>
Reference exact(const std::function<__int128(__int128, __int128, __int128)>& f) {
  return [f](uint64_t a, uint64_t b, uint64_t c) {
    const auto value = f(static_cast<T>(a), static_cast<T>(b), static_cast<Out>(c));
    return static_cast<uint64_t>(static_cast<std::make_unsigned_t<Out>>(static_cast<unsigned __int128>(value)));
  };
}

template <class T>
void whole_numbers(const std::string& type, char kind) {
  const std::string x = std::string("%") + kind, operands = " " + x + "0, " + x + "1, " + x + "2;";
  const std::string three = " " + x + "0, " + x + "1, " + x + "2, " + x + "3;", one = " " + x + "0, " + x + "1;";
  constexpr int bits = 8 * sizeof(T);
  check("add." + type + operands, kind, exact<T>([](auto a, auto b, auto) { return a + b; }));
  check("sub." + type + operands, kind, exact<T>([](auto a, auto b, auto) { return a - b; }));
  check("mul.lo." + type + operands, kind, exact<T>([](auto a, auto b, auto) {
          return static_cast<__int128>(static_cast<unsigned __int128>(a) * static_cast<unsigned __int128>(b));
        }));
  check("mul.hi." + type + operands, kind, exact<T>([](auto a, auto b, auto) {
          // of unsigned 64-bit numbers the product has 128 bits, of which a signed shift would copy the top one
          return std::is_signed_v<T>
                     ? a * b >> bits
                     : static_cast<__int128>(static_cast<unsigned __int128>(a) * static_cast<unsigned __int128>(b) >>
                                             bits);
        }));
  check("mad.lo." + type + three, kind, exact<T>([](auto a, auto b, auto c) {
          return static_cast<__int128>(static_cast<unsigned __int128>(a) * static_cast<unsigned __int128>(b) +
                                       static_cast<unsigned __int128>(c));
        }));
  check("min." + type + operands, kind, exact<T>([](auto a, auto b, auto) { return a < b ? a : b; }));
  check("max." + type + operands, kind, exact<T>([](auto a, auto b, auto) { return a > b ? a : b; }));
  check("div." + type + operands, kind, exact<T>([](auto a, auto b, auto) { return b == 0 ? __int128{-1} : a / b; }));
  check("rem." + type + operands, kind, exact<T>([](auto a, auto b, auto) { return b == 0 ? a : a % b; }));
  if (std::is_signed_v<T>) {
    check("abs." + type + one, kind, exact<T>([](auto a, auto, auto) { return a < 0 ? -a : a; }));
    check("neg." + type + one, kind, exact<T>([](auto a, auto, auto) { return -a; }));
  }
  const std::string shift = " " + x + "0, " + x + "1, %r2;";
  check("shr." + type + shift, kind, [](uint64_t a, uint64_t b, uint64_t) {
    const auto by = static_cast<uint32_t>(b);
    const auto value = static_cast<__int128>(static_cast<T>(a));
    return static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(by >= 127 ? (value < 0 ? -1 : 0) : value >> by));
  });
  check("shl.b" + std::to_string(bits) + shift, kind, [](uint64_t a, uint64_t b, uint64_t) {
    const auto by = static_cast<uint32_t>(b);
    return by >= bits ? 0 : static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(a << by));
  });
  struct Comparison {
    const char* name;
    bool (*holds)(T, T);
  };
  const Comparison comparisons[] = {{"eq", [](T a, T b) { return a == b; }}, {"ne", [](T a, T b) { return a != b; }},
                                    {"lt", [](T a, T b) { return a < b; }},  {"le", [](T a, T b) { return a <= b; }},
                                    {"gt", [](T a, T b) { return a > b; }},  {"ge", [](T a, T b) { return a >= b; }}};
  for (const Comparison& comparison : comparisons) {
    const std::string text = std::string("setp.") + comparison.name;
    const auto holds = [&](uint64_t a, uint64_t b) { return comparison.holds(static_cast<T>(a), static_cast<T>(b)); };
    check(text + "." + type + " %p0, " + x + "1, " + x + "2;", 'p',
          [&](uint64_t a, uint64_t b, uint64_t) { return holds(a, b); });
    check(text + ".and." + type + " %p2|%p0, " + x + "1, " + x + "2, %p1;", 'p',
          [&](uint64_t a, uint64_t b, uint64_t c) { return !holds(a, b) && (c & 1) != 0; });
    check(text + ".xor." + type + " %p0|%p2, " + x + "1, " + x + "2, !%p1;", 'p',
          [&](uint64_t a, uint64_t b, uint64_t c) { return holds(a, b) != ((c & 1) == 0); });
  }
  check("selp." + type + " " + x + "0, " + x + "1, " + x + "2, %p1;", kind, [](uint64_t a, uint64_t b, uint64_t c) {
    return static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>((c & 1) != 0 ? a : b));
  });
}

void wide() {
  check("mul.wide.s32 %d0, %r1, %r2;", 'd', exact<int32_t, int64_t>([](auto a, auto b, auto) { return a * b; }));
  check("mul.wide.u32 %d0, %r1, %r2;", 'd', exact<uint32_t, uint64_t>([](auto a, auto b, auto) { return a * b; }));
  check("mul.wide.s16 %r0, %h1, %h2;", 'r', exact<int16_t, int32_t>([](auto a, auto b, auto) { return a * b; }));
  check("mul.wide.u16 %r0, %h1, %h2;", 'r', exact<uint16_t, uint32_t>([](auto a, auto b, auto) { return a * b; }));
  check("mad.wide.s32 %d0, %r1, %r2, %d3;", 'd',
        exact<int32_t, int64_t>([](auto a, auto b, auto c) { return a * b + c; }));
  check("mad.wide.u32 %d0, %r1, %r2, %d3;", 'd',
        exact<uint32_t, uint64_t>([](auto a, auto b, auto c) { return a * b + c; }));
  check("mad.hi.u32 %r0, %r1, %r2, %r3;", 'r',
        exact<uint32_t>([](auto a, auto b, auto c) { return (a * b >> 32) + c; }));
  check("mad.hi.s32 %r0, %r1, %r2, %r3;", 'r',
        exact<int32_t>([](auto a, auto b, auto c) { return (a * b >> 32) + c; }));
}

void bits() {
  check("and.b32 %r0, %r1, %r2;", 'r', [](uint64_t a, uint64_t b, uint64_t) { return (a & b) & 0xffffffff; });
  check("or.b64 %d0, %d1, %d2;", 'd', [](uint64_t a, uint64_t b, uint64_t) { return a | b; });
  check("xor.b32 %r0, %r1, %r2;", 'r', [](uint64_t a, uint64_t b, uint64_t) { return (a ^ b) & 0xffffffff; });
  check("not.b64 %d0, %d1;", 'd', [](uint64_t a, uint64_t, uint64_t) { return ~a; });
  check("setp.lt.u32 %p2, %r1, %r2; and.pred %p0, %p1, %p2;", 'p',
        [](uint64_t a, uint64_t b, uint64_t c) { return (c & 1) != 0 && uint32_t(a) < uint32_t(b); });
  check("setp.lt.u32 %p2, %r1, %r2; xor.pred %p0, %p1, %p2; not.pred %p0, %p0;", 'p',
        [](uint64_t a, uint64_t b, uint64_t c) { return ((c & 1) != 0) == (uint32_t(a) < uint32_t(b)); });
  check("popc.b32 %r0, %r1;", 'r', [](uint64_t a, uint64_t, uint64_t) {
    uint64_t n = 0;
    for (int i = 0; i < 32; ++i) n += a >> i & 1;
    return n;
  });
  check("clz.b64 %r0, %d1;", 'r', [](uint64_t a, uint64_t, uint64_t) {
    uint64_t n = 0;
    while (n < 64 && (a >> (63 - n) & 1) == 0) ++n;
    return n;
  });
  check("brev.b32 %r0, %r1;", 'r', [](uint64_t a, uint64_t, uint64_t) {
    uint64_t r = 0;
    for (int i = 0; i < 32; ++i) r = r << 1 | (a >> i & 1);
    return r;
  });
  const auto highest = [](uint64_t a) {
    for (int i = 31; i >= 0; --i) {
      if ((a >> i & 1) != 0) return i;
    }
    return -1;
  };
  check("bfind.u32 %r0, %r1;", 'r',
        [=](uint64_t a, uint64_t, uint64_t) { return uint64_t{static_cast<uint32_t>(highest(a))}; });
  check("bfind.shiftamt.u32 %r0, %r1;", 'r', [=](uint64_t a, uint64_t, uint64_t) {
    const int at = highest(a);
    return uint64_t{static_cast<uint32_t>(at < 0 ? -1 : 31 - at)};
  });
  check("bfind.s32 %r0, %r1;", 'r', [=](uint64_t a, uint64_t, uint64_t) {
    return uint64_t{static_cast<uint32_t>(highest((a >> 31 & 1) != 0 ? ~a & 0xffffffff : a))};
  });
  check("and.b32 %r3, %r3, 63; bfi.b32 %r0, %r1, %r2, %r3, 9;", 'r', [](uint64_t a, uint64_t b, uint64_t c) {
    uint64_t out = b & 0xffffffff;
    for (uint64_t i = 0; i < 9; ++i) {
      const uint64_t at = (c & 63) + i;
      if (at < 32) out = (out & ~(uint64_t{1} << at)) | (a >> i & 1) << at;
    }
    return out;
  });
  for (const bool is_signed : {false, true}) {
    check(std::string("and.b32 %r2, %r2, 63; and.b32 %r3, %r3, 63; bfe.") + (is_signed ? "s32" : "u32") +
              " %r0, %r1, %r2, %r3;",
          'r', [=](uint64_t a, uint64_t b, uint64_t c) {
            const uint64_t at = b & 63, count = c & 63;
            uint64_t out = 0;
            const uint64_t top = a >> std::min<uint64_t>(at + count - 1, 31) & 1;
            for (uint64_t i = 0; i < 32; ++i) {
              const uint64_t bit = i < count && at + i < 32 ? a >> (at + i) & 1 : is_signed && count != 0 ? top : 0;
              out |= bit << i;
            }
            return out;
          });
  }
  check("prmt.b32 %r0, %r1, %r2, %r3;", 'r', [](uint64_t a, uint64_t b, uint64_t c) {
    unsigned char bytes[8];
    for (int i = 0; i < 4; ++i) bytes[i] = a >> 8 * i & 255, bytes[4 + i] = b >> 8 * i & 255;
    uint64_t out = 0;
    for (int i = 0; i < 4; ++i) {
      const uint64_t select = c >> 4 * i & 15;
      const auto byte = static_cast<signed char>(bytes[select & 7]);
      out |= uint64_t{static_cast<unsigned char>((select & 8) != 0 ? (byte < 0 ? -1 : 0) : byte)} << 8 * i;
    }
    return out;
  });
  check("lop3.b32 %r0, %r1, %r2, %r3, 0xe8;", 'r',
        [](uint64_t a, uint64_t b, uint64_t c) { return ((a & b) | (a & c) | (b & c)) & 0xffffffff; });  // the majority
  check("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", 'r', [](uint64_t a, uint64_t b, uint64_t c) {
    const uint64_t both = (b & 0xffffffff) << 32 | (a & 0xffffffff);
    return both << (c & 31) >> 32;
  });
  check("shf.r.clamp.b32 %r0, %r1, %r2, %r3;", 'r', [](uint64_t a, uint64_t b, uint64_t c) {
    const uint64_t both = (b & 0xffffffff) << 32 | (a & 0xffffffff);
    return both >> std::min<uint32_t>(static_cast<uint32_t>(c), 32) & 0xffffffff;
  });
}

template <class F>
Reference floats(const F& f) {
  return [f](uint64_t a, uint64_t b, uint64_t c) {
    return ptx::bits_of(static_cast<float>(f(ptx::as<float>(a), ptx::as<float>(b), ptx::as<float>(c))));
  };
}

void floating() {
  const auto one = [](const char* op, double (*f)(double), double tolerance) {
    check(std::string(op) + " %f0, %f1;", 'f', floats([f](float a, float, float) { return f(a); }), true, tolerance);
  };
  // Sums and products of fp32 in fp64 are exact or rounded once more to the same number.
  check("add.f32 %f0, %f1, %f2;", 'f', floats([](double a, double b, double) { return a + b; }), true);
  check("sub.rn.f32 %f0, %f1, %f2;", 'f', floats([](double a, double b, double) { return a - b; }), true);
  check("mul.f32 %f0, %f1, %f2;", 'f', floats([](double a, double b, double) { return a * b; }), true);
  check("div.rn.f32 %f0, %f1, %f2;", 'f', floats([](double a, double b, double) { return a / b; }), true);
  check("min.f32 %f0, %f1, %f2;", 'f',
        floats([](float a, float b, float) { return std::isnan(a)   ? b
                                                    : std::isnan(b) ? a
                                                                    : std::min(a, b); }), true);
  check("max.f32 %f0, %f1, %f2;", 'f',
        floats([](float a, float b, float) { return std::isnan(a)   ? b
                                                    : std::isnan(b) ? a
                                                                    : std::max(a, b); }), true);
  check(
      "copysign.f32 %f0, %f1, %f2; mov.b32 %r0, %f0;", 'r',
      [](uint64_t a, uint64_t b, uint64_t) { return (b & 0x7fffffff) | (a & 0x80000000); }, true);
  check(
      "abs.f32 %f0, %f1; mov.b32 %r0, %f0;", 'r', [](uint64_t a, uint64_t, uint64_t) { return a & 0x7fffffff; }, true);
  check(
      "neg.f32 %f0, %f1; mov.b32 %r0, %f0;", 'r', [](uint64_t a, uint64_t, uint64_t) { return a ^ 0x80000000; }, true);
  check("fma.rn.f32 %f0, %f1, %f2, %f3;", 'f', floats([](float a, float b, float c) { return std::fma(a, b, c); }),
        true);
  for (const auto& [name, mode] : {std::pair{"rz", FE_TOWARDZERO}, {"rm", FE_DOWNWARD}, {"rp", FE_UPWARD}}) {
    check(std::string("fma.") + name + ".f32 %f0, %f1, %f2, %f3;", 'f', floats([m = mode](float a, float b, float c) {
            std::fesetround(m);
            const volatile double sum =
                std::fma(static_cast<double>(a), static_cast<double>(b), static_cast<double>(c));
            const volatile float rounded = static_cast<float>(sum);
            std::fesetround(FE_TONEAREST);
            return rounded;
          }),
          true);
  }
  check("fma.rn.sat.f32 %f0, %f1, %f2, %f3;", 'f', floats([](float a, float b, float c) {
          const float x = std::fma(a, b, c);
          return x > 1 ? 1.f : x > 0 ? x : 0.f;
        }),
        true);
  one("ex2.approx.f32", [](double a) { return std::exp2(a); }, 1e-6);
  one("lg2.approx.f32", [](double a) { return std::log2(a); }, 1e-6);
  one("tanh.approx.f32", [](double a) { return std::tanh(a); }, 1e-6);
  one("rcp.rn.f32", [](double a) { return 1 / a; }, 0);
  one("sqrt.rn.f32", [](double a) { return std::sqrt(a); }, 0);
  one("rsqrt.approx.f32", [](double a) { return 1 / std::sqrt(a); }, 1e-6);
  check("ex2.approx.ftz.f32 %f0, %f1;", 'f', floats([](float a, float, float) {
          const auto y = static_cast<float>(std::exp2(static_cast<double>(a)));
          return y < 0x1p-126f ? 0.f : y;
        }),
        true, 1e-6);
  check("rcp.approx.ftz.f32 %f0, %f1;", 'f', floats([](float a, float, float) {
          const float x = std::fabs(a) < 0x1p-126f ? std::copysign(0.f, a) : a, y = 1 / x;
          return std::fabs(y) < 0x1p-126f ? std::copysign(0.f, y) : y;
        }),
        true, 1e-6);
  struct Comparison {
    const char* name;
    bool (*holds)(float, float);
  };
  const Comparison comparisons[] = {{"lt", [](float a, float b) { return a < b; }},
                                    {"ge", [](float a, float b) { return a >= b; }},
                                    {"ne", [](float a, float b) { return a < b || a > b; }},
                                    {"neu", [](float a, float b) { return !(a == b); }},
                                    {"geu", [](float a, float b) { return !(a < b); }},
                                    {"num", [](float a, float b) { return !std::isnan(a) && !std::isnan(b); }},
                                    {"nan", [](float a, float b) { return std::isnan(a) || std::isnan(b); }}};
  for (const auto& comparison : comparisons) {
    check(
        std::string("setp.") + comparison.name + ".f32 %p0, %f1, %f2;", 'p',
        [&](uint64_t a, uint64_t b, uint64_t) { return comparison.holds(ptx::as<float>(a), ptx::as<float>(b)); }, true);
  }
}

void conversions() {
  check("cvt.s64.s32 %d0, %r1;", 'd', [](uint64_t a, uint64_t, uint64_t) {
    return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(a)));
  });
  check("cvt.u64.u32 %d0, %r1;", 'd', [](uint64_t a, uint64_t, uint64_t) { return a & 0xffffffff; });
  check("cvt.u32.u64 %r0, %d1;", 'r', [](uint64_t a, uint64_t, uint64_t) { return a & 0xffffffff; });
  check("cvt.s32.s16 %r0, %h1;", 'r',
        [](uint64_t a, uint64_t, uint64_t) { return uint64_t{static_cast<uint32_t>(static_cast<int16_t>(a))}; });
  check("cvt.rn.f32.s32 %f0, %r1;", 'f',
        [](uint64_t a, uint64_t, uint64_t) { return ptx::bits_of(static_cast<float>(static_cast<int32_t>(a))); });
  check("cvt.rn.f32.u64 %f0, %d1;", 'f',
        [](uint64_t a, uint64_t, uint64_t) { return ptx::bits_of(static_cast<float>(a)); });
  const auto clamped = [](double x, double low, double high) {
    return std::isnan(x) ? 0 : x < low ? low : x > high ? high : x;
  };
  check(
      "cvt.rzi.s32.f32 %r0, %f1;", 'r',
      [=](uint64_t a, uint64_t, uint64_t) {
        return uint64_t{static_cast<uint32_t>(
            static_cast<int64_t>(clamped(std::trunc(double{ptx::as<float>(a)}), -0x1p31, 0x1p31 - 1)))};
      },
      true);
  check(
      "cvt.rni.u32.f32 %r0, %f1;", 'r',
      [=](uint64_t a, uint64_t, uint64_t) {
        return static_cast<uint64_t>(clamped(std::nearbyint(double{ptx::as<float>(a)}), 0, 0x1p32 - 1));
      },
      true);
  check("cvt.rzi.f32.f32 %f0, %f1;", 'f', floats([](float a, float, float) { return std::trunc(a); }), true);
  check("cvt.sat.f32.f32 %f0, %f1;", 'f', floats([](float a, float, float) { return a > 1   ? 1.f
                                                                                    : a > 0 ? a
                                                                                            : 0.f; }),
        true);
  check("cvt.f64.f32 %e1, %f1; cvt.rn.f32.f64 %f0, %e1;", 'f', floats([](float a, float, float) { return a; }), true);
  // Every half by its definition (testing.h), and NaN as some NaN.
  const auto pair = [](int exponent, int mantissa) {
    return [=](uint64_t a, uint64_t b, uint64_t) {
      const auto half = [=](uint64_t x) -> uint64_t {
        const auto value = ptx::as<float>(x);
        return std::isnan(value) ? 0x7fff : testing::encode16(value, exponent, mantissa);
      };
      return half(a) << 16 | half(b);
    };
  };
  check("cvt.rn.bf16x2.f32 %r0, %f1, %f2;", 'r', pair(8, 7), true);
  check("cvt.rn.f16x2.f32 %r0, %f1, %f2;", 'r', pair(5, 10), true);
  check("cvt.f32.f16 %f0, %h1;", 'f', [](uint64_t a, uint64_t, uint64_t) {
    return ptx::bits_of(static_cast<float>(testing::decode16(static_cast<uint16_t>(a), 5, 10)));
  });
  check("mov.b32 {%h1, %h2}, %r1; mov.b32 %r0, {%h2, %h1};", 'r',
        [](uint64_t a, uint64_t, uint64_t) { return (a >> 16 & 0xffff) | (a & 0xffff) << 16; });
  check("mov.b64 {%r1, %r2}, %d1; mov.b64 %d0, {%r2, %r1};", 'd',
        [](uint64_t a, uint64_t, uint64_t) { return a >> 32 | a << 32; });
}

}  // namespace

int main() {
  whole_numbers<uint16_t>("u16", 'h');
  whole_numbers<int16_t>("s16", 'h');
  whole_numbers<uint32_t>("u32", 'r');
  whole_numbers<int32_t>("s32", 'r');
  whole_numbers<uint64_t>("u64", 'd');
  whole_numbers<int64_t>("s64", 'd');
  wide();
  bits();
  floating();
  conversions();
  return testing::finish();
}
