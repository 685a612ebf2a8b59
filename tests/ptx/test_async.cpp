// Asynchronous work: cp.async, barriers in shared memory, tensor copies with every swizzle, to several blocks, at the
// edges of a tensor, and tensor maps that are changed on the device. What must wait does, and what does not is noticed
// when it is late.
#include "snippet.h"

using namespace snippet;

static ptx::TensorMap map_of(void* address, std::vector<uint32_t> sizes, std::vector<uint16_t> box, int element_bytes,
                             ptx::Swizzle swizzle) {
  ptx::TensorMap map{};
  map.mark = ptx::TensorMap::kMark;
  map.element_bytes = static_cast<uint8_t>(element_bytes);
  map.rank = static_cast<uint8_t>(sizes.size());
  map.swizzle = swizzle;
  map.address = reinterpret_cast<uint64_t>(address);
  uint64_t stride = static_cast<uint64_t>(element_bytes);
  for (size_t d = 0; d < sizes.size(); ++d) {
    map.size[d] = sizes[d], map.box[d] = box[d];
    stride *= sizes[d];
    if (d + 1 < sizes.size()) map.stride[d] = stride;
  }
  return map;
}

struct Map : Device<unsigned char> {
  explicit Map(const ptx::TensorMap& map) : Device(128) { std::memcpy(data(), &map, sizeof map); }
};

static void copies_of_a_lane() {
  Device<uint32_t> in(128), out(128);
  for (uint32_t i = 0; i < 128; ++i) in[i] = i + 1;
  const auto text = [](const std::string& wait, const std::string& bytes) {
    return kernel(R"(.shared .align 16 .b8 tile[512];
      mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 16, %r1; mad.wide.u32 %d2, %r0, 16, %d0; mad.wide.u32 %d3, %r0, 16, %d1;
      cp.async.cg.shared.global.L2::128B [%r2], [%d2], 16, )" +
                      bytes + R"(; cp.async.commit_group;
      )" + wait + R"( ld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%r2]; st.global.v4.u32 [%d3], {%r3, %r4, %r5, %r6};)",
                  2);
  };
  const auto fault = [&](const std::string& wait, const std::string& bytes = "16") {
    return run_in_all_orders([&] { return run(text(wait, bytes), {in.data(), out.data()}); });
  };
  CHECK_PASSES(fault("cp.async.wait_group 0;"));
  for (uint32_t i = 0; i < 128; ++i) CHECK(out[i] == i + 1, "%u", out[i]);
  CHECK_PASSES(fault("cp.async.wait_all;", "8"));
  for (uint32_t i = 0; i < 128; ++i) CHECK(out[i] == (i % 4 < 2 ? i + 1 : 0), "%u", out[i]);
  CHECK_PASSES(fault("cp.async.wait_all;", "0"));
  CHECK(out[5] == 0, "all zeros");
  CHECK_FAILS(fault(""), "a copy under way will");
  CHECK_FAILS(fault("cp.async.wait_group 1;"), "a copy under way will");
  CHECK_FAILS(fault("cp.async.wait_all;", "20"), "a copy that reads more than it writes");
}

