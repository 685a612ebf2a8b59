// Runs CUDA kernels on the host so that they can be tested without a GPU: a fiber a CUDA thread, one block at a time,
// in one OS thread. A fiber runs until it waits for others (a barrier, a warp collective), so a schedule is a choice of
// who runs next; several are offered, and a kernel that is right gives the same bits under all of them. It proves
// logic, indexing, barriers and masks; under ASan bounds and alignment, under TSan races inside a block. It says
// nothing of speed, nor of races between blocks running at once. This is the engine; cuda_runtime.h here is the
// language.
#pragma once

#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// Who runs first among those who can. Blocks follow: up, up, down, shuffled.
enum class Order { interleaved, warps_up, warps_down, shuffled };
inline constexpr Order kOrders[] = {Order::interleaved, Order::warps_up, Order::warps_down, Order::shuffled};
void set_order(Order order);

// The calling thread's place.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
unsigned lane();

// Runs `body` as every thread of the grid. False where a GPU would refuse the configuration.
bool launch(Index grid, Index block, const std::function<void()>& body);

// The lanes of `mask` meet, each leaving a value; the result is everybody's, by lane, valid until the caller's next
// collective. `fence`: also order their memory accesses, as __syncwarp does and a shuffle does not.
const uint64_t* exchange(unsigned mask, uint64_t value, bool fence, const char* what, int line);

// All threads of the block that have not left meet. Returns the sum of what each brought.
int barrier(int value, int line);

[[noreturn]] void fail(const char* message, const char* what, int line);

}  // namespace emulator
