// Tensor copies between device and shared memory, their tensor maps, and changes of those on the device: PTX
// ISA 9.7.9.25.5 (cp.async.bulk) and 9.7.9.26 (tensormap).
#include <cstdio>

#include "async.h"
#include "barriers.h"
#include "form.h"
#include "memory.h"
#include "races.h"
#include "shadow.h"

namespace ptx {
namespace {

constexpr uint32_t kPiece = 16;  // bytes that a swizzle moves together

// body(offset in the tile, address of the first byte, bytes) for the pieces of a box; address 0: outside the tensor.
template <class Body>
void for_pieces(const TensorMap& map, const std::array<int32_t, 5>& at, const Body& body) {
  unsigned rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  const uint32_t each = map.element_bytes, row_bytes = map.box[0] * each;
  for (unsigned row = 0; row < rows; ++row) {
    uint64_t address = map.address;
    bool inside = true;
    unsigned left = row;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t index = at[static_cast<size_t>(d)] + static_cast<int64_t>(left % map.box[d]);
      left /= map.box[d];
      inside = inside && index >= 0 && index < map.size[d];
      address += static_cast<uint64_t>(index) * map.stride[d - 1];
    }
    for (uint32_t byte = 0; byte < row_bytes;) {
      const int64_t index = at[0] + static_cast<int64_t>(byte / each);
      const bool here = inside && index >= 0 && index < map.size[0];
      // As many elements of one piece as are alike.
      uint32_t end = byte + each;
      while (end < row_bytes && end % kPiece != 0) {
        const int64_t next = at[0] + static_cast<int64_t>(end / each);
        if ((inside && next >= 0 && next < map.size[0]) != here) break;
        end += each;
      }
      body(row * row_bytes + byte, here ? address + static_cast<uint64_t>(index) * each : 0, end - byte);
      byte = end;
    }
  }
}

std::string hexadecimal(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
  return text;
}

TensorMap map_at(const Step& step, const Operand& operand, int lane) {
  const uint64_t at = address(step, operand, lane);
  const Place place = place_of(step, Space::generic, at, 128, 64);
  if (place.block != nullptr) step.fail("a tensor map in shared memory");
  TensorMap map;
  std::memcpy(&map, place.at, sizeof map);
  if (const std::string fault = fault_of(map); !fault.empty()) step.fail(fault);
  shadow::check_map(step, at);
  return map;
}

std::array<int32_t, 5> coordinates(const Step& step, const TensorMap& map, const Operand& list, int lane) {
  std::array<int32_t, 5> at{};
  if (list.items.size() != map.rank) step.fail("coordinates of another rank than the tensor map's");
  for (size_t d = 0; d < list.items.size(); ++d) at[d] = static_cast<int32_t>(value(step, list.items[d], lane));
  return at;
}

Place tile_at(const Step& step, const Operand& operand, int lane) {
  return place_of(step, Space::shared, address(step, operand, lane), 16, 128);
}

// [to], [map, {coordinates}], [barrier]{, mask of blocks}{, cache hint}. a: the mask is there.
Outcome start_load(const Step& step) {
  Cluster& cluster = *step.warp.block->cluster;
  for_lanes(step.lanes, [&](int l) {
    TensorLoad load{};
    load.map = map_at(step, step.operand(1).items[0], l);
    load.at = coordinates(step, load.map, step.operand(1).items[1], l);
    const Place to = tile_at(step, step.operand(0), l);
    const Place barrier = place_of(step, Space::shared, address(step, step.operand(2), l), 8);
    load.to = to.offset;
    load.barrier = barrier.offset;
    if (step.in.a != 0) {  // the same offsets in every block of the mask
      const uint64_t mask = value(step, step.operand(3), l) & 0xffff;
      if (mask >> cluster.blocks.size() != 0) step.fail("a copy to a block that the cluster does not have");
      for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
        if ((mask >> rank & 1) == 0) continue;
        load.targets.push_back(&cluster.blocks[rank]);
        load.barriers.push_back(&cluster.blocks[rank]);
      }
    } else {
      load.targets = {to.block};
      load.barriers = {barrier.block};
    }
    for (size_t i = 0; i < load.targets.size(); ++i) {
      Block& block = *load.targets[i];
      if (block.ended) step.fail("a copy to a block that has ended");
      const Place at = {load.barriers[i]->shared.data() + load.barrier, load.barriers[i], load.barrier};
      shadow::check_written(step, at, 8);
      shadow::check_barrier(step, at);
      races::check_barrier(step, at);
      for_pieces(load.map, load.at, [&](uint32_t offset, uint64_t from, uint32_t bytes) {
        const uint32_t place = swizzled(load.to + offset, load.map.swizzle);
        if (place + bytes > block.shared.size()) step.fail("a tensor copy beyond shared memory");
        if (from != 0 && !known_memory(from, bytes)) {
          step.fail("a tensor copy reads device memory out of bounds, " + hexadecimal(from));
        }
        races::check_load(step, block, place, bytes);
        shadow::will_write(block, place, static_cast<int>(bytes));
      });
      for_pieces(load.map, load.at, [&](uint32_t offset, uint64_t, uint32_t bytes) {
        races::load_starts(block, swizzled(load.to + offset, load.map.swizzle), bytes);
      });
    }
    cluster.loads.push_back(std::move(load));
    if (do_at_once(step.launch)) do_load(step.launch, cluster, cluster.loads.size() - 1);
  });
  return Outcome::done;
}

