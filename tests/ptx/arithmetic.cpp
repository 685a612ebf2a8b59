// Arithmetic of whole numbers and of floats, PTX ISA 9.7.1 and 9.7.3 to 9.7.5. What PTX calls approximate is computed
// as well as C++ can: hardware's last bits are not known here.
#include <cfenv>
#include <cmath>

#include "form.h"

namespace ptx {
namespace {

constexpr int kFlush = 1, kSaturate = 2;  // Instruction::a

template <class T, auto op>
Outcome unary(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = bits_of<T>(static_cast<T>(op(as<T>(a[l])))); });
  return Outcome::done;
}

template <class T, auto op>
Outcome binary(const Step& step) {
  const Values a(step, 1), b(step, 2);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = bits_of<T>(static_cast<T>(op(as<T>(a[l]), as<T>(b[l])))); });
  return Outcome::done;
}

// Sums of products; C is the type of the result and of what is added.
template <class T, class C, auto op>
Outcome ternary(const Step& step) {
  const Values a(step, 1), b(step, 2), c(step, 3);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = bits_of<C>(static_cast<C>(op(as<T>(a[l]), as<T>(b[l]), as<C>(c[l])))); });
  return Outcome::done;
}

template <class T, class Wide, auto op>
Outcome widened(const Step& step) {
  const Values a(step, 1), b(step, 2);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = bits_of<Wide>(static_cast<Wide>(op(as<T>(a[l]), as<T>(b[l])))); });
  return Outcome::done;
}

// The function for a type, signed or not. Of add, sub, mul.lo and mad.lo the bits are the same for both.
template <auto op>
Execute modular(Type type) {
  switch (bytes_of(type)) {
    case 2: return &binary<uint16_t, op>;
    case 4: return &binary<uint32_t, op>;
    case 8: return &binary<uint64_t, op>;
    default: return nullptr;
  }
}
template <auto op>
Execute whole(Type type) {
  switch (type) {
    case Type::u16: return &binary<uint16_t, op>;
    case Type::s16: return &binary<int16_t, op>;
    case Type::u32: return &binary<uint32_t, op>;
    case Type::s32: return &binary<int32_t, op>;
    case Type::u64: return &binary<uint64_t, op>;
    case Type::s64: return &binary<int64_t, op>;
    default: return nullptr;
  }
}

constexpr auto kQuotient = [](auto a, auto b) -> decltype(a) {
  using T = decltype(a);
  if (b == 0) return static_cast<T>(~T{0});  // PTX ISA 9.7.1.6: not said
  if (std::is_signed_v<T> && b == static_cast<T>(-1))
    return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
  return static_cast<T>(a / b);
};
constexpr auto kRemainder = [](auto a, auto b) -> decltype(a) {
  using T = decltype(a);
  if (b == 0) return a;
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
};
constexpr auto kHigh = [](auto a, auto b) -> decltype(a) {
  using T = decltype(a);
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
};
constexpr auto kTimes = [](auto a, auto b) { return static_cast<decltype(a)>(uint64_t{a} * uint64_t{b}); };
constexpr auto kWideTimes = [](auto a, auto b) { return static_cast<int64_t>(a) * static_cast<int64_t>(b); };
constexpr auto kWideTimesUnsigned = [](auto a, auto b) { return uint64_t{a} * uint64_t{b}; };
constexpr auto kWideSum = [](auto a, auto b, auto c) {
  return static_cast<decltype(c)>(static_cast<uint64_t>(static_cast<int64_t>(a) * static_cast<int64_t>(b)) +
                                  static_cast<uint64_t>(c));
};
constexpr auto kWideSumUnsigned = [](auto a, auto b, auto c) {
  return static_cast<decltype(c)>(uint64_t{a} * uint64_t{b} + static_cast<uint64_t>(c));
};

