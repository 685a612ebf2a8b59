// Small kernels written by hand, for the machine's own tests: the text around a body, memory that the machine knows to
// the byte, and what a launch says that fails.
#pragma once

#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "testing.h"

namespace snippet {

// A kernel of `parameters` pointers, in %d0 to %d<n - 1>; %r0 is the thread. Registers of every kind are declared,
// %h<8> %r<40> %d<40> %f<200> %e<8> %p<8>, of which the body may use what is left. Its first line is kFirstLine.
inline constexpr int kFirstLine = 3;
inline std::string kernel(const std::string& body, int parameters, const std::string& variables = "") {
  std::string text = ".version 9.0 .target sm_90a .address_size 64 " + variables + " .visible .entry k(";
  for (int i = 0; i < parameters; ++i) text += std::string(i == 0 ? "" : ", ") + ".param .u64 a" + std::to_string(i);
  text +=
      ") { .reg .b16 %h<8>; .reg .b32 %r<40>; .reg .b64 %d<40>; .reg .f32 %f<200>; .reg .f64 %e<8>; .reg .pred "
      "%p<8>;\n";
  for (int i = 0; i < parameters; ++i) {
    text += "ld.param.u64 %d" + std::to_string(i) + ", [a" + std::to_string(i) + "]; ";
  }
  return text + "mov.u32 %r0, %tid.x;\n" + body + "\nret; }\n";
}

// Device memory of just so many elements, aligned as tensors are.
template <class T>
class Device {
 public:
  explicit Device(size_t count) : bytes_(count * sizeof(T)) {
    memory_ = std::aligned_alloc(512, (bytes_ + 1023) / 512 * 512);
    std::memset(memory_, 0xff, (bytes_ + 1023) / 512 * 512);
    ptx::add_memory(memory_, bytes_);
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    for (size_t i = 0; i < values.size(); ++i) (*this)[i] = values[i];
  }
  Device(const Device&) = delete;
  ~Device() {
    ptx::remove_memory(memory_);
    std::free(memory_);
  }
  T& operator[](size_t i) { return static_cast<T*>(memory_)[i]; }
  size_t size() const { return bytes_ / sizeof(T); }
  void* data() { return memory_; }

 private:
  size_t bytes_;
  void* memory_;
};

struct Shape {
  ptx::Dim grid{}, block{32}, cluster{};
  unsigned dynamic_shared = 0;
};

// Runs a kernel's text; returns what is wrong, or nothing.
inline std::string run(const std::string& text, const std::vector<void*>& arguments, const Shape& shape = {}) {
  try {
    ptx::Module module = ptx::parse(text);
    ptx::launch(*module.find("k"), shape.grid, shape.block, shape.cluster, shape.dynamic_shared, arguments.data());
  } catch (const ptx::Error& error) {
    return error.what();
  }
  return {};
}

// In every order of asynchronous work, and with some seeds of the shuffled one: the first that is wrong.
inline std::string run_in_all_orders(const std::function<std::string()>& body, unsigned seeds = 4) {
  const ptx::Options usual = ptx::options;
  std::string fault;
  for (const auto order : {ptx::Order::at_once, ptx::Order::late, ptx::Order::random}) {
    for (unsigned seed = 0; seed <= seeds && fault.empty(); ++seed) {
      ptx::options.order = order, ptx::options.shuffle = seed != 0, ptx::options.seed = seed;
      fault = body();
    }
  }
  ptx::options = usual;
  return fault;
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

#define CHECK_PASSES(expression)                 \
  do {                                           \
    const std::string fault_ = (expression);     \
    CHECK(fault_.empty(), "%s", fault_.c_str()); \
  } while (false)

#define CHECK_FAILS(expression, part)                                                            \
  do {                                                                                           \
    const std::string fault_ = (expression);                                                     \
    CHECK(snippet::contains(fault_, part), "expected \"%s\", got \"%s\"", part, fault_.c_str()); \
  } while (false)

}  // namespace snippet