// [map, {coordinates}], [from]
Outcome start_store(const Step& step) {
  for_lanes(step.lanes, [&](int l) {
    TensorStore store{};
    store.map = map_at(step, step.operand(0).items[0], l);
    store.at = coordinates(step, store.map, step.operand(0).items[1], l);
    store.from = tile_at(step, step.operand(1), l).offset;
    for_pieces(store.map, store.at, [&](uint32_t offset, uint64_t to, uint32_t bytes) {
      if (to == 0) return;
      const uint32_t place = swizzled(store.from + offset, store.map.swizzle);
      const std::string fault = shadow::fault_of_async_read(*step.warp.block, place, static_cast<int>(bytes));
      if (!fault.empty()) step.fail(fault);
      races::store_reads(step, place, bytes);
      if (!known_memory(to, bytes)) step.fail("a tensor copy writes device memory out of bounds, " + hexadecimal(to));
    });
    if (do_at_once(step.launch)) {
      read_store(step.launch, step.warp, store);
      do_store(step.launch, step.warp, store);
    }
    step.warp.stores.push_back(std::move(store));
  });
  return Outcome::done;
}

Outcome commit(const Step& step) {
  if (!step.warp.stores.empty()) ++step.in.effects;
  step.warp.store_groups.push_back(std::move(step.warp.stores));
  step.warp.stores.clear();
  ++step.warp.stores_committed;
  return Outcome::done;
}

// a: until shared memory has been read (.read); what is stored is visible when it is waited for without, or at the end.
Outcome wait(const Step& step) {
  auto& groups = step.warp.store_groups;
  const uint64_t left = value(step, step.operand(0), step.first_lane()), all = step.warp.stores_committed;
  // Groups that were waited for before, to be read at least.
  const uint64_t before = step.in.a != 0 ? step.warp.stores_waited.size() : all - groups.size();
  for (uint64_t i = before; i + left < all; ++i) {
    if (!groups[groups.size() - (all - i)].empty()) ++step.in.effects;
  }
  races::stores_waited(step.warp, all - std::min(all, left));
  if (step.in.a != 0) {
    for (size_t i = 0; i + left < groups.size(); ++i) {
      for (TensorStore& store : groups[i]) read_store(step.launch, step.warp, store);
    }
    return Outcome::done;
  }
  while (groups.size() > left) {
    for (TensorStore& store : groups.front()) {
      read_store(step.launch, step.warp, store);
      do_store(step.launch, step.warp, store);
    }
    groups.pop_front();
  }
  return Outcome::done;
}

// ---- tensormap

enum Field { kAddress, kSize, kStride, kBox, kRank };  // Instruction::a

Outcome replace(const Step& step) {
  for_lanes(step.lanes, [&](int l) {
    const uint64_t at = address(step, step.operand(0), l);
    const Place place = place_of(step, step.in.space, at, 128, 64);
    TensorMap map;
    std::memcpy(&map, place.at, sizeof map);
    if (map.mark != TensorMap::kMark) step.fail("this is no tensor map");
    const uint64_t given = value(step, step.operand(1), l);
    const uint64_t next = step.in.operands.size() > 2 ? value(step, step.operand(2), l) : 0;
    const bool fits = step.in.a == kAddress || given < (step.in.a == kStride ? 4 : 5);
    if (!fits) step.fail("a dimension that a tensor map does not have");
    switch (step.in.a) {
      case kAddress: map.address = given; break;
      case kSize: map.size[given] = static_cast<uint32_t>(next); break;
      default: map.stride[given] = next;
    }
    std::memcpy(place.at, &map, sizeof map);
    races::wrote(step, place, 128);
    if (place.block == nullptr) shadow::map_written(step.launch, at);
  });
  return Outcome::done;
}

// By a warp together: 128 bytes from shared to device memory, released to other proxies.
Outcome copy_map(const Step& step) {
  const int lane = step.first_lane();
  const uint64_t to = address(step, step.operand(0), lane);
  const Place there = place_of(step, Space::global, to, 128);
  const Place from = place_of(step, Space::shared, address(step, step.operand(1), lane), 128);
  shadow::check_written(step, from, 128);
  races::read(step, from, 128);
  std::memcpy(there.at, from.at, 128);
  shadow::map_written(step.launch, to);
  return Outcome::done;
}

}  // namespace

