// What executing alone does not show: each rule with a program that breaks it and gives the right numbers here all the
// same, and the program that keeps it.
#include "snippet.h"

using namespace snippet;

namespace {

// A warp group's product of 64 x 8 from shared memory that its threads wrote; `parts` are left out or put elsewhere.
struct Parts {
  std::string async = "fence.proxy.async.shared::cta;", barrier = "bar.sync 0;", after_barrier = "",
              fence = "wgmma.fence.sync.aligned;";
  std::string between = "", commit = "wgmma.commit_group.sync.aligned;", early = "",
              wait = "wgmma.wait_group.sync.aligned 0;", again = "";
};

std::string product(const Parts& parts) {
  Device<float> out(128);
  const std::string wgmma =
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d5, %d6, %p2, 1, 1, 0, 0;";
  const std::string again =
      parts.again.empty() ? "" : parts.again + " " + wgmma + parts.commit + "wgmma.wait_group.sync.aligned 0;";
  const std::string text = kernel(R"(.shared .align 1024 .b8 a[2048]; .shared .align 1024 .b8 b[256];
    mov.u32 %r1, a; mov.u32 %r2, b; mov.u32 %r3, 0x3f803f80; mad.lo.u32 %r4, %r0, 16, %r1; st.shared.v4.u32 [%r4], {%r3, %r3, %r3, %r3};
    setp.lt.u32 %p1, %r0, 16; mad.lo.u32 %r4, %r0, 16, %r2; @%p1 st.shared.v4.u32 [%r4], {%r3, %r3, %r3, %r3}; setp.eq.u32 %p2, 0, 0;
    shr.u32 %r5, %r1, 4; cvt.u64.u32 %d5, %r5; or.b64 %d5, %d5, 68720001024; shr.u32 %r5, %r2, 4; cvt.u64.u32 %d6, %r5; or.b64 %d6, %d6, 68720001024;
    mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
    )" + parts.async + parts.barrier + parts.after_barrier +
                                      parts.fence + parts.between + wgmma + parts.commit + parts.early + parts.wait +
                                      again + R"(
    mad.wide.u32 %d4, %r0, 4, %d0; st.global.f32 [%d4], %f0;)",
                                  1);
  const std::string fault = run_in_all_orders([&] { return run(text, {out.data()}, {.block = {128}}); });
  if (fault.empty()) {
    const float want = parts.again.empty() ? 17 : 33;
    for (size_t i = 0; i < 128; ++i) CHECK(out[i] == want, "%g", out[i]);
  }
  return fault;
}

void products() {
  CHECK_PASSES(product({}));
  CHECK_FAILS(product({.async = ""}), "is read without fence.proxy.async");
  // The fence of whoever wrote, or after a barrier that of another: not before it.
  CHECK_PASSES(product({.async = "", .after_barrier = "fence.proxy.async.shared::cta; bar.sync 0;"}));
  CHECK_FAILS(product({.async = "setp.lt.u32 %p3, %r0, 32; @%p3 fence.proxy.async.shared::cta;"}),
              "is read without fence.proxy.async");
  CHECK_FAILS(product({.barrier = ""}), "a race: shared memory");
  CHECK_FAILS(product({.fence = ""}), "the first wgmma of a warp without wgmma.fence before it");
  CHECK_FAILS(product({.between = "add.f32 %f2, %f2, 0f00000000;"}),
              "an accumulator was touched since the last wgmma.fence");
  CHECK_FAILS(product({.early = "add.f32 %f4, %f2, 0f00000000;"}),
              "an accumulator of a wgmma is touched before wgmma.wait_group");
  CHECK_FAILS(product({.early = "mov.b64 %d9, {%f3, %f3};"}),
              "an accumulator of a wgmma is touched before wgmma.wait_group");
  CHECK_FAILS(product({.wait = ""}), "an accumulator of a wgmma is touched before wgmma.wait_group");
  CHECK_FAILS(product({.wait = "wgmma.wait_group.sync.aligned 1;"}),
              "an accumulator of a wgmma is touched before wgmma.wait_group");
  CHECK_FAILS(product({.commit = ""}), "an accumulator of a wgmma is touched before wgmma.wait_group");
  CHECK_FAILS(product({.early = "ret;"}), "a wgmma was never waited for");
  // Products of one shape need no fence between them; what touches their registers in between does.
  CHECK_PASSES(product({.again = " "}));
  CHECK_FAILS(product({.again = "mov.f32 %f1, %f1;"}), "an accumulator was touched since the last wgmma.fence");
  CHECK_PASSES(product({.again = "mov.f32 %f1, %f1; wgmma.fence.sync.aligned;"}));
}

