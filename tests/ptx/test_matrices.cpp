// Tiles of a warp and of a warp group against loops in double: ldmatrix, stmatrix, mma.sync, and wgmma with every
// swizzle and both orders of its operands.
#include "halves.h"
#include "snippet.h"

using namespace snippet;

static void matrices_go_to_fragments_and_back() {
  Device<uint16_t> in(4 * 64), out(4 * 64);
  for (size_t i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(i);
  // Lane l gives row l of the four matrices, in shared memory as in device memory.
  const auto text = [](const std::string& load, const std::string& store) {
    return kernel(R"(.shared .align 16 .b8 tiles[512]; .shared .align 16 .b8 back[512];
      mov.u32 %r1, tiles; mad.lo.u32 %r2, %r0, 16, %r1; mad.wide.u32 %d2, %r0, 16, %d0; ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d2];
      st.shared.v4.u32 [%r2], {%r3, %r4, %r5, %r6}; bar.warp.sync -1;
      ldmatrix.sync.aligned.m8n8.x4)" +
                      load + R"(.shared.b16 {%r10, %r11, %r12, %r13}, [%r2];
      mov.u32 %r7, back; mad.lo.u32 %r7, %r0, 16, %r7; stmatrix.sync.aligned.m8n8.x4)" +
                      store +
                      R"(.shared.b16 [%r7], {%r10, %r11, %r12, %r13};
      bar.warp.sync -1; ld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%r7]; mad.wide.u32 %d2, %r0, 16, %d1; st.global.v4.u32 [%d2], {%r3, %r4, %r5, %r6};)",
                  2);
  };
  for (const bool load : {false, true}) {
    for (const bool store : {false, true}) {
      CHECK_PASSES(run(text(load ? ".trans" : "", store ? ".trans" : ""), {in.data(), out.data()}));
      for (size_t i = 0; i < 256; ++i) {
        const size_t want = load == store ? i : i / 64 * 64 + i % 8 * 8 + i % 64 / 8;
        CHECK(out[i] == want, "trans %d %d: %zu is %u", load, store, i, out[i]);
      }
    }
  }
  // And where the fragments are: lane l has columns 2(l % 4) and the next of row l / 4.
  Device<uint32_t> fragments(32);
  const std::string where = kernel(R"(.shared .align 16 .b8 tile[128];
    mov.u32 %r1, tile; and.b32 %r2, %r0, 7; mad.lo.u32 %r2, %r2, 16, %r1; mad.wide.u32 %d2, %r0, 16, %d0; setp.lt.u32 %p1, %r0, 8;
    @%p1 ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d2]; @%p1 st.shared.v4.u32 [%r2], {%r3, %r4, %r5, %r6}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r2]; mad.wide.u32 %d2, %r0, 4, %d1; st.global.u32 [%d2], %r7;)",
                                   2);
  CHECK_PASSES(run(where, {in.data(), fragments.data()}));
  for (uint32_t l = 0; l < 32; ++l) {
    const uint32_t first = l / 4 * 8 + l % 4 * 2;
    CHECK(fragments[l] == (first | (first + 1) << 16), "lane %u has %x", l, fragments[l]);
  }
}

