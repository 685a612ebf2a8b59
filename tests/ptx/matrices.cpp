// Matrix tiles of a warp: ldmatrix, stmatrix and mma.sync, with the layouts of fragments of PTX ISA 9.7.14.5.
#include "form.h"
#include "halves.h"
#include "memory.h"
#include "races.h"
#include "shadow.h"

namespace ptx {
namespace {

using Matrix = uint16_t[8][8];

void check_whole(const Step& step) {
  if (step.lanes != kAllLanes) step.fail("a matrix instruction by a part of a warp");
}

// A lane holds two neighbours of row l / 4, or of a column where the matrix is transposed on its way.
uint32_t fragment(const Matrix& matrix, int lane, bool transposed) {
  const int row = lane / 4, column = lane % 4 * 2;
  return transposed ? matrix[column][row] | uint32_t{matrix[column + 1][row]} << 16
                    : matrix[row][column] | uint32_t{matrix[row][column + 1]} << 16;
}

// Lanes 8i to 8i + 7 give the rows of matrix i. b: transposed.
Outcome load_matrices(const Step& step) {
  check_whole(step);
  const auto& to = step.operand(0).items;
  uint32_t loaded[4][kLanes];
  for (size_t i = 0; i < to.size(); ++i) {
    Matrix matrix;
    for (int row = 0; row < 8; ++row) {
      const uint64_t at = address(step, step.operand(1), static_cast<int>(i) * 8 + row);
      const Place place = place_of(step, Space::shared, at, 16);
      if (shadow::written(*place.block, place.offset, 16)) {
        std::memcpy(matrix[row], place.at, 16);
        if (!step.launch.kernel.reads_ahead) races::read(step, place, 16);
      } else {
        std::memset(matrix[row], 0xff, 16);  // NaN
      }
    }
    for (int l = 0; l < kLanes; ++l) loaded[i][l] = fragment(matrix, l, step.in.b != 0);
  }
  for (size_t i = 0; i < to.size(); ++i) {
    uint64_t* out = result(step, to[i]);
    for (int l = 0; l < kLanes; ++l) out[l] = loaded[i][l];
  }
  return Outcome::done;
}

Outcome store_matrices(const Step& step) {
  check_whole(step);
  const auto& from = step.operand(1).items;
  for (size_t i = 0; i < from.size(); ++i) {
    const Values part(step, from[i]);
    Matrix matrix;
    for (int l = 0; l < kLanes; ++l) {
      const auto pair = static_cast<uint32_t>(part[l]);
      const int row = l / 4, column = l % 4 * 2;
      const auto low = static_cast<uint16_t>(pair), high = static_cast<uint16_t>(pair >> 16);
      if (step.in.b != 0) {
        matrix[column][row] = low, matrix[column + 1][row] = high;
      } else {
        matrix[row][column] = low, matrix[row][column + 1] = high;
      }
    }
    for (int row = 0; row < 8; ++row) {
      const uint64_t at = address(step, step.operand(0), static_cast<int>(i) * 8 + row);
      const Place place = place_of(step, Space::shared, at, 16);
      std::memcpy(place.at, matrix[row], 16);
      shadow::wrote(step.warp, place, 16);
      races::wrote(step, place, 16);
    }
  }
  return Outcome::done;
}

// d = a x b + c in fp32, of m16n8k16 for halves and m16n8k8 for TF32, whose fragments are alike: 16 bytes of a row of
// a, or of a column of b, in four lanes. Hardware adds with fewer bits and in an order of its own.
Outcome multiply(const Step& step) {
  check_whole(step);
  ++counts.mma;
  const auto type = static_cast<Type>(step.in.b);
  const int each = type == Type::tf32 ? 1 : 2;  // numbers of a register
  const auto number = [&](uint64_t bits, int which) {
    const auto half = static_cast<uint16_t>(bits >> 16 * which);
    return type == Type::tf32   ? from_tf32(static_cast<uint32_t>(bits))
           : type == Type::bf16 ? from_bf16(half)
                                : from_f16(half);
  };
  float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 4; ++i) {
    const Values part(step, step.operand(1).items[static_cast<size_t>(i)]);
    for (int l = 0; l < kLanes; ++l) {
      for (int h = 0; h < each; ++h) {
        a[l / 4 + i % 2 * 8][l % 4 * each + i / 2 * 4 * each + h] = number(part[l], h);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    const Values part(step, step.operand(2).items[static_cast<size_t>(i)]);
    for (int l = 0; l < kLanes; ++l) {
      for (int h = 0; h < each; ++h) b[l % 4 * each + i * 4 * each + h][l / 4] = number(part[l], h);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < 8 * each; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    }
    std::memcpy(d[row], sums, sizeof sums);
  }
  for (int i = 0; i < 4; ++i) {
    const Values part(step, step.operand(3).items[static_cast<size_t>(i)]);
    for (int l = 0; l < kLanes; ++l) d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] += as<float>(part[l]);
  }
  for (int i = 0; i < 4; ++i) {
    uint64_t* out = result(step, step.operand(0).items[static_cast<size_t>(i)]);
    for (int l = 0; l < kLanes; ++l) out[l] = bits_of(d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
  }
  return Outcome::done;
}

}  // namespace

void matrices(Form& form, Instruction& in) {
  const std::string_view op = form.opcode();
  in.members = Instruction::kWholeWarp;
  if (!form.take("sync") || !form.take("aligned")) return;
  if (op == "mma") {
    const int shape = form.take_one({"m16n8k16", "m16n8k8"});
    if (shape < 0 || !form.take("row") || !form.take("col")) return;
    const Type d = form.take_type(), a = form.take_type(), b = form.take_type(), c = form.take_type();
    in.b = static_cast<int>(a);
    const bool known = shape == 0 ? a == Type::bf16 || a == Type::f16 : a == Type::tf32;
    if (d == Type::f32 && c == Type::f32 && a == b && known) in.execute = &multiply;
    return;
  }
  in.b = form.take("trans");
  const int count = form.take_number("x");
  in.type = form.take_type();
  if (!form.take("m8n8") || form.take_space() != Space::shared || in.type != Type::b16) return;
  const Operand& list = in.operands[op == "ldmatrix" ? 0 : 1];
  if (list.items.size() == static_cast<size_t>(count)) in.execute = op == "ldmatrix" ? &load_matrices : &store_matrices;
}

}  // namespace ptx
