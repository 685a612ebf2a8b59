// The 128 bytes of a tensor map, whose layout NVIDIA does not tell: what the machine's cuTensorMapEncodeTiled writes,
// tensormap.replace changes and tensor copies read (PTX ISA 5.5.8 and 9.7.9.25 to 27). Rules that hardware checks are
// checked where a copy uses it.
#pragma once

#include <cstdint>
#include <string>

namespace ptx {

enum class Swizzle : uint8_t { none, of_32, of_64, of_128 };  // bytes; CUtensorMapSwizzle's numbers

struct TensorMap {
  static constexpr uint32_t kMark = 0x50414d54;
  uint32_t mark;
  uint8_t element_bytes, rank;
  Swizzle swizzle;
  uint8_t zero;
  uint64_t address;
  uint32_t size[5];
  uint32_t unused;
  uint64_t stride[4];  // bytes, of dimensions 1 to 4
  uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

// What is wrong with it; empty: nothing.
std::string fault_of(const TensorMap& map);

// The place of a byte of a swizzled tile: its 16-byte piece is mixed with the number of its row of 128 bytes
// (PTX ISA 5.5.7).
inline uint32_t swizzled(uint32_t at, Swizzle swizzle) {
  const uint32_t mask = (1u << static_cast<int>(swizzle)) - 1;
  return at ^ ((at >> 7 & mask) << 4);
}

}  // namespace ptx