static void mma() {
  for (const bool bf16 : {true, false}) {
    const auto half = [&](double x) {
      return bf16 ? ptx::to_bf16(static_cast<float>(x)) : ptx::to_f16(static_cast<float>(x));
    };
    // a [16, 16] by rows, b [16, 8] by columns, c [16, 8]: small whole numbers, whose sums are exact.
    Device<uint16_t> a(256), b(128);
    Device<float> c(128), d(128);
    testing::Random random(2);
    double av[256], bv[128];
    for (size_t i = 0; i < 256; ++i) av[i] = static_cast<double>(random.below(17) - 8), a[i] = half(av[i]);
    for (size_t i = 0; i < 128; ++i)
      bv[i] = static_cast<double>(random.below(17) - 8), b[i] = half(bv[i]),
      c[i] = static_cast<float>(random.below(100));
    // The fragments of PTX ISA 9.7.14.5.8, loaded by hand.
    const std::string type = bf16 ? "bf16" : "f16";
    const std::string text =
        kernel(R"(
      shr.u32 %r1, %r0, 2; and.b32 %r2, %r0, 3; shl.b32 %r2, %r2, 1;
      mad.lo.u32 %r3, %r1, 16, %r2; mad.wide.u32 %d4, %r3, 2, %d0;
      ld.global.u32 %r10, [%d4]; ld.global.u32 %r11, [%d4+256]; ld.global.u32 %r12, [%d4+16]; ld.global.u32 %r13, [%d4+272];
      mad.wide.u32 %d4, %r3, 2, %d1; ld.global.u32 %r14, [%d4]; ld.global.u32 %r15, [%d4+16];
      mad.lo.u32 %r3, %r1, 8, %r2; mul.wide.u32 %d5, %r3, 4; add.u64 %d6, %d2, %d5; add.u64 %d7, %d3, %d5;
      ld.global.v2.f32 {%f0, %f1}, [%d6]; ld.global.v2.f32 {%f2, %f3}, [%d6+256];
      mma.sync.aligned.m16n8k16.row.col.f32.)" +
                   type + "." + type +
                   R"(.f32 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f0, %f1, %f2, %f3};
      st.global.v2.f32 [%d7], {%f0, %f1}; st.global.v2.f32 [%d7+256], {%f2, %f3};)",
               4);
    CHECK_PASSES(run(text, {a.data(), b.data(), c.data(), d.data()}));
    for (size_t row = 0; row < 16; ++row) {
      for (size_t column = 0; column < 8; ++column) {
        double want = c[row * 8 + column];
        for (size_t k = 0; k < 16; ++k) want += av[row * 16 + k] * bv[column * 16 + k];
        CHECK(d[row * 8 + column] == want, "%s [%zu, %zu] = %g, should be %g", type.c_str(), row, column,
              d[row * 8 + column], want);
      }
    }
  }
}

// Of TF32 the last 13 bits are not read, and cvt.rna rounds ties away from zero.
static void mma_of_tf32() {
  Device<float> a(128), b(64), d(128), rounded(32);
  testing::Random random(3);
  double av[128], bv[64];
  const auto dirty = [](double x) { return ptx::as<float>(ptx::bits_of(static_cast<float>(x)) | 0x1fff); };
  for (size_t i = 0; i < 128; ++i) av[i] = static_cast<double>(random.below(17) - 8), a[i] = dirty(av[i]);
  for (size_t i = 0; i < 64; ++i) bv[i] = static_cast<double>(random.below(17) - 8), b[i] = dirty(bv[i]);
  const std::string text = kernel(R"(
    shr.u32 %r1, %r0, 2; and.b32 %r2, %r0, 3; mad.lo.u32 %r3, %r1, 8, %r2; mul.wide.u32 %d5, %r3, 4; add.u64 %d6, %d0, %d5; add.u64 %d7, %d1, %d5;
    ld.global.u32 %r10, [%d6]; ld.global.u32 %r11, [%d6+256]; ld.global.u32 %r12, [%d6+16]; ld.global.u32 %r13, [%d6+272];
    ld.global.u32 %r14, [%d7]; ld.global.u32 %r15, [%d7+16]; mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0, %f1, %f2, %f3}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f0, %f1, %f2, %f3};
    shl.b32 %r2, %r2, 1; mad.lo.u32 %r3, %r1, 8, %r2; mad.wide.u32 %d8, %r3, 4, %d2; st.global.v2.f32 [%d8], {%f0, %f1}; st.global.v2.f32 [%d8+256], {%f2, %f3};
    mov.u32 %r4, 0x3f800fff; add.u32 %r4, %r4, %r0; mov.b32 %f4, %r4; cvt.rna.tf32.f32 %r5, %f4; mad.wide.u32 %d9, %r0, 4, %d3; st.global.u32 [%d9], %r5;)",
                                  4);
  CHECK_PASSES(run(text, {a.data(), b.data(), d.data(), rounded.data()}));
  for (size_t row = 0; row < 16; ++row) {
    for (size_t column = 0; column < 8; ++column) {
      double want = 0;
      for (size_t k = 0; k < 8; ++k) want += av[row * 8 + k] * bv[column * 8 + k];
      CHECK(d[row * 8 + column] == want, "tf32 [%zu, %zu] = %g, should be %g", row, column, d[row * 8 + column], want);
    }
  }
  for (size_t i = 0; i < 32; ++i)
    CHECK(ptx::bits_of(rounded[i]) == (i == 0 ? 0x3f800000 : 0x3f802000), "%zu: %a", i, rounded[i]);
}

