// cvt, PTX ISA 9.7.9.21: between whole numbers, floats and halves.
#include <cmath>

#include "form.h"
#include "halves.h"

namespace ptx {
namespace {

enum Rounding { kNone, kNearestInteger, kZeroInteger, kDownInteger, kUpInteger };  // Instruction::a
constexpr int kSaturate = 1;                                                       // Instruction::b

double decoded(uint64_t bits, Type type) {
  switch (type) {
    case Type::f64: return as<double>(bits);
    case Type::f32: return as<float>(bits);
    case Type::f16: return from_f16(static_cast<uint16_t>(bits));
    case Type::bf16: return from_bf16(static_cast<uint16_t>(bits));
    default:
      return is_signed(type) ? static_cast<double>(static_cast<int64_t>(extended(bits, type)))
                             : static_cast<double>(extended(bits, type));
  }
}

uint64_t encoded(double value, Type type) {
  switch (type) {
    case Type::f64: return bits_of(value);
    case Type::f32: return bits_of(static_cast<float>(value));
    case Type::f16: return to_f16(static_cast<float>(value));
    default: return to_bf16(static_cast<float>(value));
  }
}

double whole(double value, int rounding) {
  switch (rounding) {
    case kNearestInteger: return std::nearbyint(value);
    case kZeroInteger: return std::trunc(value);
    case kDownInteger: return std::floor(value);
    case kUpInteger: return std::ceil(value);
    default: return value;
  }
}

struct Source {  // the type of what is converted does not fit into Instruction::type, which is the result's
  static Type of(const Instruction& in) { return static_cast<Type>(in.b >> 8); }
};

Outcome float_to_float(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  const Type from = Source::of(step.in), to = step.in.type;
  for_lanes(step.lanes, [&](int l) {
    double value = whole(decoded(a[l], from), step.in.a);
    if ((step.in.b & kSaturate) != 0) value = std::isnan(value) ? 0 : std::fmin(1, std::fmax(0, value));
    out[l] = encoded(value, to);
  });
  return Outcome::done;
}

Outcome float_to_whole(const Step& step) {  // what does not fit becomes the nearest that does, NaN zero
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  const Type from = Source::of(step.in), to = step.in.type;
  const int bits = 8 * bytes_of(to);
  for_lanes(step.lanes, [&](int l) {
    const double value = whole(decoded(a[l], from), step.in.a);
    uint64_t got;
    if (std::isnan(value)) {
      got = 0;
    } else if (is_signed(to)) {
      const double bound = std::ldexp(1, bits - 1);
      got = value >= bound   ? (uint64_t{1} << (bits - 1)) - 1
            : value < -bound ? uint64_t{1} << (bits - 1)
                             : static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
      got = value >= std::ldexp(1, bits) ? ~uint64_t{0} : value <= 0 ? 0 : static_cast<uint64_t>(value);
    }
    out[l] = truncated(got, bytes_of(to));
  });
  return Outcome::done;
}

Outcome whole_to_float(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  const Type from = Source::of(step.in), to = step.in.type;
  for_lanes(step.lanes, [&](int l) {
    const uint64_t value = extended(a[l], from);
    if (to == Type::f32) {  // at once: through fp64 it would be rounded twice
      out[l] = bits_of(is_signed(from) ? static_cast<float>(static_cast<int64_t>(value)) : static_cast<float>(value));
    } else {
      out[l] = encoded(decoded(a[l], from), to);
    }
  });
  return Outcome::done;
}

Outcome whole_to_whole(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  const Type from = Source::of(step.in);
  const int bytes = bytes_of(step.in.type);
  for_lanes(step.lanes, [&](int l) { out[l] = truncated(extended(a[l], from), bytes); });
  return Outcome::done;
}

Outcome pair(const Step& step) {  // the first above the second
  const Values a(step, 1), b(step, 2);
  uint64_t* out = result(step, 0);
  const auto half = step.in.type == Type::bf16x2 ? to_bf16 : to_f16;
  for_lanes(step.lanes,
            [&](int l) { out[l] = static_cast<uint64_t>(half(as<float>(a[l]))) << 16 | half(as<float>(b[l])); });
  return Outcome::done;
}

Outcome to_tf32(const Step& step) {
  const Values a(step, 1);
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = ptx::to_tf32(static_cast<uint32_t>(a[l])); });
  return Outcome::done;
}

}  // namespace

void conversion(Form& form, Instruction& in) {
  const bool saturate = form.take("sat"), nearest = form.take("rn"), away = form.take("rna");
  in.a = form.take_one({"rni", "rzi", "rmi", "rpi"}) + 1;
  in.type = form.take_type();
  const Type from = form.take_type();
  if (from == Type::none) return;
  in.b = (saturate ? kSaturate : 0) | static_cast<int>(from) << 8;
  const bool pairs = in.type == Type::bf16x2 || in.type == Type::f16x2;
  if (away || in.type == Type::tf32 || from == Type::tf32) {
    if (away && in.type == Type::tf32 && from == Type::f32 && !saturate) in.execute = &to_tf32;
  } else if (pairs) {
    if (from == Type::f32 && nearest && !saturate && in.operands.size() == 3) in.execute = &pair;
  } else if (is_float(from)) {
    if (!is_float(in.type) && in.a == kNone) return;  // it must say how
    in.execute = is_float(in.type) ? &float_to_float : &float_to_whole;
  } else if (!saturate && in.a == kNone) {
    in.execute = is_float(in.type) ? &whole_to_float : &whole_to_whole;
  }
}

}  // namespace ptx