// One block loads a tile [rows, 64 bytes or so] and stores it to another place; every swizzle is undone by itself, and
// where a byte lies in between is checked against the definition.
static void tensor_copies(ptx::Swizzle swizzle) {
  const uint32_t row_elements = swizzle == ptx::Swizzle::none ? 24 : 8u << static_cast<int>(swizzle), rows = 10,
                 width = 50, height = 13;
  const uint32_t pitch = 56;  // elements: a stride is a multiple of 16 bytes
  Device<uint16_t> in(pitch * height), out(pitch * height), tile(row_elements * rows);
  for (uint32_t i = 0; i < pitch * height; ++i) in[i] = static_cast<uint16_t>(i + 1);
  auto from = map_of(in.data(), {width, height}, {static_cast<uint16_t>(row_elements), static_cast<uint16_t>(rows)}, 2,
                     swizzle);
  from.stride[0] = pitch * 2;
  auto to = from;
  to.address = reinterpret_cast<uint64_t>(out.data());
  Map load(from), store(to);
  const uint32_t bytes = row_elements * rows * 2, x = width - row_elements / 2, y = height - 4;  // over two edges
  const std::string at = "{" + std::to_string(x) + ", " + std::to_string(y) + "}";
  const auto text = [&](const std::string& wait, const std::string& read, uint32_t expected) {
    return kernel(R"(.shared .align 1024 .b8 tile[)" + std::to_string(bytes) + R"(]; .shared .align 8 .b64 bar;
      setp.eq.u32 %p1, %r0, 0; mov.u32 %r1, tile; mov.u32 %r2, bar; @!%p1 bra WAIT;
      mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
      mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], )" +
                      std::to_string(expected) + R"(;
      cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d0, )" +
                      at + R"(], [%r2];
      WAIT: bar.sync 0; )" +
                      wait + R"(
      mov.u32 %r3, %r0; L: setp.ge.u32 %p3, %r3, )" +
                      std::to_string(bytes / 4) +
                      R"(; @%p3 bra OUT; mad.lo.u32 %r4, %r3, 4, %r1; ld.shared.u32 %r5, [%r4];
      mad.wide.u32 %d4, %r3, 4, %d2; st.global.u32 [%d4], %r5; add.u32 %r3, %r3, 64; bra L; OUT: @!%p1 ret;
      cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, )" +
                      at + R"(], [%r1]; cp.async.bulk.commit_group; )" + read,
                  3);
  };
  const std::string wait = "W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;",
                    done = "cp.async.bulk.wait_group 0;";
  const auto fault = [&](const std::string& before, const std::string& after, uint32_t expected) {
    return run_in_all_orders([&] {
      return run(text(before, after, expected), {load.data(), store.data(), tile.data()}, {.block = {64}});
    });
  };
  CHECK_PASSES(fault(wait, done, bytes));
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t column = 0; column < row_elements; ++column) {
      const uint32_t linear = (row * row_elements + column) * 2, mask = (1u << static_cast<int>(swizzle)) - 1;
      const uint32_t place = linear ^ (linear / 128 & mask) * 16;
      const bool inside = x + column < width && y + row < height;
      const uint16_t want = inside ? in[(y + row) * pitch + x + column] : 0;
      CHECK(tile[place / 2] == want, "swizzle %d: [%u, %u] is %u, should be %u", static_cast<int>(swizzle), row, column,
            tile[place / 2], want);
    }
  }
  for (uint32_t row = 0; row < height; ++row) {
    for (uint32_t column = 0; column < pitch; ++column) {
      const bool stored = row >= y && row < y + rows && column >= x && column < std::min(width, x + row_elements);
      const uint16_t want = stored ? in[row * pitch + column] : 0xffff;
      CHECK(out[row * pitch + column] == want, "stored [%u, %u] is %u, should be %u", row, column,
            out[row * pitch + column], want);
    }
  }
  CHECK_FAILS(fault("", done, bytes), "shared memory at");
  CHECK_FAILS(fault(wait, done, bytes + 16), "deadlock in k:");
  CHECK_FAILS(fault(wait, "", bytes), "a block ended while a tensor store reads its shared memory");
  CHECK_PASSES(fault(wait, "cp.async.bulk.wait_group.read 0;", bytes));
  CHECK_FAILS(fault(wait, "mov.u32 %r9, 7; st.shared.u32 [%r1], %r9; cp.async.bulk.wait_group 0;", bytes),
              "that and the tensor store that reads it");
  // What is stored may be read back only after all of it was waited for, not when it was merely read from shared
  // memory.
  const auto read_back = [&](const std::string& before) {
    for (uint32_t i = 0; i < pitch * height; ++i) out[i] = 0;
    const std::string address = std::to_string(reinterpret_cast<uint64_t>(&out[y * pitch + x]));
    ptx::options.order = ptx::Order::late;
    CHECK_PASSES(run(
        text(wait, before + "mov.u64 %d8, " + address + "; ld.global.u16 %r5, [%d8]; st.global.u32 [%d2], %r5;", bytes),
        {load.data(), store.data(), tile.data()}, {.block = {64}}));
    ptx::options = {};
    return tile[0];
  };
  CHECK(read_back(done) == in[y * pitch + x], "what was waited for is there");
  CHECK(read_back("cp.async.bulk.wait_group.read 0;") == 0, "what was only read from shared memory is not");
}

