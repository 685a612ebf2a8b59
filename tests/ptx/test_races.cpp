// Accesses between which nothing stands: each rule of races.h with a program that breaks it, and gives the right
// numbers in the order in which it runs here, and the program that keeps it.
#include "snippet.h"

using namespace snippet;

namespace {

constexpr const char* kWait = "W%: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W%;";

std::string wait(const std::string& label) {
  std::string text = kWait;
  for (size_t at; (at = text.find("W%")) != std::string::npos;) text.replace(at, 2, label);
  return text;
}

// Warps 0 and 1; %p1: the thread is in warp 0. A word of shared memory at %r1 and a barrier at %r2, made for
// `arrivals`.
std::string two_warps(const std::string& body, int arrivals = 32, const std::string& made = "bar.sync 0;") {
  Device<uint32_t> out(64);
  const std::string text = kernel(
      ".shared .align 16 .b8 word[16]; .shared .align 8 .b64 bar; mov.u32 %r1, word; mov.u32 %r2, bar; "
      "setp.lt.u32 %p1, %r0, 32; setp.eq.u32 %p3, %r0, 0; @%p3 mbarrier.init.shared::cta.b64 [%r2], " +
          std::to_string(arrivals) + ";" + made + body,
      1);
  return run_in_all_orders([&] { return run(text, {out.data()}, {.block = {64}}); });
}

void words() {
  const std::string writes = "@%p3 st.shared.u32 [%r1], %r0;", reads = "@!%p1 ld.shared.u32 %r5, [%r1];";
  CHECK_PASSES(two_warps(writes + "bar.sync 0;" + reads));
  CHECK_FAILS(two_warps(writes + "bar.sync 0; @%p1 bra END; bar.sync 1, 32;" + reads + "END: " + writes),
              "a race: shared memory");
  CHECK_FAILS(two_warps(writes + "bar.sync 0;" + writes + reads), "warp 0 of block rank 0 wrote");
  CHECK_FAILS(two_warps(writes + "bar.sync 0; @!%p1 st.shared.u32 [%r1], %r0; " + writes), "a race: shared memory");
  // A barrier at which one only arrives lets nothing be seen.
  const std::string apart = "@!%p1 bra ONE; bar.sync 1, 64;" + writes + "bar.arrive 2, 64; ret; ONE: bar.arrive 1, 64;";
  CHECK_PASSES(two_warps(apart + "bar.sync 2, 64;" + reads));
  CHECK_FAILS(two_warps(apart + writes + "st.shared.u32 [%r1], %r0; bar.sync 2, 64;"), "a race: shared memory");
  // Of the same word, but atomically, or of other words.
  CHECK_PASSES(two_warps("st.volatile.shared.u32 [%r1], %r0;"));
  CHECK_PASSES(two_warps(writes + "bar.sync 0; red.shared.add.u32 [%r1], 1;"));
  CHECK_PASSES(two_warps("@%p3 st.shared.u32 [%r1], %r0; setp.eq.u32 %p4, %r0, 32; @%p4 st.shared.u32 [%r1+4], %r0;"));
}

void barriers_in_memory() {
  const std::string first = "@!%p1 bra ONE; st.shared.u32 [%r1], %r0;",
                    arrives = "mbarrier.arrive.shared::cta.b64 _, [%r2];",
                    second = " ret; ONE: ", reads = "ld.shared.u32 %r5, [%r1];";
  CHECK_PASSES(two_warps(first + arrives + second + wait("W") + reads));
  CHECK_FAILS(two_warps(first + arrives + second + reads), "shared memory");
  // Whoever arrives before it writes has not released that.
  CHECK_FAILS(two_warps("@!%p1 bra ONE;" + arrives + "st.shared.u32 [%r1], %r0;" + second + wait("W") + reads),
              "shared memory");
  CHECK_FAILS(two_warps("@!%p1 bra ONE;" + arrives + second + wait("W"), 32, ""), "barrier");
}

// A word in the other block's memory, and an arrival there that it waits for, or doesn't.
void ends() {
  Device<uint32_t> out(4);
  const auto fault = [&](const std::string& remote, const std::string& waits) {
    const std::string text = kernel(
        R"(.shared .align 8 .b64 bar; .shared .align 8 .b8 word[8]; mov.u32 %r2, bar; mov.u32 %r1, word; setp.eq.u32 %p1, %r0, 0;
      mov.u32 %r3, %cluster_ctarank; xor.b32 %r3, %r3, 1; mapa.shared::cluster.u32 %r4, %r2, %r3; mapa.shared::cluster.u32 %r5, %r1, %r3;
      @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster; barrier.cluster.arrive; barrier.cluster.wait; )" +
            remote + waits,
        1);
    return run_in_all_orders([&] { return run(text, {out.data()}, {.grid = {2}, .cluster = {2}}); });
  };
  const std::string arrives = "@%p1 mbarrier.arrive.shared::cluster.b64 _, [%r4];";
  CHECK_PASSES(fault(arrives, wait("W")));
  CHECK_FAILS(fault(arrives, ""), "ended");
  ptx::options.order = ptx::Order::at_once;
  const std::string writes = "@%p1 st.shared::cluster.u32 [%r5], %r0;";
  CHECK_PASSES(fault(writes, "barrier.cluster.arrive; barrier.cluster.wait;"));
  CHECK_PASSES(fault(writes + arrives, wait("W")));
  CHECK_FAILS(fault(arrives + writes, wait("W")), "shared memory");
}

