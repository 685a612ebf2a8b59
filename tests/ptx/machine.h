// The machine: what a launch holds while it runs, and what one instruction sees of it. A warp runs the lanes at one
// program counter together; warps of several clusters take turns (scheduler.cpp). Registers hold 64 bits a lane,
// smaller values with zeros above.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <vector>

#include "clocks.h"
#include "program.h"
#include "tensor_map.h"

namespace ptx {

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  uint64_t size() const { return uint64_t{x} * y * z; }
};

// When asynchronous work (copies, tensor copies, wgmma) is done.
enum class Order { at_once, late, random };

struct Options {
  Order order = Order::at_once;
  bool shuffle = false;  // warps, clusters and lanes of a warp in an order that `seed` draws
  unsigned seed = 1;
  uint64_t most_instructions = uint64_t{1} << 36;  // of warps, in a launch; more is taken for a loop without an end
  int resident_blocks = 8;                         // blocks that take turns; at least one cluster does
};
extern Options options;

// What happened since the counts were last set to zero.
struct Counts {
  uint64_t instructions = 0;  // of warps
  uint64_t launches = 0, clusters = 0;
  uint64_t products = 0;  // wgmma, counted for each of its four warps
  uint64_t mma = 0;       // mma.sync
  uint64_t tensor_loads = 0, tensor_stores = 0;
};
extern Counts counts;

// Runs a kernel to its end. Throws an Error that names line, block and warp.
void launch(Kernel& kernel, Dim grid, Dim block, Dim cluster, unsigned dynamic_shared, const void* parameters);

struct Block;
struct Cluster;
struct Launch;

struct WarpProduct {  // a wgmma that was issued
  const Instruction* instruction;
  uint64_t a, b;  // descriptors
  bool add;       // to the accumulators, else instead of them
  bool done = false;
};

struct Copy {  // cp.async of one lane
  uint32_t to;
  uint64_t from;
  int bytes, real;  // what lies behind `real` becomes zero
};

struct TensorStore {
  TensorMap map;
  std::array<int32_t, 5> at;
  uint32_t from;
  std::vector<unsigned char> data;  // once it was read
  bool read = false, done = false;
};

struct TensorLoad {
  TensorMap map;
  std::array<int32_t, 5> at;
  std::vector<Block*> targets;
  uint32_t to, barrier;
  std::vector<Block*> barriers;  // one a target
};

struct Warp {
  Block* block;
  int id;  // in its block
  std::vector<uint64_t> registers;
  std::array<uint32_t, kLanes> pc{};
  uint32_t alive = 0;
  uint32_t parked = 0;  // lanes that wait for others of the warp at an instruction for several
  uint32_t asleep = 0;  // lanes that wait for a barrier in memory
  uint32_t held = 0;    // lanes that stand back in this turn, so that the others run ahead
  bool may_time_out = false;
  const Instruction* last = nullptr;  // for messages

  int barrier = -1;  // of the block, that it waits for
  uint64_t barrier_generation = 0, cluster_generation = 0;
  size_t number = 0;  // in its cluster
  Clock seen, made;   // what happened before, and barriers that it made and fenced

  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<TensorStore> stores;
  std::deque<std::vector<TensorStore>> store_groups;

  // wgmma. A group's products are done in order; the shadow says which registers they still own.
  std::vector<WarpProduct> products;
  std::deque<std::vector<WarpProduct>> product_groups;
  uint64_t committed = 0, finished = 0;  // groups
  uint64_t now = 1, fenced_at = 0;       // accesses to accumulators, and wgmma.fence, in their order
  std::vector<uint64_t> touched_at;      // of each register: when something else than a wgmma last touched it
  std::vector<uint16_t> owners;          // of each register: products under way that it belongs to
  std::vector<uint32_t> wrote;           // granules of shared memory that it wrote and has not fenced
  uint64_t stores_committed = 0;         // groups of tensor stores
  std::vector<uint32_t> products_waited, stores_waited;  // when it had waited for each group (races.h)