void do_load(Launch& launch, Cluster& cluster, size_t index) {
  const TensorLoad load = std::move(cluster.loads[index]);
  cluster.loads.erase(cluster.loads.begin() + static_cast<std::ptrdiff_t>(index));
  ++counts.tensor_loads;
  for (size_t i = 0; i < load.targets.size(); ++i) {
    Block& block = *load.targets[i];
    if (block.ended) throw Error("a tensor copy to a block that has ended, in " + launch.kernel.name);
    int total = 0;
    for_pieces(load.map, load.at, [&](uint32_t offset, uint64_t from, uint32_t bytes) {
      const uint32_t place = swizzled(load.to + offset, load.map.swizzle);
      if (from != 0) {
        std::memcpy(block.shared.data() + place, reinterpret_cast<const void*>(from), bytes);
      } else {
        std::memset(block.shared.data() + place, 0, bytes);
      }
      shadow::arrived(block, place, static_cast<int>(bytes));
      races::load_ends(block, place, bytes, *load.barriers[i], load.barrier);
      total += static_cast<int>(bytes);
    });
    const std::string fault = update_barrier(launch, *load.barriers[i], load.barrier, 0, -total);
    if (!fault.empty()) throw Error(fault + ", by a tensor copy in " + launch.kernel.name);
  }
}

void read_store(Launch& launch, Warp& warp, TensorStore& store) {
  if (store.read) return;
  for_pieces(store.map, store.at, [&](uint32_t offset, uint64_t to, uint32_t bytes) {
    if (to == 0) return;
    const uint32_t place = swizzled(store.from + offset, store.map.swizzle);
    const std::string fault = shadow::fault_of_async_read(*warp.block, place, static_cast<int>(bytes));
    if (!fault.empty()) fail(launch, warp, "a tensor store under way: " + fault);
    const unsigned char* from = warp.block->shared.data() + place;
    store.data.insert(store.data.end(), from, from + bytes);
  });
  store.read = true;
}

void do_store(Launch& launch, Warp& warp, TensorStore& store) {
  static_cast<void>(launch), static_cast<void>(warp);
  if (store.done) return;
  ++counts.tensor_stores;
  size_t next = 0;
  for_pieces(store.map, store.at, [&](uint32_t, uint64_t to, uint32_t bytes) {
    if (to == 0) return;
    std::memcpy(reinterpret_cast<void*>(to), store.data.data() + next, bytes);
    next += bytes;
  });
  store.done = true;
}

std::string fault_of(const TensorMap& map) {
  if (map.mark != TensorMap::kMark) return "this is no tensor map";
  if (map.address % 16 != 0) return "a tensor map whose address is no multiple of 16";
  for (int d = 0; d < map.rank; ++d) {
    if (map.size[d] == 0) return "a tensor map with a dimension of 0";
    if (d > 0 && map.stride[d - 1] % 16 != 0) return "a tensor map with a stride that is no multiple of 16";
  }
  return {};
}

void tensors(Form& form, Instruction& in) {
  if (form.opcode() == "tensormap") {
    if (form.take("cp_fenceproxy")) {
      in.members = Instruction::kWholeWarp;
      const bool known = form.take("global") && form.take("shared::cta") && form.take("tensormap::generic") &&
                         form.take("release") && form.take_one({"gpu", "sys", "cluster", "cta"}) >= 0 &&
                         form.take("sync") && form.take("aligned");
      if (known) in.execute = &copy_map;
    } else if (form.take("replace") && form.take("tile")) {
      in.a = form.take_one({"global_address", "global_dim", "global_stride"});
      in.space = form.take_space();
      form.take_type();
      if (form.take("b1024") && in.a >= 0) in.execute = &replace;
    }
    return;
  }
  if (form.take("commit_group")) {
    in.may_be_idle = true;
    in.execute = &commit;
  } else if (form.take("wait_group")) {
    in.may_be_idle = true;
    in.a = form.take("read");
    in.execute = &wait;
  } else if (form.take("tensor")) {
    for (const char* rank : {"1d", "2d", "3d", "4d", "5d"})
      form.take(rank);  // the map knows, and the list of coordinates
    form.take("tile");
    form.take("L2::cache_hint");
    if (form.take("bulk_group")) {
      if (form.take("global") && form.take("shared::cta")) in.execute = &start_store;
    } else if (form.take("mbarrier::complete_tx::bytes")) {
      in.a = form.take("multicast::cluster");
      const bool known = (form.take("shared::cluster") || form.take("shared::cta")) && form.take("global");
      if (known) in.execute = &start_load;
    }
  }
}

}  // namespace ptx
