// PTX as the machine keeps it: kernels, instructions and operands, made of text by the parser and given what executes
// them by the decoder. Written after NVIDIA's "PTX ISA", whose chapters the files here name: 4 (syntax), 5 (state
// spaces, types, variables), 9 (instructions). What nvcc makes of this project's kernels is here, and no more.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

// What is wrong with a program or with what it does; the message names the line of the PTX.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : uint8_t {
  none,
  pred,
  b8,
  b16,
  b32,
  b64,
  u8,
  u16,
  u32,
  u64,
  s8,
  s16,
  s32,
  s64,
  f16,
  bf16,
  f32,
  f64,
  f16x2,
  bf16x2,
  tf32
};

Type type_named(std::string_view name);  // none: it is no type
int bytes_of(Type type);
bool is_signed(Type type);
bool is_float(Type type);

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  cluster_ctarank,
  cluster_nctarank,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  cluster_nctaid_y,
  cluster_nctaid_z,
  clusterid_x,
  clusterid_y,
  clusterid_z,
  nclusterid_x,
  nclusterid_y,
  nclusterid_z,
  smid,
  clock,
  clock64
};

struct Operand {
  enum class Kind : uint8_t { none, reg, constant, parameter, special, list, sink } kind = Kind::none;
  bool negated = false;        // !p
  int reg = -1;                // of a value, or the base of an address
  int second = -1;             // p of d|p
  int64_t offset = 0;          // of an address
  uint64_t value = 0;          // of a constant; the offset of a parameter; the number of a special register
  std::vector<Operand> items;  // {a, b}; [map, {c0, c1}] is a list of an address and a list
};

struct Step;  // machine.h
enum class Outcome : uint8_t { done, waits };
using Execute = Outcome (*)(const Step&);

// Where an address points: PTX ISA 5.1. `generic` is decided when it is used.
enum class Space : uint8_t { generic, global, shared, cluster, parameter };

// What the scheduler itself has to know of an instruction.
enum class Flow : uint8_t { next, branch, exit };

struct Instruction {
  std::string text;  // opcode with its modifiers
  std::vector<Operand> operands;
  int guard = -1;
  bool guard_negated = false;
  int target = -1;  // of a branch
  int line = 0;

  // By the decoder:
  Execute execute = nullptr;
  Flow flow = Flow::next;
  Type type = Type::none;
  Space space = Space::generic;
  int8_t members = -1;           // the operand that says which lanes come together; kWholeWarp: all that are alive
  bool may_sleep = false;        // a test of a barrier that may wait for it: the lanes sleep, others go on
  bool on_accumulators = false;  // touches registers of a wgmma without being one (wgmma.cpp)
  int a = 0, b = 0;              // what a family keeps of the modifiers
  uint64_t runs = 0;             // how often warps came to it
  // Of an instruction that synchronises, and that may do so for nothing (races.h): whether it has.
  bool may_be_idle = false;
  mutable uint64_t effects = 0;
  static constexpr int8_t kAlone = -1, kWholeWarp = -2;
};

struct Parameter {
  std::string name;
  int bytes, offset;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  std::vector<Instruction> code;
  int registers = 0;
  int static_shared = 0;  // bytes
  int max_threads = 0;    // .maxntid; 0: not said
  bool decoded = false;
  bool has_products = false;  // wgmma
  // CUTLASS's kernels for Ampere load fragments of a stage that they may not use: what nothing has written is NaN
  // there, not an error.
  bool reads_ahead = false;
};

// Shared addresses start here, so that null is none; what is dynamic starts behind what is static.
inline constexpr uint32_t kSharedBase = 1024;
inline uint32_t dynamic_base(const Kernel& kernel) {
  return kSharedBase + static_cast<uint32_t>(kernel.static_shared + 1023) / 1024 * 1024;
}

struct Module {
  std::string target;
  std::vector<Kernel> kernels;
  std::vector<std::unique_ptr<class Global>> globals;  // variables in device memory
  Module();
  Module(Module&&);
  ~Module();
  Kernel* find(std::string_view name);
};

Module parse(std::string_view text);

// Finds what executes each instruction; throws an Error that names the first one that nothing here does, with its line.
void decode(Kernel& kernel);

// Does nothing from now on: what a program without this instruction would do. A test of a barrier says that it is over.
void leave_out(Instruction& instruction);

}  // namespace ptx
