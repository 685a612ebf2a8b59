// Lanes, warps, blocks and clusters: divergence, what lanes do together, barriers, clusters, memory, and what is said
// of a program that breaks the rules.
#include "snippet.h"

using namespace snippet;

static void lanes_diverge_and_meet() {
  Device<uint32_t> out(32);
  // Lane n goes n times around; then all add up what they counted.
  const std::string text = kernel(R"(
    mov.u32 %r1, 0;
    L: setp.ge.u32 %p1, %r1, %r0; @%p1 bra OUT; add.u32 %r1, %r1, 1; bra.uni L;
    OUT: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; sub.s32 %r3, %r1, %r2;
    mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d1, %d0; st.global.u32 [%d1], %r3;)",
                                  1);
  CHECK_PASSES(run_in_all_orders([&] { return run(text, {out.data()}); }));
  for (uint32_t i = 0; i < 32; ++i) CHECK(out[i] == (i % 2 == 0 ? ~0u : 1u), "lane %u has %u", i, out[i]);
}

static void collectives() {
  Device<uint32_t> out(32 * 12);
  const std::string text = kernel(R"(
    mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d1, %d0;
    mul.lo.u32 %r1, %r0, 10;
    shfl.sync.up.b32 %r2|%p1, %r1, 3, 0, -1; st.global.u32 [%d1], %r2; selp.u32 %r3, 1, 0, %p1; st.global.u32 [%d1+128], %r3;
    shfl.sync.down.b32 %r2, %r1, 3, 31, -1; st.global.u32 [%d1+256], %r2;
    shfl.sync.idx.b32 %r2, %r1, 2, 0x181f, -1; st.global.u32 [%d1+384], %r2;
    setp.gt.u32 %p2, %r0, 15; vote.sync.ballot.b32 %r2, %p2, -1; st.global.u32 [%d1+512], %r2;
    vote.sync.any.pred %p3, %p2, -1; vote.sync.all.pred %p4, %p2, -1; selp.u32 %r2, 2, 0, %p3; selp.u32 %r3, 1, 0, %p4;
    or.b32 %r2, %r2, %r3; st.global.u32 [%d1+640], %r2;
    and.b32 %r4, %r0, 3; match.any.sync.b32 %r2, %r4, -1; st.global.u32 [%d1+768], %r2;
    elect.sync %r2|%p5, -1; selp.u32 %r3, 1, 0, %p5; st.global.u32 [%d1+896], %r3;
    redux.sync.add.u32 %r2, %r0, -1; st.global.u32 [%d1+1024], %r2;
    setp.lt.u32 %p6, %r0, 5; @!%p6 bra REST; activemask.b32 %r5; st.global.u32 [%d1+1152], %r5;
    REST: bar.warp.sync -1; shfl.sync.idx.b32 %r2, %r1, %r4, 31, -1; st.global.u32 [%d1+1280], %r2;)",
                                  1);
  CHECK_PASSES(run(text, {out.data()}));
  for (uint32_t i = 0; i < 32; ++i) {
    CHECK(out[i] == (i < 3 ? i : i - 3) * 10 && out[32 + i] == (i >= 3), "up: %u", out[i]);
    CHECK(out[64 + i] == (i + 3 > 31 ? i : i + 3) * 10, "down: %u", out[64 + i]);
    CHECK(out[96 + i] == (i / 8 * 8 + 2) * 10, "by index in segments of 8: %u", out[96 + i]);
    CHECK(out[128 + i] == 0xffff0000 && out[160 + i] == 2, "votes");
    CHECK(out[192 + i] == 0x11111111u << i % 4, "match: %x", out[192 + i]);
    CHECK(out[224 + i] == (i == 0), "elected");
    CHECK(out[256 + i] == 496, "sum: %u", out[256 + i]);
    if (i < 5) CHECK(out[288 + i] == 31, "active: %x", out[288 + i]);
    CHECK(out[320 + i] == i % 4 * 10, "by index: %u", out[320 + i]);
  }
}

