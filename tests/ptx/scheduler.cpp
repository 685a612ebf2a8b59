// Who runs next. A warp runs its lanes at the lowest program counter until they come to an instruction for several
// lanes, where they wait for each other, or for a barrier. Warps of the clusters that are resident take turns, in order
// or as a seed draws it: then a turn is short, clusters start in any order, and some lanes of a warp may run ahead of
// the rest (PTX ISA 3.1: nothing is promised of their order). Where nobody can go on, asynchronous work that is under
// way is done, then waits that may give up do, and then it is a deadlock.
#include <algorithm>
#include <numeric>

#include "async.h"
#include "barriers.h"
#include "machine.h"
#include "memory.h"
#include "races.h"
#include "shadow.h"

namespace ptx {

Options options;
Counts counts;

namespace {

constexpr int kTurn = 1 << 20, kShortTurn = 400;  // instructions
constexpr int kIdleRounds = 3;
constexpr unsigned kLag = 32;  // one that is slow has a turn in so many

std::string where(const Warp& warp) {
  return "block " + std::to_string(warp.block->id.x) + "," + std::to_string(warp.block->id.y) + "," +
         std::to_string(warp.block->id.z) + " warp " + std::to_string(warp.id);
}

enum class Turn { ended, waits, more };

class Scheduler {
 public:
  explicit Scheduler(Launch& launch) : launch_(launch) {
    // By the seed itself, so that a few seeds in a row have had each of them.
    if (options.shuffle) slow_kind_ = static_cast<Slow>(options.seed % 4), slow_ = options.seed / 4;
  }

  void run() {
    const Dim &grid = launch_.grid, &cluster = launch_.cluster;
    std::vector<uint64_t> order(grid.size() / cluster.size());
    std::iota(order.begin(), order.end(), 0);
    if (options.shuffle) std::shuffle(order.begin(), order.end(), launch_.random);
    const size_t resident = std::max<size_t>(1, static_cast<size_t>(options.resident_blocks) / cluster.size());
    size_t next = 0;
    while (next < order.size() || !running_.empty()) {
      while (running_.size() < resident && next < order.size()) start(order[next++]);
      round();
    }
  }

 private:
  void start(uint64_t number) {
    const Dim &grid = launch_.grid, &size = launch_.cluster;
    const unsigned wide = grid.x / size.x, high = grid.y / size.y;
    auto cluster = std::make_unique<Cluster>();
    cluster->id = {static_cast<unsigned>(number % wide), static_cast<unsigned>(number / wide % high),
                   static_cast<unsigned>(number / wide / high)};
    cluster->blocks.resize(size.size());
    for (unsigned rank = 0; rank < size.size(); ++rank) {
      Block& block = cluster->blocks[rank];
      block.launch = &launch_;
      block.cluster = cluster.get();
      block.rank = static_cast<int>(rank);
      block.place = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
      block.id = {cluster->id.x * size.x + block.place.x, cluster->id.y * size.y + block.place.y,
                  cluster->id.z * size.z + block.place.z};
      // Garbage at start: all ones are NaN in every type.
      block.shared.assign(dynamic_base(launch_.kernel) + launch_.dynamic_shared, 0xff);
      block.written.assign(block.shared.size(), 0);
      block.unfenced.assign(block.shared.size() / 16 + 1, 0);
      block.fence.assign(block.unfenced.size(), nullptr);
      const unsigned threads = static_cast<unsigned>(launch_.block.size());
      block.warps.resize((threads + kLanes - 1) / kLanes);
      for (size_t i = 0; i < block.warps.size(); ++i) start(block, block.warps[i], static_cast<int>(i), threads);
    }
    ++counts.clusters;
    running_.push_back(std::move(cluster));
  }

  void start(Block& block, Warp& warp, int id, unsigned threads) {
    constexpr uint64_t kGarbage = 0xfff7dead42c80123;  // 100.002 as fp32, NaN as fp64, true as a predicate
    const auto registers = static_cast<size_t>(launch_.kernel.registers);
    warp.block = &block;
    warp.id = id;
    warp.number = static_cast<size_t>(block.rank) * block.warps.size() + static_cast<size_t>(id);
    warp.seen.assign(launch_.cluster.size() * block.warps.size(), 0);
    warp.registers.assign(registers * kLanes, kGarbage);
    if (launch_.kernel.has_products) {
      warp.touched_at.assign(registers, 0);
      warp.owners.assign(registers, 0);
    }
    const unsigned left = threads - static_cast<unsigned>(id * kLanes);
    warp.alive = left >= kLanes ? kAllLanes : (1u << left) - 1;
    turns_.push_back(&warp);
  }