// A relaxed arrival at a cluster's barrier lets barriers be seen that were fenced, and nothing else.
void relaxed_arrivals() {
  Device<uint32_t> out(4);
  const auto fault = [&](const std::string& fence, const std::string& arrive, const std::string& after) {
    const std::string text = kernel(
        R"(.shared .align 8 .b64 bar; .shared .align 8 .b8 word[8]; mov.u32 %r2, bar; mov.u32 %r1, word; setp.eq.u32 %p1, %r0, 0;
      setp.eq.u32 %p3, %r0, 32; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; @%p1 st.shared.u32 [%r1], %r0; )" +
            fence + arrive + " barrier.cluster.wait; " + after,
        1);
    return run_in_all_orders([&] { return run(text, {out.data()}, {.block = {64}, .cluster = {1}}); });
  };
  const std::string fence = "fence.mbarrier_init.release.cluster;", relaxed = "barrier.cluster.arrive.relaxed;",
                    release = "barrier.cluster.arrive.release;", reads = "@%p3 ld.shared.u32 %r5, [%r1];",
                    arrives = "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r2];";
  CHECK_PASSES(fault(fence, relaxed, arrives));
  CHECK_PASSES(fault("", release, arrives));
  CHECK_FAILS(fault("", relaxed, arrives), "a barrier is used, and nothing stands between that and its making");
  CHECK_PASSES(fault(fence, release, reads));
  CHECK_FAILS(fault(fence, relaxed, reads), "a race: shared memory");
}

// What synchronises for nothing is counted: in the order of the text, how often each instruction had an effect.
void idle_instructions() {
  Device<uint32_t> out(64);
  ptx::TensorMap map{};
  map.mark = ptx::TensorMap::kMark, map.element_bytes = 4, map.rank = 1;
  map.address = reinterpret_cast<uint64_t>(out.data()), map.size[0] = 64, map.box[0] = 64;
  Device<unsigned char> memory(128);
  std::memcpy(memory.data(), &map, sizeof map);
  ptx::Module module = ptx::parse(kernel(
      R"(.shared .align 128 .b8 tile[256]; .shared .align 8 .b64 bars[2]; mov.u32 %r1, tile; mov.u32 %r2, bars; setp.ne.u32 %p1, %r0, 0; @%p1 ret;
    mbarrier.init.shared::cta.b64 [%r2], 1; mbarrier.init.shared::cta.b64 [%r2+8], 1; mov.u32 %r3, 0;
    FILL: add.u32 %r4, %r1, %r3; st.shared.u32 [%r4], %r3; add.u32 %r3, %r3, 4; setp.lt.u32 %p2, %r3, 256; @%p2 bra FILL;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; fence.proxy.async.shared::cta;
    cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%d0, {0}], [%r1]; cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 1; cp.async.bulk.wait_group.read 0; cp.async.bulk.wait_group 0;
    st.shared.u32 [%r1], %r3; fence.proxy.async.shared::cta; mbarrier.arrive.shared::cta.b64 _, [%r2]; mbarrier.arrive.shared::cta.b64 _, [%r2+8];)" +
          wait("W"),
      1));
  ptx::Kernel& kernel = *module.find("k");
  void* argument = memory.data();
  ptx::launch(kernel, {}, {32}, {}, 0, &argument);
  std::string effects;
  for (const ptx::Instruction& in : kernel.code) {
    if (in.may_be_idle) effects += in.effects == 0 ? '-' : '+';
  }
  CHECK(effects == "--++-++-+-", "%s", effects.c_str());
}

