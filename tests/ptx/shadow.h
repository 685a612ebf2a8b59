// What executing alone cannot show, since here the proxies of PTX (PTX ISA 8.6) are one memory and a product's
// registers are ordinary ones. A shadow state beside the memory and the registers says what a program may not rely on:
//
// - shared memory that nothing has written, or that a copy under way will write (ldmatrix reads garbage there, since
// CUTLASS
//   loads fragments ahead that it may not use);
// - shared memory written by ordinary stores and read by a tensor store or a wgmma without fence.proxy.async between;
// - a tensor map that was written on the device and is used by a warp that has not fenced it since;
// - accumulators of a wgmma touched before wgmma.wait_group, or used by one after something else without wgmma.fence;
// - a barrier in shared memory that another block or a copy uses before whoever made it has fenced it.
//
// Each is an Error with the line of the PTX.
#pragma once

#include "memory.h"

namespace ptx::shadow {

// ---- shared memory
void wrote(Warp& warp, const Place& place, int bytes);      // an ordinary store
void arrived(Block& block, uint32_t offset, int bytes);     // a copy has
void will_write(Block& block, uint32_t offset, int bytes);  // a copy will: until then nothing has
bool written(const Block& block, uint32_t offset, int bytes);
void check_written(const Step& step, const Block& block, uint32_t offset, int bytes);
void check_written(const Step& step, const Place& place, int bytes);  // of device memory nothing is known
// As bytes are read late, when the instruction is long past, so that `who` and not a step says where.
std::string fault_of_async_read(const Block& block, uint32_t offset, int bytes);
void fence_async(const Step& step);
// At a barrier: the fence of a warp that waits for it then covers what this one wrote, and what this one has seen.
void publish(Warp& warp, Clock& barrier);

// ---- barriers in shared memory (fence.mbarrier_init)
void barrier_made(Warp& warp, const Place& place);
void fence_barriers(Warp& warp);
void check_barrier(const Step& step, const Place& place);

// ---- tensor maps
void map_written(Launch& launch, uint64_t map);
void map_fenced(const Step& step, uint64_t map);
void check_map(const Step& step, uint64_t map);

// ---- accumulators: called for instructions that touch some without being a wgmma (Instruction::on_accumulators)
void touch_accumulators(const Step& step);
void fence_accumulators(Warp& warp);
void own_accumulators(const Step& step, const Operand& registers);  // a wgmma takes them
void release_accumulators(Warp& warp, const Operand& registers);    // it was waited for

}  // namespace ptx::shadow