static void what_lanes_may_not_do() {
  Device<uint32_t> out(32);
  const auto fault = [&](const std::string& body, unsigned threads = 32) {
    return run(kernel(body, 1), {out.data()}, {.block = {threads}});
  };
  const std::string lane = "setp.lt.u32 %p1, %r0, 16; ";
  CHECK_FAILS(fault(lane + "@%p1 bra A; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; ret; A: bar.warp.sync -1;"),
              "lanes wait for each other at different places");
  CHECK_FAILS(fault(lane + "@%p1 ret; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;"),
              "a mask of lanes with some that have ended");
  CHECK_FAILS(fault("shfl.sync.idx.b32 %r1, %r0, 0, 31, 0x55555555;"), "a lane that is not in its own mask");
  CHECK_FAILS(fault(lane + "@!%p1 ret; shfl.sync.idx.b32 %r1, %r0, 16, 31, 0xffff;"),
              "a shuffle from lane 16, which is not there");
  CHECK_FAILS(fault("trap;"), "trap at ptx line 3 (trap), block 0,0,0 warp 0");
  ptx::options.most_instructions = 100000;
  CHECK_FAILS(fault("L: ld.global.u32 %r1, [%d0]; bra L;"), "no end after 100000 instructions");
  ptx::options.most_instructions = ptx::Options().most_instructions;
}

static void barriers_of_a_block() {
  Device<uint32_t> out(128);
  // Each thread writes its own word and reads that of the opposite warp.
  const auto text = [](const std::string& barrier) {
    return kernel(R"(.shared .align 4 .b8 words[512];
      mov.u32 %r1, words; mad.lo.u32 %r2, %r0, 4, %r1; add.u32 %r3, %r0, 100; st.shared.u32 [%r2], %r3;
      )" + barrier + R"( xor.b32 %r4, %r0, 96; mad.lo.u32 %r4, %r4, 4, %r1; ld.shared.u32 %r5, [%r4];
      mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r5;)",
                  1);
  };
  const auto fault = [&](const std::string& barrier) {
    return run_in_all_orders([&] { return run(text(barrier), {out.data()}, {.block = {128}}); });
  };
  CHECK_PASSES(fault("bar.sync 0;"));
  for (uint32_t i = 0; i < 128; ++i) CHECK(out[i] == (i ^ 96) + 100, "thread %u read %u", i, out[i]);
  CHECK_PASSES(fault("barrier.sync.aligned 3, 128;"));
  CHECK_FAILS(fault(""), "is read, and nothing has written it");
  CHECK_FAILS(fault("setp.lt.u32 %p1, %r0, 64; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:"),
              "a barrier that other warps of the block wait for");
  CHECK_FAILS(fault("setp.lt.u32 %p1, %r0, 32; @!%p1 bar.sync 5, 128; bar.sync 0;"), "deadlock in k:");
  CHECK_FAILS(fault("bar.sync 0, 64;"), "nothing has written it");
  CHECK_FAILS(fault("bar.sync 16;"), "there is no barrier 16");
  CHECK_FAILS(fault("bar.sync 1, 40;"), "not whole warps");
  // Two warps produce, two consume; who arrives does not wait.
  CHECK_PASSES(fault("setp.lt.u32 %p1, %r0, 64; @%p1 bar.arrive 1, 128; @!%p1 bar.sync 1, 128; bar.sync 0;"));
  // A warp that has ended counts no more.
  CHECK_PASSES(run(kernel("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", 1), {out.data()}, {.block = {128}}));
}

static void deadlocks_are_named() {
  Device<uint32_t> out(32);
  const std::string text = kernel(
      ".shared .align 8 .b64 bar;\n mov.u32 %r1, bar; mbarrier.init.shared::cta.b64 [%r1], 2;\n"
      "L: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0; @!%p1 bra L;",
      1);
  const std::string fault = run(text, {out.data()}, {.grid = {2}});
  CHECK_FAILS(fault, "deadlock in k:");
  CHECK_FAILS(fault, "block 1,0,0 warp 0 at line 5 mbarrier.try_wait.parity.shared::cta.b64");
}

