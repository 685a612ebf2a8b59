// wgmma, the products of a warp group on Hopper: PTX ISA 9.7.15. Four warps issue one together; each computes its own
// 16 rows of the tile. Operands lie in shared memory, told by descriptors (9.7.15.5), or a in registers.
#include "async.h"
#include "form.h"
#include "halves.h"
#include "memory.h"
#include "races.h"
#include "shadow.h"

namespace ptx {
namespace {

constexpr int kDepth = 16, kRows = 16, kMostColumns = 256;

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  Swizzle swizzle;
  bool offset;
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        offset((bits >> 49 & 7) != 0) {
    constexpr Swizzle kModes[] = {Swizzle::none, Swizzle::of_128, Swizzle::of_64, Swizzle::of_32};
    swizzle = kModes[bits >> 62];
  }
};

// Where eight neighbours begin, along k (of row or column `outer`), or with `transposed` along the rows or columns from
// `outer` on at one k. The canonical layouts of 9.7.15.5.1: cores of 8 x 16 bytes, of which 2^swizzle stand side by
// side.
uint32_t core_row(const Descriptor& d, bool transposed, int outer, int k) {
  const int side_by_side = 1 << static_cast<int>(d.swizzle);
  const auto u = [](int value) { return static_cast<uint32_t>(value); };
  uint32_t at = d.start;
  if (!transposed) {
    if (d.swizzle != Swizzle::none) {
      at += u(outer % 8 * 16 * side_by_side) + u(outer / 8) * d.stride + u(k * 2);
    } else {
      at += u(outer % 8 * 16) + u(outer / 8) * d.stride + u(k / 8) * d.leading;
    }
  } else {
    const int core = outer / 8;
    if (d.swizzle != Swizzle::none) {
      at += u(core % side_by_side * 16) + u(core / side_by_side) * d.leading + u(k % 8 * 16 * side_by_side) +
            u(k / 8) * d.stride;
    } else {
      at += u(core) * d.stride + u(k % 8 * 16) + u(k / 8) * d.leading;
    }
  }
  return swizzled(at, d.swizzle);
}

// body(address, outer - first, k) for every 16 bytes of `count` rows of a or columns of b from `first` on.
template <class Body>
void for_cores(uint64_t bits, bool transposed, int first, int count, const Body& body) {
  const Descriptor descriptor(bits);
  for (int outer = 0; outer < count; outer += transposed ? 8 : 1) {
    for (int k = 0; k < kDepth; k += transposed ? 1 : 8)
      body(core_row(descriptor, transposed, first + outer, k), outer, k);
  }
}

// `count` rows of a or columns of b from `first` on: put(outer - first, k, value).
template <class Put>
std::string gather(const Block& block, uint64_t bits, bool transposed, int first, int count, bool bf16,
                   const Put& put) {
  if (Descriptor(bits).offset) return "a descriptor with a base offset, which the machine does not know";
  std::string fault;
  for_cores(bits, transposed, first, count, [&](uint32_t at, int outer, int k) {
    if (fault.empty()) fault = shadow::fault_of_async_read(block, at, 16);
    if (!fault.empty()) return;
    uint16_t halves[8];
    float values[8];
    std::memcpy(halves, block.shared.data() + at, 16);
    if (bf16) {
      for (int i = 0; i < 8; ++i) values[i] = from_bf16(halves[i]);
    } else {
      for (int i = 0; i < 8; ++i) values[i] = from_f16(halves[i]);
    }
    for (int i = 0; i < 8; ++i) put(outer + (transposed ? i : 0), k + (transposed ? 0 : i), values[i]);
  });
  return fault;
}

constexpr int kSignA = 1, kSignB = 2, kTransposedA = 4, kTransposedB = 8, kBf16 = 16;  // Instruction::b; a: columns

Outcome issue(const Step& step) {
  if (step.lanes != kAllLanes) step.fail("a wgmma by a part of a warp");
  if (static_cast<size_t>(step.warp.id / 4 * 4 + 4) > step.warp.block->warps.size())
    step.fail("a wgmma without a whole warp group");
  shadow::own_accumulators(step, step.operand(0));
  WarpProduct product{&step.in, value(step, step.operand(1), 0), value(step, step.operand(2), 0),
                      value(step, step.operand(3), 0) != 0};
  const auto reads = [&](uint32_t at, int, int) {
    if (at + 16 <= step.warp.block->shared.size()) races::product_reads(step, *step.warp.block, at);
  };
  for_cores(product.a, (step.in.b & kTransposedA) != 0, step.warp.id % 4 * kRows, kRows, reads);
  for_cores(product.b, (step.in.b & kTransposedB) != 0, 0, step.in.a, reads);
  if (do_at_once(step.launch)) {
    // What came before it first.
    for (auto& group : step.warp.product_groups) {
      for (WarpProduct& earlier : group) do_product(step.launch, step.warp, earlier);
    }
    for (WarpProduct& earlier : step.warp.products) do_product(step.launch, step.warp, earlier);
    do_product(step.launch, step.warp, product);
  }
  step.warp.products.push_back(product);
  return Outcome::done;
}

Outcome fence(const Step& step) {
  if (step.warp.now != step.warp.fenced_at) ++step.in.effects;
  shadow::fence_accumulators(step.warp);
  return Outcome::done;
}

Outcome commit(const Step& step) {
  step.warp.product_groups.push_back(std::move(step.warp.products));
  step.warp.products.clear();
  ++step.warp.committed;
  ++step.launch.events;
  return Outcome::done;
}

// A product is its four warps' together: it is over when all of them have issued it, and then for all of them. So one
// warp that comes to a barrier after this may give the operands' memory back.
Outcome wait(const Step& step) {
  const uint64_t left = value(step, step.operand(0), step.first_lane());
  if (step.warp.committed <= left) return Outcome::done;
  const uint64_t target = step.warp.committed - left;
  auto& warps = step.warp.block->warps;
  const size_t first = static_cast<size_t>(step.warp.id / 4 * 4);
  for (size_t i = first; i < first + 4; ++i) {
    if (warps[i].committed < target) return Outcome::waits;
  }
  for (size_t i = first; i < first + 4; ++i) {
    for (size_t group = 0; group < warps[i].product_groups.size() && warps[i].finished + group < target; ++group) {
      for (WarpProduct& product : warps[i].product_groups[group]) do_product(step.launch, warps[i], product);
    }
  }
  for (; step.warp.finished < target; ++step.warp.finished) {
    for (const WarpProduct& product : step.warp.product_groups.front()) {
      shadow::release_accumulators(step.warp, product.instruction->operands[0]);
    }
    step.warp.product_groups.pop_front();
    races::product_waited(step.warp);
  }
  return Outcome::done;
}

Outcome nothing(const Step&) { return Outcome::done; }

// m64nNk16.f32.T.T d, a, b, scale-d, sign a, sign b, transposed a, transposed b
void product(Form& form, Instruction& in) {
  const bool whole = form.take("sync") && form.take("aligned");
  in.a = form.take_number("m64n");
  const Type d = form.take_type(), a = form.take_type(), b = form.take_type();
  const bool halves = a == b && (a == Type::bf16 || a == Type::f16);
  if (!whole || d != Type::f32 || !halves || in.a < 8 || in.a > kMostColumns || in.operands.size() != 8) return;
  if (in.operands[0].items.size() != static_cast<size_t>(in.a / 2) || in.operands[1].kind == Operand::Kind::list)
    return;
  const auto constant = [&](size_t i) { return static_cast<int64_t>(in.operands[i].value); };
  in.b = (constant(4) < 0 ? kSignA : 0) | (constant(5) < 0 ? kSignB : 0) | (constant(6) != 0 ? kTransposedA : 0) |
         (constant(7) != 0 ? kTransposedB : 0) | (a == Type::bf16 ? kBf16 : 0);
  in.execute = &issue;
}

}  // namespace

