// CUDA kernels of routing.h's sort of slots: a stable counting sort by expert, -1 as the expert after the last, in two
// launches. The first counts each block's slots by expert, and the block that finishes last turns the counts, expert by
// expert and block by block, into first places. The second ranks slots within their block, warp by warp in order.
#include "launch.cuh"
#include "ummrm/routing.h"

namespace ummrm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRounds = 8;  // slots a thread
constexpr int kSlotsPerBlock = kThreads * kRounds;
constexpr int kMaxGroups = kMaxExperts + 1;

int64_t sort_blocks(int64_t slots) { return slots == 0 ? 1 : ceil_div(slots, kSlotsPerBlock); }

// The group of a slot: its expert, or `experts` for none; -1 past the end. Out of range is none, so that no wrong index
// writes out of bounds.
__device__ int group_of(const SortSlots& args, int64_t slot) {
  if (slot >= args.slots) return -1;
  const int expert = args.expert_indices[slot], experts = static_cast<int>(args.experts);
  return expert < 0 || expert >= experts ? experts : expert;
}

// counts[group * blocks + block], exclusively summed in place by one block of threads; a group's first place is the
// expert's offset.
__device__ void scan(const SortSlots& args, int64_t blocks, int32_t* counts) {
  __shared__ int32_t warps[kWarps];
  constexpr int kEach = 8;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t n = (args.experts + 1) * blocks;
  int32_t carry = 0;
  for (int64_t first = 0; first < n; first += kThreads * kEach) {
    const int64_t at = first + threadIdx.x * kEach;
    int32_t count[kEach], own = 0;
    for (int i = 0; i < kEach; ++i) {
      count[i] = at + i < n ? __ldcg(counts + at + i) : 0;
      own += count[i];
    }
    int32_t up_to = own;  // inclusive, over lanes
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int32_t below = __shfl_up_sync(kAllLanes, up_to, distance);
      if (lane >= distance) up_to += below;
    }
    if (lane == kWarp - 1) warps[warp] = up_to;
    __syncthreads();
    int32_t next = carry + up_to - own;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) next += warps[w];
      carry += warps[w];
    }
    for (int i = 0; i < kEach && at + i < n; ++i) {
      counts[at + i] = next;
      if ((at + i) % blocks == 0) args.expert_offsets[(at + i) / blocks] = next;
      next += count[i];
    }
    __syncthreads();  // before the next round's sums
  }
}

__global__ void __launch_bounds__(kThreads, kResident) count_kernel(SortSlots args, int32_t* counts, unsigned* ticket) {
  __shared__ int32_t histogram[kMaxGroups];
  const int groups = static_cast<int>(args.experts) + 1;
  for (int g = threadIdx.x; g < groups; g += kThreads) histogram[g] = 0;
  __syncthreads();
  for (int round = 0; round < kRounds; ++round) {
    const int group = group_of(args, (static_cast<int64_t>(blockIdx.x) * kRounds + round) * kThreads + threadIdx.x);
    if (group >= 0) atomicAdd(&histogram[group], 1);
  }
  __syncthreads();
  const int64_t blocks = gridDim.x;
  for (int g = threadIdx.x; g < groups; g += kThreads) counts[g * blocks + blockIdx.x] = histogram[g];
  if (last_to_finish(ticket)) scan(args, blocks, counts);
}

__global__ void __launch_bounds__(kThreads, kResident) scatter_kernel(SortSlots args, const int32_t* first_places) {
  __shared__ int32_t next[kWarps][kMaxGroups];  // counts of the warp's slots by group, then the place of the next one
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, groups = static_cast<int>(args.experts) + 1;
  const unsigned lanes_below = (1u << lane) - 1;
  const int64_t blocks = gridDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSlotsPerBlock + warp * kRounds * kWarp + lane;
  for (int i = threadIdx.x; i < kWarps * kMaxGroups; i += kThreads) next[i / kMaxGroups][i % kMaxGroups] = 0;
  __syncthreads();
  int group[kRounds];
  unsigned same[kRounds];  // lanes whose slot goes to the same group
  for (int round = 0; round < kRounds; ++round) {
    group[round] = group_of(args, first + round * kWarp);
    same[round] = __match_any_sync(kAllLanes, group[round]);
    if (group[round] >= 0 && (same[round] & lanes_below) == 0) next[warp][group[round]] += __popc(same[round]);
    __syncwarp();
  }
  __syncthreads();
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    int32_t place = first_places[g * blocks + blockIdx.x];
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = next[w][g];
      next[w][g] = place;
      place += count;
    }
  }
  __syncthreads();
  for (int round = 0; round < kRounds; ++round) {
    int32_t place = 0;
    if (group[round] >= 0) {
      place = next[warp][group[round]] + __popc(same[round] & lanes_below);
      const int64_t slot = first + round * kWarp;
      args.slot_to_sorted[slot] = place;
      args.sorted_to_slot[place] = static_cast<int32_t>(slot);
    }
    __syncwarp();
    if (group[round] >= 0 && (same[round] & lanes_below) == 0) next[warp][group[round]] += __popc(same[round]);
    __syncwarp();
  }
}

}  // namespace

int64_t sort_slots_workspace(int64_t slots, int64_t experts) {
  return (sort_blocks(slots) * (experts + 1) + 1) * static_cast<int64_t>(sizeof(int32_t));
}

int sort_slots(const SortSlots& args, void* workspace, Stream stream) {
  if (args.experts > kMaxExperts) return cudaErrorInvalidValue;
  const int64_t blocks = sort_blocks(args.slots);
  auto* counts = static_cast<int32_t*>(workspace);
  auto* ticket = reinterpret_cast<unsigned*>(counts + blocks * (args.experts + 1));
  int status = cudaMemsetAsync(ticket, 0, sizeof(unsigned), stream);
  if (status == cudaSuccess) status = launch(count_kernel, blocks, kThreads, stream, args, counts, ticket);
  if (status == cudaSuccess) status = launch(scatter_kernel, blocks, kThreads, stream, args, counts);
  return status;
}

}  // namespace ummrm::cuda