// A tile [outer, 16] in the canonical layout of a swizzle: what a descriptor of it says, and where an element is (PTX
// ISA 9.7.15.5).
struct Tile {
  int outer;
  bool transposed;                            // outer runs fastest
  int swizzle;                                // 0 none, 1 of 32, 2 of 64, 3 of 128 bytes
  int width() const { return 8 << swizzle; }  // elements of a row of the swizzled atom

  uint32_t bytes() const {
    return static_cast<uint32_t>(outer) * 16 * 2 *
           (transposed || swizzle < 2 ? 1 : static_cast<uint32_t>(width()) / 16);
  }
  uint32_t at(int o, int k) const {
    uint32_t byte;
    if (swizzle == 0) {  // cores of 8 x 8, one behind another: first those along k, then along the outer side
      const int core = o / 8 * 2 + k / 8, within = transposed ? k % 8 * 8 + o % 8 : o % 8 * 8 + k % 8;
      return static_cast<uint32_t>(core * 128 + within * 2);
    }
    if (transposed) {  // atoms of `width` outer elements by 8 of k: two along k, then on along the outer side
      const int atom = o / width() * 2 + k / 8;
      byte = static_cast<uint32_t>(atom * width() * 16 + k % 8 * width() * 2 + o % width() * 2);
    } else {  // rows of `width` elements of k, of which a product uses 16
      byte = static_cast<uint32_t>(o * width() * 2 + k * 2);
    }
    const uint32_t mask = (1u << swizzle) - 1;
    return byte ^ (byte / 128 & mask) * 16;
  }
  uint64_t descriptor() const {  // without the start
    uint32_t leading = 1, stride;
    if (swizzle == 0) {
      leading = 128, stride = 256;
    } else if (transposed) {
      leading = static_cast<uint32_t>(2 * width() * 16), stride = static_cast<uint32_t>(width() * 16);
    } else {
      stride = static_cast<uint32_t>(width() * 16);
    }
    constexpr uint64_t kModes[] = {0, 3, 2, 1};
    return uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 | kModes[swizzle] << 62;
  }
};

