// What happens before what in a cluster, and accesses to shared memory between which nothing stands, whether or not the
// order in which they were done here shows it. Every warp has a vector clock: of each warp of the cluster, up to which
// of its arrivals it has seen, and of each barrier in shared memory, up to which phase. Arrivals at barriers (bar,
// barrier.cluster, mbarrier) release, waits for them acquire (PTX ISA 8.8, 8.9).
//
// A cluster's arrival that is relaxed releases nothing but barriers that were made and fenced (fence.mbarrier_init).
//
// Two accesses of which one writes must be in order: of warps, in four bytes; and in sixteen of
//
// - tensor copies to shared memory, which are over for who has seen the phase of their barrier;
// - wgmma, whose operands are read until one of its four warps has waited for it;
// - tensor stores, which read until the warp that started them has waited (cp.async.bulk.wait_group).
//
// What synchronises for nothing is counted (Instruction::effects): waits for no store, groups of none, wgmma.fence
// where nothing was touched, arrivals that nobody waits for, and fence.proxy.async over what nothing reads
// asynchronously.
//
// Further: a barrier is used by who has seen it made; and a block does not end before it has seen what others do to its
// memory. Lanes of a warp are one here. Atomic and volatile accesses, those of less than four bytes and cp.async are
// not followed.
#pragma once

#include "memory.h"

namespace ptx::races {

// ---- accesses of warps; `bytes` from a place in shared memory, or else nothing is done
void read(const Step& step, const Place& place, int bytes);
void wrote(const Step& step, const Place& place, int bytes);

// ---- asynchronous ones, when they start
void check_load(const Step& step, Block& block, uint32_t offset, uint32_t bytes);
void load_starts(Block& block, uint32_t offset, uint32_t bytes);
void load_ends(Block& block, uint32_t offset, uint32_t bytes, const Block& barriers, uint32_t barrier);
void product_reads(const Step& step, Block& block, uint32_t offset);  // 16 bytes
void store_reads(const Step& step, uint32_t offset, uint32_t bytes);

// ---- when they are over
void product_waited(Warp& warp);                  // of the groups of wgmma, one more
void stores_waited(Warp& warp, uint64_t groups);  // of tensor stores, so many in all

// ---- barriers in shared memory
void barrier_made(Warp& warp, const Place& place);
void check_barrier(const Step& step, const Place& place);
void made_barriers_are_fenced(Warp& warp);
void arrives(const Step& step, const Place& place);
void completed(Block& block, uint32_t barrier);  // a phase of it
void acquire(Warp& warp, const Place& place);

std::string fault_of_end(const Block& block);

}  // namespace ptx::races