// What a product or a tensor store reads may be written again only when it was waited for.
void asynchronous_reads() {
  Device<uint32_t> out(128);
  const auto product = [&](const std::string& before, const std::string& after) {
    const std::string text = kernel(
        R"(.shared .align 1024 .b8 a[2048]; .shared .align 1024 .b8 b[256];
    mov.u32 %r1, a; mov.u32 %r2, b; mov.u32 %r3, 0; mad.lo.u32 %r4, %r0, 16, %r1; st.shared.v4.u32 [%r4], {%r3, %r3, %r3, %r3};
    setp.lt.u32 %p1, %r0, 16; mad.lo.u32 %r5, %r0, 16, %r2; @%p1 st.shared.v4.u32 [%r5], {%r3, %r3, %r3, %r3}; setp.eq.u32 %p2, 0, 0;
    shr.u32 %r5, %r1, 4; cvt.u64.u32 %d5, %r5; or.b64 %d5, %d5, 68720001024; shr.u32 %r5, %r2, 4; cvt.u64.u32 %d6, %r5; or.b64 %d6, %d6, 68720001024;
    mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0; setp.lt.u32 %p3, %r0, 32;
    fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d5, %d6, %p2, 1, 1, 0, 0; wgmma.commit_group.sync.aligned; )" +
            before + "wgmma.wait_group.sync.aligned 0;" + after,
        1);
    return run_in_all_orders([&] { return run(text, {out.data()}, {.block = {128}}); });
  };
  const std::string writes = "@%p3 st.shared.u32 [%r2], %r0;";
  CHECK_PASSES(product("", writes));  // its own warp has waited, and so for all four
  CHECK_FAILS(product(writes, ""), "the wgmma of warps 0 to 3 that reads it");
  CHECK_PASSES(product("", "bar.sync 0; setp.eq.u32 %p4, %r0, 32; @%p4 st.shared.u32 [%r2], %r0;"));

  ptx::TensorMap map{};
  map.mark = ptx::TensorMap::kMark, map.element_bytes = 4, map.rank = 1;
  map.address = reinterpret_cast<uint64_t>(out.data()), map.size[0] = 64, map.box[0] = 64;
  Device<unsigned char> memory(128);
  std::memcpy(memory.data(), &map, sizeof map);
  const auto store = [&](const std::string& waits, const std::string& barrier) {
    const std::string text = kernel(
        R"(.shared .align 128 .b8 tile[256]; mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.u32 [%r2], %r0;
    setp.eq.u32 %p1, %r0, 0; fence.proxy.async.shared::cta; bar.sync 0; @!%p1 bra OVER;
    cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%d0, {0}], [%r1]; cp.async.bulk.commit_group; )" +
            waits + "OVER: " + barrier +
            "fence.proxy.async.shared::cta; st.shared.u32 [%r2], %r0; @%p1 cp.async.bulk.wait_group 0;",
        1);
    return run_in_all_orders([&] { return run(text, {memory.data()}, {.block = {64}}); });
  };
  CHECK_PASSES(store("cp.async.bulk.wait_group.read 0;", "bar.sync 0;"));
  CHECK_FAILS(store("", "bar.sync 0;"), "the tensor store that reads it");
  CHECK_FAILS(store("cp.async.bulk.wait_group.read 1;", "bar.sync 0;"), "the tensor store that reads it");
  CHECK_FAILS(store("cp.async.bulk.wait_group.read 0;", ""), "shared memory");
}

// The mutant of a wait goes on as if it were over.
void a_wait_that_is_left_out() {
  Device<uint32_t> out(1);
  ptx::Module module = ptx::parse(kernel(
      ".shared .align 8 .b64 bar; mov.u32 %r2, bar; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r2], "
      "1; bar.warp.sync 0xffffffff; setp.ne.u32 %p2, %r0, %r0;" +
          wait("W") + "mov.u32 %r3, 5; @%p1 st.global.u32 [%d0], %r3;",
      1));
  ptx::Kernel& kernel = *module.find("k");
  void* argument = out.data();
  const auto launch = [&]() -> std::string {
    try {
      ptx::launch(kernel, {}, {32}, {}, 0, &argument);
    } catch (const ptx::Error& error) {
      return error.what();
    }
    return {};
  };
  CHECK_FAILS(launch(), "deadlock");
  for (ptx::Instruction& in : kernel.code) {
    if (in.text.starts_with("mbarrier.try_wait")) ptx::leave_out(in);
  }
  CHECK_PASSES(launch());
  CHECK(out[0] == 5, "%u", out[0]);
}

}  // namespace

int main() {
  words();
  barriers_in_memory();
  ends();
  relaxed_arrivals();
  idle_instructions();
  asynchronous_reads();
  a_wait_that_is_left_out();
  return testing::finish();
}