void do_product(Launch& launch, Warp& warp, WarpProduct& product) {
  if (product.done) return;
  product.done = true;
  ++counts.products;
  const Instruction& in = *product.instruction;
  const int columns = in.a;
  const bool bf16 = (in.b & kBf16) != 0;
  const float sign = ((in.b & kSignA) != 0) != ((in.b & kSignB) != 0) ? -1.f : 1.f;
  static thread_local float a[kRows][kDepth], b[kDepth][kMostColumns], sums[kRows][kMostColumns];
  std::string fault = gather(*warp.block, product.a, (in.b & kTransposedA) != 0, warp.id % 4 * kRows, kRows, bf16,
                             [&](int row, int k, float value) { a[row][k] = sign * value; });
  if (fault.empty()) {
    fault = gather(*warp.block, product.b, (in.b & kTransposedB) != 0, 0, columns, bf16,
                   [&](int column, int k, float value) { b[k][column] = value; });
  }
  if (!fault.empty()) fail(launch, warp, "the wgmma of line " + std::to_string(in.line) + ": " + fault);
  for (int row = 0; row < kRows; ++row) {
    std::memset(sums[row], 0, sizeof(float) * static_cast<size_t>(columns));
    for (int k = 0; k < kDepth; ++k) {
      const float factor = a[row][k];
      for (int column = 0; column < columns; ++column) sums[row][column] += factor * b[k][column];
    }
  }
  // The fragments of 9.7.15.4: a lane has two neighbours of rows l / 4 and l / 4 + 8 in every eight columns.
  for (size_t i = 0; i < in.operands[0].items.size(); ++i) {
    uint64_t* d = warp.reg(in.operands[0].items[i].reg);
    const int row = static_cast<int>(i) / 2 % 2 * 8, column = static_cast<int>(i) / 4 * 8 + static_cast<int>(i) % 2;
    for (int l = 0; l < kLanes; ++l) {
      const float sum = sums[row + l / 4][column + l % 4 * 2];
      d[l] = bits_of(product.add ? as<float>(d[l]) + sum : sum);
    }
  }
}

void products(Form& form, Instruction& in) {
  in.members = Instruction::kWholeWarp;
  if (form.opcode() == "setmaxnreg") {
    form.take_one({"inc", "dec"});
    form.take_type();
    if (form.take("sync") && form.take("aligned")) in.execute = &nothing;  // registers here are without number
    return;
  }
  if (form.take("mma_async")) return product(form, in);
  const int what = form.take_one({"fence", "commit_group", "wait_group"});
  if (what < 0 || !form.take("sync") || !form.take("aligned")) return;
  in.execute = what == 0 ? &fence : what == 1 ? &commit : &wait;
  in.may_be_idle = what == 0;
}

}  // namespace ptx