  // A turn for every warp of every resident cluster.
  void round() {
    const uint64_t before = launch_.events;
    bool busy = false;
    if (options.shuffle) std::shuffle(turns_.begin(), turns_.end(), launch_.random);
    std::vector<Warp*> slow;
    const auto run = [&](Warp& warp) {
      const int most = options.shuffle ? 1 + static_cast<int>(launch_.random() % kShortTurn) : kTurn;
      busy |= turn(warp, most) == Turn::more;
      if (options.order == Order::random && launch_.random() % 4 == 0) do_some(launch_, warp);
    };
    for (Warp* warp : turns_) {
      if (warp->alive == 0) continue;
      if (lags(*warp) && launch_.random() % kLag != 0) {
        slow.push_back(warp);
      } else {
        run(*warp);
      }
    }
    if (!busy && launch_.events == before) {  // all others wait
      for (Warp* warp : slow) run(*warp);
    }
    if (counts.instructions - at_start_ > options.most_instructions) {
      throw Error("no end after " + std::to_string(options.most_instructions) +
                  " instructions of warps:" + all_places());
    }
    remove_ended();
    if (running_.empty() || busy || launch_.events != before) {
      idle_ = 0;
      return;
    }
    for (auto& cluster : running_) {
      if (do_first(launch_, *cluster)) return;
    }
    if (++idle_ > kIdleRounds) throw Error("deadlock in " + launch_.kernel.name + ":" + all_places());
    for (Warp* warp : turns_) warp->may_time_out = true;  // once each
  }

  // In a shuffled launch a block of every cluster, a warp of every block, or a group of four may be far slower than the
  // rest.
  bool lags(const Warp& warp) const {
    switch (slow_kind_) {
      case Slow::block: return warp.block->rank == static_cast<int>(slow_ % launch_.cluster.size());
      case Slow::warp: return warp.id == static_cast<int>(slow_ % warp.block->warps.size());
      case Slow::group: return warp.id / 4 == static_cast<int>(slow_ % ((warp.block->warps.size() + 3) / 4));
      default: return false;
    }
  }

  void remove_ended() {
    const auto ended = [](const std::unique_ptr<Cluster>& cluster) {
      return std::all_of(cluster->blocks.begin(), cluster->blocks.end(),
                         [](const Block& block) { return block.ended; });
    };
    for (auto& cluster : running_) {
      for (Block& block : cluster->blocks) {
        const auto gone = [](const Warp& warp) { return warp.alive == 0; };
        if (block.ended || !std::all_of(block.warps.begin(), block.warps.end(), gone)) continue;
        for (Warp& warp : block.warps) finish(launch_, warp);
        if (const std::string fault = races::fault_of_end(block); !fault.empty()) {
          throw Error(fault + ", block " + std::to_string(block.id.x) + " of " + launch_.kernel.name);
        }
        block.ended = true;
        ++launch_.events;
      }
      if (ended(cluster) && !cluster->loads.empty()) throw Error("a cluster ended with tensor copies under way to it");
    }
    if (std::none_of(running_.begin(), running_.end(), ended)) return;
    std::erase_if(turns_, [&](const Warp* warp) {
      const auto& blocks = warp->block->cluster->blocks;
      return std::all_of(blocks.begin(), blocks.end(), [](const Block& block) { return block.ended; });
    });
    std::erase_if(running_, ended);
  }

  std::string all_places() const {
    std::string places;
    int more = 0;
    for (const Warp* warp : turns_) {
      if (warp->alive == 0) continue;
      if (places.size() > 4000 && ++more) continue;
      const Instruction& at = launch_.kernel.code[warp->pc[__builtin_ctz(warp->alive)]];
      places += "\n  " + where(*warp) + " at line " + std::to_string(at.line) + " " + at.text;
    }
    return more == 0 ? places : places + "\n  and " + std::to_string(more) + " more";
  }

  // Those of `lanes` that are at the lowest program counter.
  static uint32_t lowest(const Warp& warp, uint32_t lanes) {
    uint32_t least = UINT32_MAX, at = 0;
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const uint32_t pc = warp.pc[static_cast<size_t>(lane)];
      if (pc < least) least = pc, at = 0;
      if (pc == least) at |= 1u << lane;
    }
    return at;
  }

  // The lanes that come together at an instruction for several, or none: those that are here wait for the others.
  uint32_t gathered(Warp& warp, const Instruction& in, uint32_t pc, uint32_t lanes) {
    uint32_t here = 0;
    for (uint32_t left = warp.alive; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (warp.pc[static_cast<size_t>(lane)] == pc) here |= 1u << lane;
    }
    uint32_t need = warp.alive;
    if (in.members >= 0) {
      const int lane = __builtin_ctz(lanes);
      const auto mask =
          static_cast<uint32_t>(value({launch_, warp, in, lanes}, in.operands[static_cast<size_t>(in.members)], lane));
      if ((mask >> lane & 1) == 0) Step{launch_, warp, in, lanes}.fail("a lane that is not in its own mask of lanes");
      if ((mask & ~warp.alive) != 0) Step{launch_, warp, in, lanes}.fail("a mask of lanes with some that have ended");
      need = mask;
    }
    if ((here & need) != need) {
      warp.parked |= lanes & need;
      return 0;
    }
    warp.parked &= ~need;
    warp.held &= ~need;
    return need;
  }