void whole_numbers(Form& form, Instruction& in, std::string_view op) {
  const Type t = in.type;
  const bool is_wide = form.take("wide"), high = form.take("hi");
  if (!is_wide && !high) form.take("lo");
  if (op == "add") in.execute = modular<[](auto a, auto b) { return a + b; }>(t);
  if (op == "sub") in.execute = modular<[](auto a, auto b) { return a - b; }>(t);
  if (op == "div") in.execute = whole<kQuotient>(t);
  if (op == "rem") in.execute = whole<kRemainder>(t);
  if (op == "min") in.execute = whole<[](auto a, auto b) { return b < a ? b : a; }>(t);
  if (op == "max") in.execute = whole<[](auto a, auto b) { return a < b ? b : a; }>(t);
  if (op == "abs" || op == "neg") {
    // of the least number both are itself
    constexpr auto negated = [](auto a) { return 0 - a; };
    constexpr auto magnitude = [](auto a) { return a >> (8 * sizeof(a) - 1) != 0 ? 0 - a : a; };
    const bool abs = op == "abs";
    if (bytes_of(t) == 2) in.execute = abs ? &unary<uint16_t, magnitude> : &unary<uint16_t, negated>;
    if (bytes_of(t) == 4) in.execute = abs ? &unary<uint32_t, magnitude> : &unary<uint32_t, negated>;
    if (bytes_of(t) == 8) in.execute = abs ? &unary<uint64_t, magnitude> : &unary<uint64_t, negated>;
  }
  if (op == "mul" && is_wide) {
    if (t == Type::u16) in.execute = &widened<uint16_t, uint32_t, kWideTimesUnsigned>;
    if (t == Type::s16) in.execute = &widened<int16_t, int32_t, kWideTimes>;
    if (t == Type::u32) in.execute = &widened<uint32_t, uint64_t, kWideTimesUnsigned>;
    if (t == Type::s32) in.execute = &widened<int32_t, int64_t, kWideTimes>;
  } else if (op == "mul") {
    in.execute = high ? whole<kHigh>(t) : modular<kTimes>(t);
  }
  if (op == "mad" && is_wide) {
    if (t == Type::u16) in.execute = &ternary<uint16_t, uint32_t, kWideSumUnsigned>;
    if (t == Type::s16) in.execute = &ternary<int16_t, int32_t, kWideSum>;
    if (t == Type::u32) in.execute = &ternary<uint32_t, uint64_t, kWideSumUnsigned>;
    if (t == Type::s32) in.execute = &ternary<int32_t, int64_t, kWideSum>;
  } else if (op == "mad" && !high) {
    if (bytes_of(t) == 2) in.execute = &ternary<uint16_t, uint16_t, kWideSumUnsigned>;
    if (bytes_of(t) == 4) in.execute = &ternary<uint32_t, uint32_t, kWideSumUnsigned>;
    if (bytes_of(t) == 8) in.execute = &ternary<uint64_t, uint64_t, kWideSumUnsigned>;
  } else if (op == "mad") {
    constexpr auto sum = [](auto a, auto b, auto c) { return static_cast<decltype(c)>(kHigh(a, b) + c); };
    if (t == Type::u32) in.execute = &ternary<uint32_t, uint32_t, sum>;
    if (t == Type::s32) in.execute = &ternary<int32_t, uint32_t, sum>;
    if (t == Type::u64) in.execute = &ternary<uint64_t, uint64_t, sum>;
    if (t == Type::s64) in.execute = &ternary<int64_t, uint64_t, sum>;
  }
}

// ---- floats

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
template <class T>
T saturated(T x) {
  return std::isnan(x) ? T{0} : std::fmin(T{1}, std::fmax(T{0}, x));
}

// With what modifiers ask: subnormal numbers as zeros, results in [0, 1].
template <class T, auto op>
Outcome unary_with(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  const bool flush = (step.in.a & kFlush) != 0, saturate = (step.in.a & kSaturate) != 0;
  for_lanes(step.lanes, [&](int l) {
    T x = as<T>(a[l]);
    if constexpr (sizeof(T) == 4) x = flush ? flushed(x) : x;
    T y = static_cast<T>(op(x));
    if constexpr (sizeof(T) == 4) y = flush ? flushed(y) : y;
    out[l] = bits_of<T>(saturate ? saturated(y) : y);
  });
  return Outcome::done;
}

template <class T, auto op>
Outcome binary_with(const Step& step) {
  const Values a(step, 1), b(step, 2);
  uint64_t* out = result(step, 0);
  const bool flush = (step.in.a & kFlush) != 0, saturate = (step.in.a & kSaturate) != 0;
  for_lanes(step.lanes, [&](int l) {
    T x = as<T>(a[l]), y = as<T>(b[l]);
    if constexpr (sizeof(T) == 4) x = flush ? flushed(x) : x, y = flush ? flushed(y) : y;
    T z = static_cast<T>(op(x, y));
    if constexpr (sizeof(T) == 4) z = flush ? flushed(z) : z;
    out[l] = bits_of<T>(saturate ? saturated(z) : z);
  });
  return Outcome::done;
}