static void to_several_blocks() {
  Device<uint16_t> in(64), out(4 * 64);
  for (uint16_t i = 0; i < 64; ++i) in[i] = i;
  Map map(map_of(in.data(), {64}, {64}, 2, ptx::Swizzle::none));
  // Block 1 of four sends to blocks 0, 2 and 3 (mask 13); every block that gets it waits at its own barrier.
  const auto text = [](const std::string& mask, const std::string& fence) {
    return kernel(R"(.shared .align 128 .b8 tile[128]; .shared .align 8 .b64 bar;
      mov.u32 %r1, tile; mov.u32 %r2, bar; mov.u32 %r3, %cluster_ctarank; setp.eq.u32 %p1, %r0, 0; @!%p1 bra MET;
      mbarrier.init.shared::cta.b64 [%r2], 1; )" +
                      fence + R"(
      setp.ne.u32 %p3, %r3, 1; @%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 128;
      MET: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
      setp.eq.and.u32 %p4, %r3, 1, %p1; mov.u16 %h1, )" +
                      mask + R"(;
      @%p4 cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%d0, {0}], [%r2], %h1;
      setp.eq.u32 %p5, %r3, 1; @%p5 bra END;
      W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;
      mad.lo.u32 %r4, %r0, 4, %r1; ld.shared.u32 %r5, [%r4]; mad.lo.u32 %r6, %r3, 32, %r0; mad.wide.u32 %d4, %r6, 4, %d1; st.global.u32 [%d4], %r5;
      END: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;)",
                  2);
  };
  const auto fault = [&](const std::string& mask, const std::string& fence = "fence.mbarrier_init.release.cluster;") {
    return run_in_all_orders([&] {
      return run(text(mask, fence), {map.data(), out.data()}, {.grid = {4}, .cluster = {4}});
    });
  };
  CHECK_PASSES(fault("13"));
  for (size_t block = 0; block < 4; ++block) {
    for (uint16_t i = 0; i < 64; ++i)
      CHECK(out[block * 64 + i] == (block == 1 ? 0xffff : i), "block %zu has %u", block, out[block * 64 + i]);
  }
  CHECK_FAILS(fault("9"), "deadlock in k:");
  CHECK_FAILS(fault("45"), "a copy to a block that the cluster does not have");
}

static void barriers_count() {
  Device<uint32_t> out(32);
  const auto fault = [&](const std::string& body) {
    return run(kernel(".shared .align 8 .b64 bar; mov.u32 %r2, bar; setp.eq.u32 %p1, %r0, 0; @%p1 "
                      "mbarrier.init.shared::cta.b64 [%r2], 3; bar.warp.sync -1;\n" +
                          body,
                      1),
               {out.data()});
  };
  const std::string test = "mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r2], ",
                    store = "; selp.u32 %r3, 1, 0, %p2; mad.wide.u32 %d1, %r0, 4, %d0; st.global.u32 [%d1], %r3;";
  CHECK_PASSES(fault("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2], 2; bar.warp.sync -1; " + test + "0" + store));
  CHECK(out[0] == 0 && out[31] == 0, "two of three");
  CHECK_PASSES(
      fault("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2], 2; @%p1 mbarrier.arrive.shared::cta.b64 _, [%r2]; "
            "bar.warp.sync -1; " +
            test + "0" + store));
  CHECK(out[0] == 1 && out[31] == 1, "all three");
  CHECK_PASSES(fault("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2], 3; bar.warp.sync -1; " + test + "1" + store));
  CHECK(out[0] == 0, "the next phase has begun");
  CHECK_FAILS(fault("mbarrier.arrive.shared::cta.b64 _, [%r2], 4;"), "more arrivals at a barrier than it expects");
  CHECK_FAILS(fault("mbarrier.arrive.shared::cta.b64 _, [%r2+8];"), "shared memory out of bounds");
  CHECK_FAILS(run(kernel(".shared .align 8 .b64 bar; mov.u32 %r2, bar; mbarrier.arrive.shared::cta.b64 _, [%r2];", 1),
                  {out.data()}),
              "nothing has written it");
}