  static void advance(Warp& warp, uint32_t lanes, uint32_t to) {
    for_lanes(lanes, [&](int lane) { warp.pc[static_cast<size_t>(lane)] = to; });
  }

  Turn turn(Warp& warp, int most) {
    warp.asleep = 0;
    if (options.shuffle && launch_.random() % 4 == 0) warp.held = static_cast<uint32_t>(launch_.random());
    bool together = false;  // all lanes that are alive are at one place, and may go on
    uint32_t lanes = 0;
    for (int n = 0; n < most; ++n) {
      if (warp.alive == 0) return Turn::ended;
      if (warp.barrier >= 0) {
        const auto number = static_cast<size_t>(warp.barrier);
        const uint64_t generation = warp.block->barriers[number].generation;
        if (generation == warp.barrier_generation) return Turn::waits;
        merge(warp.seen, warp.block->barriers[number].released);
        warp.barrier = -1;
      }
      if (!together) {
        uint32_t able = warp.alive & ~warp.parked & ~warp.asleep & ~warp.held;
        if (able == 0 && (warp.held & warp.alive) != 0) {
          warp.held = 0;
          continue;
        }
        if (able == 0 && warp.asleep != 0) return Turn::waits;
        if (able == 0) fail(launch_, warp, "lanes wait for each other at different places");
        lanes = lowest(warp, able);
        together = lanes == warp.alive;
      }
      const uint32_t pc = warp.pc[static_cast<size_t>(__builtin_ctz(lanes))];
      Instruction& in = launch_.kernel.code[pc];
      ++in.runs;
      warp.last = &in;
      uint32_t going = lanes;
      if (in.members != Instruction::kAlone) {
        going = gathered(warp, in, pc, lanes);
        if (going == 0) {
          together = false;
          continue;
        }
        if (going != lanes) together = false;
      }
      uint32_t executing = going;
      if (in.guard >= 0) {
        const uint64_t* guard = warp.reg(in.guard);
        executing = 0;
        for_lanes(going, [&](int lane) { executing |= uint32_t{(guard[lane] != 0) != in.guard_negated} << lane; });
      }
      ++counts.instructions;
      if (in.flow == Flow::branch) {
        advance(warp, executing, static_cast<uint32_t>(in.target));
        advance(warp, going & ~executing, pc + 1);
        if (executing != 0 && executing != going) together = false;
        continue;
      }
      if (in.flow == Flow::exit) {
        advance(warp, going & ~executing, pc + 1);
        warp.alive &= ~executing;
        if (warp.alive == 0) complete_barriers(launch_, *warp.block);
        ++launch_.events;
        together = false;
        continue;
      }
      if (executing != 0) {
        const Step step{launch_, warp, in, executing};
        if (in.on_accumulators) shadow::touch_accumulators(step);
        if (in.execute(step) == Outcome::waits) {
          if (!in.may_sleep) return Turn::waits;
          warp.asleep |= going;
          together = false;
          continue;
        }
      }
      advance(warp, going, pc + 1);
    }
    return Turn::more;
  }

  enum class Slow { none, block, warp, group };

  Launch& launch_;
  Slow slow_kind_ = Slow::none;
  unsigned slow_ = 0;
  std::vector<std::unique_ptr<Cluster>> running_;
  std::vector<Warp*> turns_;
  const uint64_t at_start_ = counts.instructions;
  int idle_ = 0;
};

}  // namespace

void fail(const Launch& launch, const Warp& warp, const std::string& what) {
  const std::string line =
      warp.last == nullptr ? "" : " at ptx line " + std::to_string(warp.last->line) + " (" + warp.last->text + ")";
  throw Error(what + line + ", " + where(warp) + ", in " + launch.kernel.name);
}

void Step::fail(const std::string& what) const {
  throw Error(what + " at ptx line " + std::to_string(in.line) + " (" + in.text + "), " + where(warp) + ", in " +
              launch.kernel.name);
}

void launch(Kernel& kernel, Dim grid, Dim block, Dim cluster, unsigned dynamic_shared, const void* parameters) {
  if (!kernel.decoded) decode(kernel);
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    throw Error("the grid of " + kernel.name + " is not made of whole clusters");
  }
  Launch state{kernel, grid, block, cluster, dynamic_shared, {}, std::mt19937(options.seed), 0, 0, {}, {}};
  state.parameters.resize(static_cast<size_t>(kernel.parameter_bytes) / sizeof(ParameterChunk) + 1);
  std::memcpy(state.parameters.data(), parameters, static_cast<size_t>(kernel.parameter_bytes));
  forget_answers();
  ++counts.launches;
  Scheduler(state).run();
}

}  // namespace ptx