// A tile of 512 bytes that two warps write and the first thread stores.
std::string store(const std::string& before_barrier, const std::string& after_barrier,
                  const std::string& barrier = "bar.sync 0;") {
  Device<uint32_t> out(128);
  ptx::TensorMap map{};
  map.mark = ptx::TensorMap::kMark, map.element_bytes = 4, map.rank = 1,
  map.address = reinterpret_cast<uint64_t>(out.data());
  map.size[0] = 128, map.box[0] = 128;
  Device<unsigned char> memory(128);
  std::memcpy(memory.data(), &map, sizeof map);
  const std::string text = kernel(
      R"(.shared .align 128 .b8 tile[512]; mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 8, %r1; st.shared.v2.u32 [%r2], {%r0, %r0};
    setp.eq.u32 %p1, %r0, 0; )" +
          before_barrier + barrier + after_barrier + R"(@!%p1 ret;
    cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%d0, {0}], [%r1]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;)",
      1);
  const std::string fault = run_in_all_orders([&] { return run(text, {memory.data()}, {.block = {64}}); });
  if (fault.empty()) {
    for (uint32_t i = 0; i < 128; ++i) CHECK(out[i] == i / 2, "%u", out[i]);
  }
  return fault;
}

void tensor_stores() {
  const std::string fence = "fence.proxy.async.shared::cta;";
  CHECK_PASSES(store(fence, ""));
  CHECK_PASSES(store("", fence));
  CHECK_FAILS(store("", ""), "is read without fence.proxy.async");
  CHECK_FAILS(store("@%p1 " + fence, ""), "is read without fence.proxy.async");
  CHECK_FAILS(store("", fence, ""), "shared memory");
  CHECK_FAILS(store("fence.proxy.async.global;", ""), "is read without fence.proxy.async");
}

// A fence covers what its warp wrote or saw at a barrier that it waited for, not what passed it by.
void the_fence_of_another() {
  Device<uint32_t> out(128);
  ptx::TensorMap map{};
  map.mark = ptx::TensorMap::kMark, map.element_bytes = 4, map.rank = 1;
  map.address = reinterpret_cast<uint64_t>(out.data()), map.size[0] = 128, map.box[0] = 128;
  Device<unsigned char> memory(128);
  std::memcpy(memory.data(), &map, sizeof map);
  const auto fault = [&](const std::string& third) {
    const std::string text =
        kernel(R"(.shared .align 128 .b8 tile[512]; mov.u32 %r1, tile; setp.lt.u32 %p2, %r0, 64; @!%p2 bra THIRD;
      mad.lo.u32 %r2, %r0, 8, %r1; st.shared.v2.u32 [%r2], {%r0, %r0}; bar.sync 1, 64; bar.sync 2, 96; bar.sync 3, 96; setp.eq.u32 %p1, %r0, 0; @!%p1 ret;
      cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%d0, {0}], [%r1]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; ret;
      THIRD: )" + third,
               1);
    return run_in_all_orders([&] { return run(text, {memory.data()}, {.block = {96}}); });
  };
  CHECK_PASSES(fault("bar.sync 2, 96; fence.proxy.async.shared::cta; bar.sync 3, 96;"));
  CHECK_FAILS(fault("fence.proxy.async.shared::cta; bar.sync 2, 96; bar.sync 3, 96;"),
              "is read without fence.proxy.async");
  CHECK_FAILS(fault("bar.arrive 2, 96; fence.proxy.async.shared::cta; bar.sync 3, 96;"),
              "is read without fence.proxy.async");
}

void new_barriers() {
  Device<uint32_t> out(4);
  const auto fault = [&](const std::string& fence) {
    const std::string text =
        kernel(R"(.shared .align 8 .b64 bar; mov.u32 %r1, bar; setp.eq.u32 %p1, %r0, 0; mov.u32 %r2, %cluster_ctarank;
      @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; )" +
                   fence + R"( barrier.cluster.arrive; barrier.cluster.wait;
      xor.b32 %r3, %r2, 1; mapa.shared::cluster.u32 %r4, %r1, %r3; @%p1 mbarrier.arrive.shared::cluster.b64 _, [%r4];
      W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra W; barrier.cluster.arrive; barrier.cluster.wait;)",
               1);
    return run_in_all_orders([&] { return run(text, {out.data()}, {.grid = {2}, .cluster = {2}}); });
  };
  CHECK_PASSES(fault("fence.mbarrier_init.release.cluster;"));
  CHECK_FAILS(fault(""), "a barrier is used that was made without fence.mbarrier_init since");
}

// Whoever waited for data before its copy arrived reads old or new ones as chance has it: here it never passes.
void memory_that_nothing_has_written() {
  Device<uint32_t> out(32);
  const std::string text = kernel(
      ".shared .align 4 .b8 words[128]; mov.u32 %r1, words; mad.lo.u32 %r2, %r0, 4, %r1; setp.ne.u32 %p1, %r0, 5; @%p1 "
      "st.shared.u32 [%r2], %r0; ld.shared.u32 %r3, [%r2];",
      1);
  CHECK_FAILS(run(text, {out.data()}), "is read, and nothing has written it");
}

}  // namespace

int main() {
  products();
  tensor_stores();
  the_fence_of_another();
  new_barriers();
  memory_that_nothing_has_written();
  return testing::finish();
}