static void clusters() {
  Device<uint32_t> out(8);
  // Every block writes into the next one's shared memory.
  const auto text = [](const std::string& barrier) {
    return kernel(R"(.shared .align 4 .b32 word;
      mov.u32 %r1, word; mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, %cluster_nctarank; mov.u32 %r9, %ctaid.x;
      add.u32 %r4, %r2, 1; rem.u32 %r4, %r4, %r3; mapa.shared::cluster.u32 %r5, %r1, %r4; setp.eq.u32 %p1, %r0, 0;
      @%p1 st.shared::cluster.u32 [%r5], %r9;
      )" + barrier + R"( ld.shared.u32 %r6, [%r1]; mad.wide.u32 %d1, %r9, 4, %d0; @%p1 st.global.u32 [%d1], %r6;)",
                  1);
  };
  const Shape shape{.grid = {8}, .block = {64}, .cluster = {4}};
  const auto fault = [&](const std::string& barrier) {
    return run_in_all_orders([&] { return run(text(barrier), {out.data()}, shape); });
  };
  CHECK_PASSES(fault("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"));
  for (uint32_t i = 0; i < 8; ++i) CHECK(out[i] == i / 4 * 4 + (i + 3) % 4, "block %u got %u", i, out[i]);
  CHECK_FAILS(fault(""), "is read, and nothing has written it");
  CHECK_FAILS(
      run(kernel("mapa.shared::cluster.u32 %r1, 1024, 5; ld.shared::cluster.u32 %r2, [%r1];", 1), {out.data()}, shape),
      "a shared address of no block");
  const std::string late =
      R"(.shared .align 4 .b32 word; mov.u32 %r1, word; st.shared.u32 [%r1], %r0; mov.u32 %r2, %cluster_ctarank; barrier.cluster.arrive; barrier.cluster.wait;
      setp.eq.u32 %p1, %r2, 1; @%p1 ret; mov.u32 %r3, 2000; L: sub.u32 %r3, %r3, 1; setp.ne.u32 %p2, %r3, 0; @%p2 bra L;
      mapa.shared::cluster.u32 %r4, %r1, 1; ld.shared::cluster.u32 %r5, [%r4];)";
  CHECK_FAILS(run_in_all_orders([&] { return run(kernel(late, 1), {out.data()}, {.grid = {2}, .cluster = {2}}); }),
              "shared memory of block rank 1, which has ended");
  CHECK_FAILS(run(kernel("", 1), {out.data()}, {.grid = {3}, .cluster = {2}}), "not made of whole clusters");
}

static void memory() {
  Device<uint32_t> out(8);
  const auto fault = [&](const std::string& body, unsigned dynamic = 64) {
    return run(kernel(body, 1, ".extern .shared .align 16 .b8 dynamic[];"), {out.data()},
               {.block = {1}, .dynamic_shared = dynamic});
  };
  CHECK_PASSES(fault("st.global.u32 [%d0+28], 1;"));
  CHECK_FAILS(fault("st.global.u32 [%d0+32], 1;"), "device memory out of bounds, 4 bytes at 0x");
  CHECK_FAILS(fault("ld.global.u32 %r1, [%d0+-4];"), "device memory out of bounds");
  CHECK_FAILS(fault("st.global.v4.u32 [%d0+20], {1, 2, 3, 4};"), "a misaligned address");
  CHECK_FAILS(fault("ld.global.v2.u32 {%r1, %r2}, [%d0+28];"), "misaligned");
  CHECK_FAILS(fault("mov.u64 %d1, 0; ld.u32 %r1, [%d1];"), "device memory out of bounds");
  CHECK_PASSES(fault("mov.u32 %r1, dynamic; st.shared.u32 [%r1+60], 1; ld.shared.u32 %r2, [%r1+60];"));
  CHECK_FAILS(fault("mov.u32 %r1, dynamic; st.shared.u32 [%r1+64], 1;"), "shared memory out of bounds");
  CHECK_FAILS(fault("mov.u32 %r1, dynamic; st.shared.u32 [%r1+60], 1; ld.shared.u32 %r2, [%r1+56];"),
              "nothing has written it");
  CHECK_FAILS(fault("mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];"), "shared memory out of bounds");
  CHECK_FAILS(fault(".shared .align 4 .b8 words[100]; mov.u32 %r1, words; st.shared.u32 [%r1+96], 1; st.shared.u32 "
                    "[%r1+100], 1;"),
              "shared memory out of bounds, 4 bytes at");
  // A generic address of shared memory, there and back.
  CHECK_PASSES(
      fault("mov.u64 %d1, dynamic; cvta.shared.u64 %d2, %d1; st.u32 [%d2+4], 77; cvta.to.shared.u64 %d3, %d2; "
            "cvt.u32.u64 %r1, %d3;"
            "ld.shared.u32 %r2, [%r1+4]; st.global.u32 [%d0], %r2;"));
  CHECK(out[0] == 77, "%u", out[0]);
  // Signs of what is loaded.
  out[1] = 0x80ff8001;
  CHECK_PASSES(
      fault("ld.global.s16 %r1, [%d0+4]; st.global.u32 [%d0+8], %r1; ld.global.s8 %r1, [%d0+6]; st.global.u32 "
            "[%d0+12], %r1; ld.global.u8 %r1, [%d0+7]; st.global.u32 [%d0+16], %r1;"));
  CHECK(out[2] == 0xffff8001 && out[3] == 0xffffffff && out[4] == 0x80, "%x %x %x", out[2], out[3], out[4]);
}