template <class T>
Outcome fused_with(const Step& step) {
  const Values a(step, 1), b(step, 2), c(step, 3);
  uint64_t* out = result(step, 0);
  constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  const int mode = kModes[step.in.b];
  const bool saturate = (step.in.a & kSaturate) != 0;
  if (mode != FE_TONEAREST) std::fesetround(mode);
  for_lanes(step.lanes, [&](int l) {
    const volatile T x = as<T>(a[l]), y = as<T>(b[l]), z = as<T>(c[l]);  // so that nothing is computed outside the mode
    const volatile T sum = std::fma(x, y, z);
    const T got = sum;
    out[l] = bits_of<T>(saturate ? saturated(got) : got);
  });
  if (mode != FE_TONEAREST) std::fesetround(FE_TONEAREST);
  return Outcome::done;
}

template <auto op>
Execute float_unary(const Instruction& in) {
  if (in.type == Type::f32) return in.a != 0 ? &unary_with<float, op> : &unary<float, op>;
  if (in.type == Type::f64 && in.a == 0) return &unary<double, op>;
  return nullptr;
}
template <auto op>
Execute float_binary(const Instruction& in) {
  if (in.type == Type::f32) return in.a != 0 ? &binary_with<float, op> : &binary<float, op>;
  if (in.type == Type::f64 && in.a == 0) return &binary<double, op>;
  return nullptr;
}

constexpr auto kSumOfProduct = [](auto a, auto b, auto c) { return std::fma(a, b, c); };

void floats(Form& form, Instruction& in, std::string_view op) {
  if (form.take("ftz")) in.a |= kFlush;
  if (form.take("sat")) in.a |= kSaturate;
  const bool approximate = form.take("approx");
  in.b = approximate ? 0 : form.take_one({"rn", "rz", "rm", "rp"}, 0);
  if (op == "fma" || op == "mad") {
    const bool plain = in.a == 0 && in.b == 0;
    if ((in.a & kFlush) != 0) return;
    if (in.type == Type::f32) in.execute = plain ? &ternary<float, float, kSumOfProduct> : &fused_with<float>;
    if (in.type == Type::f64) in.execute = plain ? &ternary<double, double, kSumOfProduct> : &fused_with<double>;
    return;
  }
  if (in.b != 0) return;
  if (op == "add") in.execute = float_binary<[](auto a, auto b) { return a + b; }>(in);
  if (op == "sub") in.execute = float_binary<[](auto a, auto b) { return a - b; }>(in);
  if (op == "mul") in.execute = float_binary<[](auto a, auto b) { return a * b; }>(in);
  if (op == "div") in.execute = float_binary<[](auto a, auto b) { return a / b; }>(in);
  // the number, where one of them is NaN
  if (op == "min") in.execute = float_binary<[](auto a, auto b) { return std::fmin(a, b); }>(in);
  if (op == "max") in.execute = float_binary<[](auto a, auto b) { return std::fmax(a, b); }>(in);
  if (op == "copysign") in.execute = float_binary<[](auto a, auto b) { return std::copysign(b, a); }>(in);
  if (op == "abs") in.execute = float_unary<[](auto a) { return std::fabs(a); }>(in);
  if (op == "neg") in.execute = float_unary<[](auto a) { return -a; }>(in);
  if (op == "rcp") in.execute = float_unary<[](auto a) { return 1 / a; }>(in);
  if (op == "sqrt") in.execute = float_unary<[](auto a) { return std::sqrt(a); }>(in);
  if (op == "rsqrt" && approximate) in.execute = float_unary<[](auto a) { return 1 / std::sqrt(a); }>(in);
  if (in.type != Type::f32 || !approximate) return;
  if (op == "ex2") in.execute = float_unary<[](auto a) { return std::exp2(a); }>(in);
  if (op == "lg2") in.execute = float_unary<[](auto a) { return std::log2(a); }>(in);
  if (op == "tanh") in.execute = float_unary<[](auto a) { return std::tanh(a); }>(in);
}

}  // namespace

void arithmetic(Form& form, Instruction& in) {
  in.type = form.take_type();
  if (is_float(in.type)) {
    floats(form, in, form.opcode());
  } else if (in.type != Type::none) {
    whole_numbers(form, in, form.opcode());
  }
}

}  // namespace ptx
