// The engine of emulator.h: stacks and their switching, the schedule, barriers and warp rendezvous. Linux on x86-64.
// Under TSan this file alone is built without it: its bookkeeping is not the kernels' memory.
#include "emulator.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(UMMRM_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096;
constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxMasks = 32;

enum class State { ready, at_barrier, at_rendezvous, done };

struct Fiber {
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  Index index{};
  unsigned number = 0;
  State state = State::done;
  unsigned waits_with = 0;  // the mask, at a rendezvous
  const char* what = "";    // where it waits, for messages
  int line = 0;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;
};

// Where the lanes of one mask meet. Values of two meetings are kept: a lane may come to the next before others have
// read.
struct Rendezvous {
  unsigned mask = 0, arrived = 0, meeting = 0;
  const char* what = "";
  int line = 0;
  uint64_t values[2][kWarp] = {};
};

// Not on the heap: TSan counts an allocation as a write, against which the other lanes' reading would be a race.
struct Warp {
  unsigned masks = 0;
  Rendezvous meetings[kMaxMasks];
};

struct Machine {
  Order order = Order::interleaved;
  std::mt19937 random{1};
  Index grid{}, block{}, block_at{};
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<unsigned> turn;  // fiber numbers, in the order of the schedule
  Warp warps[kMaxThreads / kWarp];
  Fiber* current = nullptr;
  unsigned threads = 0, alive = 0, waiting = 0;
  int barrier_line = 0, barrier_meeting = 0, barrier_sum[2] = {};
  void* scheduler_pointer = nullptr;
  const void* scheduler_stack = nullptr;  // ASan's
  size_t scheduler_stack_bytes = 0;
  void* scheduler_tsan = nullptr;
  char block_begins = 0, block_ends = 0;  // what one block wrote is seen by the next
};

Machine machine;

void release(void* address) {
#if defined(UMMRM_EMULATOR_TSAN)
  __tsan_release(address);
#else
  (void)address;
#endif
}
void acquire(void* address) {
#if defined(UMMRM_EMULATOR_TSAN)
  __tsan_acquire(address);
#else
  (void)address;
#endif
}

// Saves the callee-saved registers and the stack pointer, and continues where `to` was saved.
extern "C" void ummrm_emulator_switch(void** from, void* to);
asm(R"(.text
.globl ummrm_emulator_switch
.type ummrm_emulator_switch,@function
ummrm_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ummrm_emulator_switch, .-ummrm_emulator_switch
)");

void leave(bool for_good) {
  Fiber& self = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
#if defined(UMMRM_EMULATOR_TSAN)
  __tsan_switch_to_fiber(machine.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  (void)for_good;
  ummrm_emulator_switch(&self.stack_pointer, machine.scheduler_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void run(Fiber& fiber) {
  machine.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
#if defined(UMMRM_EMULATOR_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  ummrm_emulator_switch(&machine.scheduler_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void wait(State state, unsigned mask, const char* what, int line) {
  Fiber& self = *machine.current;
  self.state = state;
  self.waits_with = mask;
  self.what = what;
  self.line = line;
  leave(false);
}

void open_barrier() {
  machine.waiting = 0;
  ++machine.barrier_meeting;
  machine.barrier_sum[machine.barrier_meeting & 1] = 0;
  for (unsigned i = 0; i < machine.threads; ++i) {
    if (machine.fibers[i].state == State::at_barrier) machine.fibers[i].state = State::ready;
  }
}

// First function on every fiber's stack; never returns.
void begin_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  acquire(&machine.block_begins);
  machine.body();
  release(&machine.block_ends);
  machine.current->state = State::done;
  // A thread that has left counts as arrived, as on the hardware.
  if (--machine.alive > 0 && machine.waiting == machine.alive) open_barrier();
  leave(true);
  std::abort();
}

// A stack on which a switch finds six registers and the address to return to.
void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0)
      fail("no memory for stacks", "launch", 0);
    fiber.stack = static_cast<char*>(memory) + kGuardBytes;
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);  // what the last thread left there
#endif
#if defined(UMMRM_EMULATOR_TSAN)
  if (fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
#endif
  auto** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;  // keeps the ABI's stack alignment at the first function
  *--top = reinterpret_cast<void*>(&begin_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

// Shared memory holds NaN before each block: what a kernel reads unwritten shows in its results. It is thread-local
// storage of the executable (cuda_runtime.h), whose place the loader knows. Sanitizer builds use plain statics instead.
void poison_shared_memory() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(UMMRM_EMULATOR_TSAN)
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data != nullptr) {
            std::memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[i].p_memsz);
          }
        }
        return 1;  // the executable comes first
      },
      nullptr);
#endif
}

void arrange_turns() {
  const unsigned warps = (machine.threads + kWarp - 1) / kWarp;
  std::vector<unsigned> warp_turn(warps);
  for (unsigned w = 0; w < warps; ++w) warp_turn[w] = machine.order == Order::warps_down ? warps - 1 - w : w;
  if (machine.order == Order::shuffled) std::shuffle(warp_turn.begin(), warp_turn.end(), machine.random);
  machine.turn.clear();
  for (const unsigned warp : warp_turn) {
    const auto first = machine.turn.size();
    for (unsigned i = warp * kWarp; i < std::min(machine.threads, (warp + 1) * kWarp); ++i) machine.turn.push_back(i);
    const auto begin = machine.turn.begin() + static_cast<std::ptrdiff_t>(first);
    if (machine.order == Order::warps_down) std::reverse(begin, machine.turn.end());
    if (machine.order == Order::shuffled) std::shuffle(begin, machine.turn.end(), machine.random);
  }
}