static void atomics() {
  Device<uint32_t> out(16);
  Device<uint32_t> seen(64);
  for (size_t i = 0; i < 16; ++i) out[i] = i == 5 ? 3 : 0;
  out[2] = 0xffffffff;
  out[4] = 0x3f800000;
  out[9] = 0xff, out[10] = 0;
  const std::string text = kernel(R"(
    mov.u32 %r7, %ctaid.x; mad.lo.u32 %r8, %r7, 32, %r0; atom.global.add.u32 %r1, [%d0], 1; mad.wide.u32 %d2, %r1, 4, %d1;
    st.global.u32 [%d2], %r8; red.global.max.u32 [%d0+4], %r8; atom.global.min.u32 %r2, [%d0+8], %r8; mov.f32 %f1, 0f3f000000;
    atom.global.add.f32 %f2, [%d0+16], %f1; atom.global.exch.b32 %r3, [%d0+12], %r8; atom.global.cas.b32 %r4, [%d0+20], 3, %r8;
    atom.global.inc.u32 %r5, [%d0+24], 6; red.global.xor.b32 [%d0+28], 1; red.global.or.b32 [%d0+32], %r8; red.global.and.b32 [%d0+36], 0x70;
    atom.global.dec.u32 %r5, [%d0+40], 2;)",
                                  2);
  CHECK_PASSES(run(text, {out.data(), seen.data()}, {.grid = {2}}));
  std::vector<bool> once(64);
  for (size_t i = 0; i < 64; ++i) {
    CHECK(seen[i] < 64 && !once[seen[i]], "ticket %zu", i);
    if (seen[i] < 64) once[seen[i]] = true;
  }
  CHECK(out[0] == 64 && out[1] == 63 && out[2] == 0 && out[3] < 64 && ptx::as<float>(out[4]) == 33, "%u %u %u %x",
        out[0], out[1], out[2], out[4]);
  CHECK(out[5] < 64 && out[5] != 3 && out[6] == 64 % 7 && out[7] == 0 && out[8] == 63 && out[9] == 0x70, "%u %u %u",
        out[5], out[6], out[8]);
  CHECK(out[10] == (3 - 64 % 3) % 3, "%u", out[10]);
}

// Blocks take turns: one may wait for another that started later.
static void blocks_run_side_by_side() {
  Device<uint32_t> out(2);
  out[0] = out[1] = 0;
  const std::string text = kernel(R"(
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; @%p1 bra SECOND;
    L: ld.global.acquire.gpu.u32 %r2, [%d0]; setp.eq.u32 %p2, %r2, 0; @%p2 bra L; st.global.u32 [%d0+4], %r2; ret;
    SECOND: st.global.release.gpu.u32 [%d0], 5;)",
                                  1);
  CHECK_PASSES(run_in_all_orders([&] {
    out[0] = 0;
    return run(text, {out.data()}, {.grid = {2}, .block = {1}});
  }));
  CHECK(out[1] == 5, "%u", out[1]);
}

int main() {
  lanes_diverge_and_meet();
  collectives();
  what_lanes_may_not_do();
  barriers_of_a_block();
  deadlocks_are_named();
  clusters();
  memory();
  atomics();
  blocks_run_side_by_side();
  return testing::finish();
}
