// Conversions of every 16-bit value and of random ones, and the elementary functions against std:: in double.
#include "numeric.h"

#include "testing.h"

using namespace testing;
namespace cpu = ummrm::cpu;

static bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

static void conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float b = cpu::load(cpu::bf16{half}), f = cpu::load(cpu::f16{half});
    CHECK(same(b, decode16(half, 8, 7)), "bf16 %04x reads as %g", bits, b);
    CHECK(same(f, decode16(half, 5, 10)), "f16 %04x reads as %g", bits, f);
    CHECK(std::isnan(b) || cpu::store<cpu::bf16>(b).bits == half, "bf16 %04x does not survive", bits);
    CHECK(std::isnan(f) || cpu::store<cpu::f16>(f).bits == half, "f16 %04x does not survive", bits);
    // Halfway to the next value, and one step either side of it.
    for (int step = -1; step <= 1; ++step) {
      const float near_b = std::bit_cast<float>((bits << 16) + 0x8000u + static_cast<uint32_t>(step));
      CHECK(std::isnan(near_b) || cpu::store<cpu::bf16>(near_b).bits == encode16(near_b, 8, 7), "bf16 of %a", near_b);
      if (!std::isfinite(f)) continue;
      const float near_f = std::bit_cast<float>(std::bit_cast<uint32_t>(f) + 0x1000u + static_cast<uint32_t>(step));
      CHECK(cpu::store<cpu::f16>(near_f).bits == encode16(near_f, 5, 10), "f16 of %a", near_f);
    }
  }
  Random random(1);
  for (int i = 0; i < 2000000; ++i) {
    const float x = std::bit_cast<float>(random.bits());
    const float b = cpu::load(cpu::store<cpu::bf16>(x)), f = cpu::load(cpu::store<cpu::f16>(x));
    CHECK(same(b, decode16(encode16(x, 8, 7), 8, 7)), "bf16 of %a is %a", x, b);
    CHECK(same(f, decode16(encode16(x, 5, 10), 5, 10)), "f16 of %a is %a", x, f);
  }
}

static void functions() {
  double worst = 0;
  for (double x = -110; x < 95; x += 1.3e-4) {
    const auto argument = static_cast<float>(x);
    const double want = std::exp(static_cast<double>(argument)), got = cpu::exp_of(argument);
    if (want > std::numeric_limits<float>::max()) {
      CHECK(std::isinf(got), "exp(%g) = %g", argument, got);
      continue;
    }
    const double unit = std::max(std::ldexp(1.0, std::max(std::ilogb(want), -126) - 23), 0x1p-149);
    worst = std::max(worst, std::fabs(got - want) / unit);
  }
  CHECK(worst <= 2, "exp is off by %.2f units in the last place", worst);
  CHECK(std::isnan(cpu::exp_of(NAN)) && cpu::exp_of(-INFINITY) == 0 && std::isinf(cpu::exp_of(INFINITY)),
        "exp's special values");
  CHECK(cpu::exp_of(0.f) == 1, "exp(0) = %g", cpu::exp_of(0.f));

  worst = 0;
  for (double z = -15; z < 15; z += 1e-4) {
    const auto argument = static_cast<float>(z);
    const double want = 0.5 * std::erfc(-argument / std::sqrt(2.0));
    const double got = cpu::normal_cdf(argument, cpu::exp_of(-0.5f * argument * argument));
    worst = std::max(worst, std::fabs(got - want));
  }
  CHECK(worst <= 2e-7, "the normal distribution function is off by %.3g", worst);
  CHECK(cpu::sigmoid_of(-200.f) == 0 && cpu::sigmoid_of(200.f) == 1, "sigmoid saturates");
}

static void sums() {
  Random random(2);
  for (int64_t count : {0, 1, 31, 32, 33, 500, 512}) {
    std::vector<float> values(count);
    double want = 0, magnitude = 0;
    for (float& v : values) {
      v = static_cast<float>(random.normal());
      want += v;
      magnitude += std::fabs(v);
    }
    const double got = cpu::lane_sum(values.data(), count);
    CHECK(std::fabs(got - want) <= 24 * 0x1p-24 * magnitude, "sum of %lld: %g, expected %g",
          static_cast<long long>(count), got, want);
  }
}

int main() {
  conversions();
  functions();
  sums();
  return finish();
}