// Lets every thread of turn[first, last) that can run do so once.
bool sweep(size_t first, size_t last) {
  bool ran = false;
  for (size_t i = first; i < last; ++i) {
    Fiber& fiber = machine.fibers[machine.turn[i]];
    if (fiber.state != State::ready) continue;
    ran = true;
    run(fiber);
  }
  return ran;
}

// A warp's places in `turn` are adjacent, but the ragged last warp may stand anywhere.
size_t end_of_warp(size_t first) {
  size_t last = first + 1;
  while (last < machine.turn.size() && machine.turn[last] / kWarp == machine.turn[first] / kWarp) ++last;
  return last;
}

void run_block(Index at) {
  const Index size = machine.block;
  machine.block_at = at;
  machine.alive = machine.threads = size.x * size.y * size.z;
  machine.waiting = 0;
  machine.barrier_sum[machine.barrier_meeting & 1] = 0;
  if (machine.fibers.size() < machine.threads) machine.fibers.resize(machine.threads);
#if defined(UMMRM_EMULATOR_TSAN)
  machine.scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    prepare(fiber);
    fiber.number = i;
    fiber.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    fiber.state = State::ready;
  }
  for (Warp& warp : machine.warps) warp.masks = 0;
  arrange_turns();
  poison_shared_memory();
  release(&machine.block_begins);
  while (machine.alive > 0) {
    bool ran = false;
    if (machine.order == Order::interleaved) {
      ran = sweep(0, machine.threads);
    } else {  // each warp as far as it can go
      for (size_t first = 0; first < machine.threads; first = end_of_warp(first)) {
        while (sweep(first, end_of_warp(first))) ran = true;
      }
    }
    if (ran) continue;
    for (Fiber& fiber : machine.fibers) {
      if (fiber.state == State::done) continue;
      machine.current = &fiber;
      fail("waits for threads that left or went another way", fiber.what, fiber.line);
    }
  }
  acquire(&machine.block_ends);
}

Rendezvous& meeting_of(Warp& warp, unsigned mask) {
  for (unsigned i = 0; i < warp.masks; ++i) {
    if (warp.meetings[i].mask == mask) return warp.meetings[i];
  }
  if (warp.masks == kMaxMasks) fail("more masks in one warp than there is room for", "exchange", 0);
  Rendezvous& meeting = warp.meetings[warp.masks++];
  meeting.mask = mask;
  meeting.arrived = 0;
  return meeting;
}

}  // namespace

void set_order(Order order) { machine.order = order; }
const Index& thread_index() { return machine.current->index; }
const Index& block_index() { return machine.block_at; }
const Index& block_size() { return machine.block; }
const Index& grid_size() { return machine.grid; }
unsigned lane() { return machine.current->number % kWarp; }

void fail(const char* message, const char* what, int line) {
  std::fprintf(stderr, "emulator: %s at line %d: %s (block %u, thread %u)\n", what, line, message, machine.block_at.x,
               machine.current == nullptr ? 0 : machine.current->number);
  std::abort();
}

bool launch(Index grid, Index block, const std::function<void()>& body) {
  constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGrid = 65535;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) return false;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGrid || grid.z > kMaxGrid)
    return false;
  machine.grid = grid;
  machine.block = block;
  machine.body = body;
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> blocks(count);
  for (uint64_t b = 0; b < count; ++b) blocks[b] = machine.order == Order::warps_down ? count - 1 - b : b;
  if (machine.order == Order::shuffled) std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (const uint64_t b : blocks) {
    run_block({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
               static_cast<unsigned>(b / (uint64_t{grid.x} * grid.y))});
  }
  machine.current = nullptr;
  return true;
}

const uint64_t* exchange(unsigned mask, uint64_t value, bool fence, const char* what, int line) {
  const unsigned number = machine.current->number, self = number % kWarp;
  if ((mask >> self & 1) == 0) fail("the calling lane is not in its own mask", what, line);
  Rendezvous& meeting = meeting_of(machine.warps[number / kWarp], mask);
  if (meeting.arrived != 0 && (meeting.line != line || std::strcmp(meeting.what, what) != 0)) {
    fail("lanes of one mask meet in different collectives", what, line);
  }
  meeting.what = what;
  meeting.line = line;
  uint64_t* values = meeting.values[meeting.meeting & 1];
  values[self] = value;
  meeting.arrived |= 1u << self;
  if (fence) release(&meeting);
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.meeting;
    for (unsigned i = number - self; i < std::min(machine.threads, number - self + kWarp); ++i) {
      Fiber& other = machine.fibers[i];
      if (other.state == State::at_rendezvous && other.waits_with == mask) other.state = State::ready;
    }
  } else {
    wait(State::at_rendezvous, mask, what, line);
  }
  if (fence) acquire(&meeting);
  return values;
}

int barrier(int value, int line) {
  if (machine.waiting > 0 && machine.barrier_line != line) {
    fail("threads meet in different barriers", "__syncthreads", line);
  }
  machine.barrier_line = line;
  const int meeting = machine.barrier_meeting & 1;
  machine.barrier_sum[meeting] += value;
  release(&machine.barrier_sum[meeting]);
  if (++machine.waiting == machine.alive) {
    open_barrier();
  } else {
    wait(State::at_barrier, 0, "__syncthreads", line);
  }
  acquire(&machine.barrier_sum[meeting]);
  return machine.barrier_sum[meeting];
}

}  // namespace emulator