// A map made from another on the device, as CUTLASS does for every group: in shared memory, then copied and fenced.
static void maps_changed_on_the_device() {
  Device<uint16_t> first(32), second(32), out(32);
  for (uint16_t i = 0; i < 32; ++i) first[i] = 1, second[i] = static_cast<uint16_t>(i * 3);
  Map map(map_of(first.data(), {32, 1}, {32, 1}, 2, ptx::Swizzle::none));
  Device<unsigned char> place(128);
  const auto text = [](const std::string& copy, const std::string& fence, const std::string& size) {
    return kernel(R"(.shared .align 128 .b8 tile[64]; .shared .align 128 .b8 map[128]; .shared .align 8 .b64 bar;
      mov.u32 %r1, tile; mov.u32 %r2, bar; mov.u32 %r3, map; mad.lo.u32 %r4, %r0, 4, %r3; mad.wide.u32 %d5, %r0, 4, %d0; ld.global.u32 %r5, [%d5]; st.shared.u32 [%r4], %r5;
      setp.eq.u32 %p1, %r0, 0; bar.warp.sync -1; cvt.u64.u32 %d6, %r3;
      @%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%d6], %d1;
      @%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%d6], 0, )" +
                      size + R"(;
      @%p1 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%d6], 0, 64;
      bar.warp.sync -1; )" +
                      copy + " " + fence + R"(
      @!%p1 bra WAIT; mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 64;
      cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d3, {0, 0}], [%r2];
      WAIT: bar.warp.sync -1; W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra W;
      mad.lo.u32 %r6, %r0, 2, %r1; ld.shared.u16 %r7, [%r6]; mad.wide.u32 %d7, %r0, 2, %d2; st.global.u16 [%d7], %r7;)",
                  4);
  };
  const std::string copy =
      "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d3], [%d6], 128;";
  const std::string fence = "fence.proxy.tensormap::generic.acquire.gpu [%d3], 128;";
  const auto fault = [&](const std::string& how, const std::string& fenced, const std::string& size = "20") {
    return run_in_all_orders([&] {
      return run(text(how, fenced, size), {map.data(), second.data(), out.data(), place.data()});
    });
  };
  CHECK_PASSES(fault(copy, fence));
  for (uint32_t i = 0; i < 32; ++i) CHECK(out[i] == (i < 20 ? 3 * i : 0), "%u: %u", i, out[i]);
  CHECK_FAILS(fault(copy, ""), "a tensor map that was written on the device is used without fence.proxy.tensormap");
  CHECK_FAILS(fault(fence, copy), "a tensor map that was written on the device is used without fence.proxy.tensormap");
  CHECK_FAILS(fault(copy, fence, "0"), "a tensor map with a dimension of 0");
  for (size_t i = 0; i < 128; ++i) place[i] = 0;
  CHECK_FAILS(fault("", fence), "this is no tensor map");
  Device<uint16_t> small(16);
  CHECK_FAILS(run(text(copy, fence, "20"), {map.data(), small.data(), out.data(), place.data()}),
              "reads device memory out of bounds");
}

int main() {
  copies_of_a_lane();
  for (int swizzle = 0; swizzle < 4; ++swizzle) tensor_copies(static_cast<ptx::Swizzle>(swizzle));
  to_several_blocks();
  barriers_count();
  maps_changed_on_the_device();
  return testing::finish();
}