  uint64_t* reg(int number) { return registers.data() + static_cast<size_t>(number) * kLanes; }
};

struct Published {  // a granule of shared memory that an arrival of its writer follows
  uint32_t granule;
  size_t writer;
  uint32_t arrival;
};

struct NamedBarrier {
  unsigned arrived = 0, expected = 0;  // lanes; expected 0: all
  uint64_t generation = 0;
  const Instruction* first = nullptr;
  Clock arriving, released;
};

struct Block {
  Launch* launch;
  Cluster* cluster;
  Dim id, place;  // in the grid, in the cluster
  int rank;
  bool ended = false;
  std::vector<unsigned char> shared;
  std::vector<unsigned char> written;     // a byte each: whether anything has
  std::vector<uint16_t> unfenced;         // 16 bytes each: shadow.h
  std::vector<const Instruction*> fence;  // of these, the one that fenced them
  std::vector<Published> published;       // of these, what a barrier has shown to others
  std::map<uint32_t, int> new_barriers;   // in shared memory: who made one without a fence yet
  std::vector<Warp> warps;
  std::array<NamedBarrier, 16> barriers;
  Races races;
};

struct Cluster {
  Dim id;
  std::vector<Block> blocks;
  unsigned arrived = 0;
  uint64_t generation = 0;
  Clock arriving, released;
  std::deque<TensorLoad> loads;  // under way
  size_t barriers = 0;           // in shared memory, that were made
};

struct alignas(128) ParameterChunk {  // a tensor map may be a parameter
  unsigned char bytes[128];
};

struct Launch {
  Kernel& kernel;
  Dim grid, block, cluster;
  unsigned dynamic_shared;
  std::vector<ParameterChunk> parameters;
  std::mt19937 random;
  uint64_t events = 0;  // changes that another warp may wait for
  uint64_t clock = 0;
  std::map<uint64_t, uint64_t> released;                          // tensor maps written, and when: shadow.h
  std::map<std::pair<const Warp*, uint64_t>, uint64_t> acquired;  // and fenced by whom
};

// One instruction for the lanes that execute it.
struct Step {
  Launch& launch;
  Warp& warp;
  const Instruction& in;
  uint32_t lanes;

  const Operand& operand(size_t i) const { return in.operands[i]; }
  int first_lane() const { return __builtin_ctz(lanes); }
  [[noreturn]] void fail(const std::string& what) const;
};

[[noreturn]] void fail(const Launch& launch, const Warp& warp, const std::string& what);

// ---- values

// A value of each lane: where a register has them, or in `scratch`.
const uint64_t* values(const Step& step, const Operand& operand, uint64_t (&scratch)[kLanes]);
uint64_t value(const Step& step, const Operand& operand, int lane);
inline uint64_t address(const Step& step, const Operand& operand, int lane) { return value(step, operand, lane); }

struct Values {  // of operand `i`
  Values(const Step& step, const Operand& operand) : at(values(step, operand, scratch)) {}
  Values(const Step& step, size_t i) : Values(step, step.operand(i)) {}
  Values(const Values&) = delete;
  uint64_t operator[](int lane) const { return at[lane]; }
  uint64_t scratch[kLanes];
  const uint64_t* at;
};

// The register that takes a result, or a place for what nobody wants.
uint64_t* result(const Step& step, const Operand& operand);
inline uint64_t* result(const Step& step, size_t i) { return result(step, step.operand(i)); }

template <class Body>
inline void for_lanes(uint32_t lanes, const Body& body) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) body(__builtin_ctz(lanes));
  }
}

template <class T>
inline T as(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
inline uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
inline uint64_t truncated(uint64_t value, int bytes) {
  return bytes == 8 ? value : value & ((uint64_t{1} << 8 * bytes) - 1);
}
inline uint64_t extended(uint64_t value, Type type) {  // to 64 bits, by its sign or by zeros
  const int unused = 64 - 8 * bytes_of(type);
  return is_signed(type) ? static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused)
                         : value << unused >> unused;
}

}  // namespace ptx
