// Barriers: of a block (bar and barrier, PTX ISA 9.7.13.1), of a warp (9.7.13.2), of a cluster (9.7.13.3), and in
// shared memory (9.7.13.15).
#include "barriers.h"

#include "form.h"
#include "memory.h"
#include "races.h"
#include "shadow.h"

namespace ptx {
namespace {

unsigned lanes_alive(const Block& block) {
  unsigned lanes = 0;
  for (const Warp& warp : block.warps) lanes += warp.alive != 0 ? kLanes : 0;
  return lanes;
}

void complete(Launch& launch, NamedBarrier& barrier) {
  barrier.arrived = 0;
  barrier.expected = 0;
  barrier.first = nullptr;
  barrier.released = std::move(barrier.arriving);
  barrier.arriving.clear();
  ++barrier.generation;
  ++launch.events;
}

// Whole warps arrive. Without a count the barrier is for all threads of the block that have not ended, which have to
// come to the same instruction: CUDA's __syncthreads in two branches is undefined even where hardware lets it pass.
Outcome arrive_at_block(const Step& step) {
  const uint64_t number = value(step, step.operand(0), step.first_lane());
  Block& block = *step.warp.block;
  if (number >= block.barriers.size()) step.fail("there is no barrier " + std::to_string(number));
  NamedBarrier& barrier = block.barriers[number];
  const bool all = step.in.operands.size() < 2;
  const unsigned count =
      all ? lanes_alive(block) : static_cast<unsigned>(value(step, step.operand(1), step.first_lane()));
  if (count % kLanes != 0) step.fail("a barrier for " + std::to_string(count) + " threads, which are not whole warps");
  if (barrier.arrived != 0 && barrier.expected != (all ? 0 : count))
    step.fail("a barrier with another count than others gave");
  if (all && barrier.arrived != 0 && barrier.first != &step.in) {
    step.fail("a barrier that other warps of the block wait for in line " + std::to_string(barrier.first->line));
  }
  if (barrier.arrived == 0) barrier.first = &step.in;
  barrier.expected = all ? 0 : count;
  barrier.arrived += kLanes;
  shadow::publish(step.warp, barrier.arriving);
  if (step.in.a == 0) {  // sync, not arrive
    step.warp.barrier = static_cast<int>(number);
    step.warp.barrier_generation = barrier.generation;
  }
  if (barrier.arrived > count) step.fail("more threads at a barrier than it is for");
  if (barrier.arrived == count) complete(step.launch, barrier);
  ++step.launch.events;
  return Outcome::done;
}

Outcome nothing(const Step&) { return Outcome::done; }  // the lanes of the mask have come

Outcome arrive_at_cluster(const Step& step) {
  Cluster& cluster = *step.warp.block->cluster;
  step.warp.cluster_generation = cluster.generation;
  if (step.in.a == 0) shadow::publish(step.warp, cluster.arriving);
  merge(cluster.arriving, step.warp.made);
  unsigned warps = 0;
  for (const Block& block : cluster.blocks) warps += lanes_alive(block) / kLanes;
  if (++cluster.arrived >= warps) {
    cluster.arrived = 0;
    cluster.released = std::move(cluster.arriving);
    cluster.arriving.clear();
    ++cluster.generation;
  }
  ++step.launch.events;
  return Outcome::done;
}

Outcome wait_for_cluster(const Step& step) {
  const uint64_t generation = step.warp.block->cluster->generation;
  if (generation == step.warp.cluster_generation) return Outcome::waits;
  merge(step.warp.seen, step.warp.block->cluster->released);
  return Outcome::done;
}

// ---- mbarrier

constexpr uint32_t kMostArrivals = (1u << 20) - 1;

Place barrier_at(const Step& step, size_t operand, int lane) {
  const Place place = place_of(step, step.in.space, address(step, step.operand(operand), lane), 8);
  shadow::check_written(step, place, 8);
  races::check_barrier(step, place);
  return place;
}

Outcome initialise(const Step& step) {
  for_lanes(step.lanes, [&](int l) {
    const uint64_t count = value(step, step.operand(1), l);
    if (count == 0 || count > kMostArrivals) step.fail("a barrier for " + std::to_string(count) + " arrivals");
    const Place place = place_of(step, step.in.space, address(step, step.operand(0), l), 8);
    MemoryBarrier{static_cast<uint32_t>(count), static_cast<uint32_t>(count), 0, false}.put(place.at);
    shadow::arrived(*place.block, place.offset, 8);
    shadow::barrier_made(step.warp, place);
    races::barrier_made(step.warp, place);
  });
  return Outcome::done;
}

Outcome invalidate(const Step& step) {
  for_lanes(step.lanes, [&](int l) {
    const Place place = barrier_at(step, 0, l);
    shadow::will_write(*place.block, place.offset, 8);
  });
  return Outcome::done;
}

// a: the third operand is bytes to expect, else a number of arrivals.
Outcome arrive(const Step& step) {
  for_lanes(step.lanes, [&](int l) {
    const Place place = barrier_at(step, 1, l);
    if (place.block != step.warp.block) shadow::check_barrier(step, place);
    const bool given = step.in.operands.size() > 2;
    const int amount = given ? static_cast<int>(value(step, step.operand(2), l)) : 1;
    races::arrives(step, place);
    const std::string fault = update_barrier(step.launch, *place.block, place.offset, step.in.a != 0 ? 1 : amount,
                                             step.in.a != 0 ? amount : 0);
    if (!fault.empty()) step.fail(fault);
  });
  return Outcome::done;
}

Outcome expect(const Step& step) {
  for_lanes(step.lanes, [&](int l) {
    const Place place = barrier_at(step, 0, l);
    const int sign = step.in.a != 0 ? -1 : 1;
    const std::string fault = update_barrier(step.launch, *place.block, place.offset, 0,
                                             sign * static_cast<int>(value(step, step.operand(1), l)));
    if (!fault.empty()) step.fail(fault);
  });
  return Outcome::done;
}

// Whether the phase of a parity is over. try_wait may wait for it, for a time that nobody promises.
Outcome wait_for_parity(const Step& step) {
  uint32_t over = 0;
  for_lanes(step.lanes, [&](int l) {
    const bool parity = (value(step, step.operand(2), l) & 1) != 0;
    const Place place = barrier_at(step, 1, l);
    if (MemoryBarrier::at(place.at).parity == parity) return;
    over |= uint32_t{1} << l;
    races::acquire(step.warp, place);
  });
  if (over != step.lanes && step.in.may_sleep) {
    if (!step.warp.may_time_out) return Outcome::waits;
    step.warp.may_time_out = false;
  }
  uint64_t* out = result(step, 0);
  for_lanes(step.lanes, [&](int l) { out[l] = over >> l & 1; });
  return Outcome::done;
}

void memory_barriers(Form& form, Instruction& in) {
  enum { kInit, kInval, kArrive, kExpect, kComplete, kTry, kTest };
  // The first of the words is the instruction: arrive.expect_tx is an arrival.
  const int which = form.take_one({"init", "inval", "arrive", "expect_tx", "complete_tx", "try_wait", "test_wait"});
  in.space = form.take_space();
  form.take_one({"release", "relaxed", "acquire"});
  form.take_one({"cta", "cluster"});
  in.type = form.take_type();
  if (in.type != Type::b64) return;
  if (in.space == Space::generic) in.space = Space::shared;
  switch (which) {
    case kInit: in.execute = &initialise; break;
    case kInval: in.execute = &invalidate; break;
    case kArrive:
      in.a = form.take("expect_tx"), in.execute = &arrive;
      in.may_be_idle = in.a == 0;  // bytes are awaited with it
      break;
    case kExpect:
    case kComplete: in.a = which == kComplete, in.execute = &expect; break;
    case kTry:
    case kTest:
      in.may_sleep = which == kTry;
      if (form.take("parity")) in.execute = &wait_for_parity;
      break;
    default: break;
  }
}

}  // namespace

MemoryBarrier MemoryBarrier::at(const unsigned char* memory) {
  uint64_t bits;
  std::memcpy(&bits, memory, 8);
  return {static_cast<uint32_t>(bits & 0xfffff), static_cast<uint32_t>(bits >> 20 & 0xfffff),
          static_cast<int32_t>(static_cast<uint32_t>(bits >> 40 & 0x3fffff) << 10) >> 10, (bits >> 63) != 0};
}

void MemoryBarrier::put(unsigned char* memory) const {
  const uint64_t bits = uint64_t{left} | uint64_t{expected} << 20 |
                        (static_cast<uint64_t>(static_cast<uint32_t>(bytes)) & 0x3fffff) << 40 | uint64_t{parity} << 63;
  std::memcpy(memory, &bits, 8);
}

std::string update_barrier(Launch& launch, Block& block, uint32_t offset, int arrivals, int bytes) {
  unsigned char* memory = block.shared.data() + offset;
  MemoryBarrier barrier = MemoryBarrier::at(memory);
  barrier.bytes += bytes;
  if (arrivals < 0 || static_cast<uint32_t>(arrivals) > barrier.left)
    return "more arrivals at a barrier than it expects";
  if (std::abs(barrier.bytes) > static_cast<int>(kMostArrivals)) return "more bytes at a barrier than it can count";
  barrier.left -= static_cast<uint32_t>(arrivals);
  if (barrier.left == 0 && barrier.bytes == 0) {
    barrier.parity = !barrier.parity;
    barrier.left = barrier.expected;
    races::completed(block, offset);
  }
  barrier.put(memory);
  ++launch.events;
  return {};
}

void complete_barriers(Launch& launch, Block& block) {
  const unsigned lanes = lanes_alive(block);
  for (NamedBarrier& barrier : block.barriers) {
    if (barrier.arrived != 0 && barrier.expected == 0 && barrier.arrived >= lanes) complete(launch, barrier);
  }
}

void barriers(Form& form, Instruction& in) {
  if (form.opcode() == "mbarrier") return memory_barriers(form, in);
  in.members = Instruction::kWholeWarp;
  if (form.take("warp")) {
    in.members = 0;
    if (form.take("sync")) in.execute = &nothing;
    return;
  }
  const bool cluster = form.take("cluster"), aligned = form.take("aligned");
  static_cast<void>(aligned);  // what is not aligned is here too, since warps arrive whole
  if (cluster) {
    const int what = form.take_one({"arrive", "wait"});
    in.a = form.take("relaxed");
    form.take_one({"release", "acquire"});
    if (what >= 0) in.execute = what == 0 ? &arrive_at_cluster : &wait_for_cluster;
    return;
  }
  form.take("cta");
  in.a = form.take_one({"sync", "arrive"});
  if (in.a >= 0) in.execute = &arrive_at_block;
}

}  // namespace ptx