static void wgmma(int columns, bool ta, bool tb, int sa, int sb, bool bf16, int sign) {
  const Tile a{64, ta, sa}, b{columns, tb, sb};
  const auto half = [&](double x) {
    return bf16 ? ptx::to_bf16(static_cast<float>(x)) : ptx::to_f16(static_cast<float>(x));
  };
  Device<uint16_t> am(a.bytes() / 2), bm(b.bytes() / 2);
  Device<float> d(64 * static_cast<size_t>(columns));
  for (size_t i = 0; i < am.size(); ++i) am[i] = 0x7fff;
  for (size_t i = 0; i < bm.size(); ++i) bm[i] = 0x7fff;
  testing::Random random(static_cast<uint64_t>(columns + 2 * ta + sa));
  std::vector<double> av(64 * 16), bv(static_cast<size_t>(columns) * 16);
  for (int o = 0; o < 64; ++o) {
    for (int k = 0; k < 16; ++k)
      am[a.at(o, k) / 2] = half(av[static_cast<size_t>(o * 16 + k)] = static_cast<double>(random.below(17) - 8));
  }
  for (int o = 0; o < columns; ++o) {
    for (int k = 0; k < 16; ++k)
      bm[b.at(o, k) / 2] = half(bv[static_cast<size_t>(o * 16 + k)] = static_cast<double>(random.below(17) - 8));
  }
  std::string list;
  for (int i = 0; i < columns / 2; ++i) list += (i == 0 ? "%f" : ", %f") + std::to_string(i);
  const std::string type = bf16 ? "bf16" : "f16", n = std::to_string(columns);
  const auto copy = [](const std::string& from, const std::string& to, uint32_t bytes) {  // by 128 threads
    return "mov.u32 %r2, %r0; C" + to + ": setp.ge.u32 %p1, %r2, " + std::to_string(bytes / 4) + "; @%p1 bra D" + to +
           "; mad.wide.u32 %d4, %r2, 4, " + from + "; ld.global.u32 %r3, [%d4]; mad.lo.u32 %r4, %r2, 4, " + to +
           "; st.shared.u32 [%r4], %r3; add.u32 %r2, %r2, 128; bra C" + to + "; D" + to + ":\n";
  };
  const auto descriptor = [](const std::string& of, const std::string& to, const Tile& tile) {
    return "mov.u32 %r5, " + of + "; shr.u32 %r5, %r5, 4; cvt.u64.u32 " + to + ", %r5; or.b64 " + to + ", " + to +
           ", " + std::to_string(tile.descriptor()) + ";\n";
  };
  const std::string product =
      "wgmma.mma_async.sync.aligned.m64n" + n + "k16.f32." + type + "." + type + " {" + list + "}, %d5, %d6, ";
  const std::string flags =
      ", 1, " + std::to_string(sign) + ", " + std::to_string(ta) + ", " + std::to_string(tb) + ";";
  // Once instead of what the registers hold, once more added to that.
  std::string body =
      ".shared .align 1024 .b8 a[" + std::to_string(a.bytes()) + "]; .shared .align 1024 .b8 b[" +
      std::to_string(b.bytes()) + "];\n" + copy("%d0", "a", a.bytes()) + copy("%d1", "b", b.bytes()) +
      "fence.proxy.async.shared::cta; bar.sync 0;\n" + descriptor("a", "%d5", a) + descriptor("b", "%d6", b) +
      "setp.ne.u32 %p2, 0, 0; setp.ne.u32 %p3, 1, 0; wgmma.fence.sync.aligned; " + product + "%p2" + flags + product +
      "%p3" + flags + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n" +
      "shr.u32 %r6, %r0, 5; mul.lo.u32 %r6, %r6, 16; and.b32 %r7, %r0, 31; shr.u32 %r8, %r7, 2; add.u32 %r6, %r6, %r8; "
      "and.b32 %r7, %r7, 3; "
      "mul.lo.u32 %r7, %r7, 2; mad.lo.u32 %r6, %r6, " +
      n + ", %r7; mad.wide.u32 %d4, %r6, 4, %d2;\n";
  for (int i = 0; i < columns / 2; ++i) {
    body += "st.global.f32 [%d4+" + std::to_string(4 * (i / 2 % 2 * 8 * columns + i / 4 * 8 + i % 2)) + "], %f" +
            std::to_string(i) + ";";
  }
  CHECK_PASSES(
      run_in_all_orders([&] { return run(kernel(body, 3), {am.data(), bm.data(), d.data()}, {.block = {128}}); }, 1));
  for (size_t row = 0; row < 64; ++row) {
    for (size_t column = 0; column < static_cast<size_t>(columns); ++column) {
      double want = 0;
      for (size_t k = 0; k < 16; ++k) want += 2 * sign * av[row * 16 + k] * bv[column * 16 + k];
      CHECK(d[row * static_cast<size_t>(columns) + column] == want,
            "n%d %d%d swizzles %d %d %s: [%zu, %zu] = %g, should be %g", columns, ta, tb, sa, sb, type.c_str(), row,
            column, d[row * static_cast<size_t>(columns) + column], want);
    }
  }
}

int main() {
  matrices_go_to_fragments_and_back();
  mma();
  mma_of_tf32();
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      for (int swizzle = 0; swizzle < 4; ++swizzle)
        wgmma(64, ta, tb, swizzle, 3 - swizzle, swizzle != 1, swizzle == 2 ? -1 : 1);
    }
  }
  for (const int columns : {8, 24, 128, 256}) wgmma(columns, false, false, 3, 3, true, 1);
  return testing::finish();
}
