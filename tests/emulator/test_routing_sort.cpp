// The CUDA kernels of routing.h's sort of slots on the emulator, against std::stable_sort.
#include "routing_sort.cu"

#include <numeric>

#include "emulated.h"

using namespace testing;

struct Sorted {
  std::vector<int32_t> slot_to_sorted, sorted_to_slot, offsets;
  bool operator==(const Sorted&) const = default;
};

// `expert` may hold indices out of range, which count as none.
static void sorting(const std::vector<int32_t>& expert, int64_t experts) {
  const auto slots = static_cast<int64_t>(expert.size());
  const auto run = [&] {
    Sorted s{std::vector<int32_t>(slots, -9), std::vector<int32_t>(slots, -9), std::vector<int32_t>(experts + 1, -9)};
    std::vector<unsigned char> workspace(ummrm::cuda::sort_slots_workspace(slots, experts), 0xff);
    const ummrm::SortSlots args{expert.data(),    slots,  experts, s.slot_to_sorted.data(), s.sorted_to_slot.data(),
                                s.offsets.data(), nullptr};
    check_launch(ummrm::cuda::sort_slots(args, workspace.data(), nullptr), "sort_slots");
    return s;
  };
  const Sorted got = under_all_orders("sort_slots", run, [](const Sorted& a, const Sorted& b) { return a == b; });
  std::vector<int32_t> want(slots);
  std::iota(want.begin(), want.end(), 0);
  const auto key = [&](int32_t slot) { return expert[slot] < 0 || expert[slot] >= experts ? experts : expert[slot]; };
  std::stable_sort(want.begin(), want.end(), [&](int32_t a, int32_t b) { return key(a) < key(b); });
  CHECK(got.sorted_to_slot == want, "sorted order of %lld slots", static_cast<long long>(slots));
  for (int64_t r = 0; r < slots; ++r) CHECK(got.slot_to_sorted[want[r]] == r, "the two maps are inverse");
  for (int64_t e = 0; e <= experts; ++e) {
    const auto below = std::count_if(expert.begin(), expert.end(), [&](int32_t x) { return x >= 0 && x < e; });
    CHECK(got.offsets[e] == below, "offset %lld", static_cast<long long>(e));
  }
}

static std::vector<int32_t> random_slots(int64_t slots, int64_t experts) {
  Random random(slots);
  std::vector<int32_t> expert(slots);
  for (int32_t& e : expert) e = static_cast<int32_t>(random.below(experts + 1)) - 1;
  return expert;
}

int main() {
  sorting({}, 3);
  sorting({}, 0);
  sorting(random_slots(100, 1), 1);
  sorting(random_slots(2500, 7), 7);
  sorting(std::vector<int32_t>(2100, 3), 6);   // all on one expert
  sorting(std::vector<int32_t>(2100, -1), 6);  // none live
  if (!kSmallOnly) {
    sorting(random_slots(20000, 6), 6);
    sorting(random_slots(18500, 256), 256);  // more counts than one round of the scan takes
  }
  auto all_live = random_slots(300, 4);
  for (int32_t& e : all_live) e = std::max(e, 0);
  sorting(all_live, 4);
  CHECK(ummrm::cuda::sort_slots({nullptr, 1, 257, nullptr, nullptr, nullptr, nullptr}, nullptr, nullptr) != 0,
        "too many experts are refused");

  // An index out of range: none, as -1, and nothing is written out of bounds.
  std::vector<int32_t> expert{2, 9, 0, -5, 1}, forward(5, -9), backward(5, -9), offsets(4, -9);
  std::vector<unsigned char> workspace(ummrm::cuda::sort_slots_workspace(5, 3), 0xff);
  const ummrm::SortSlots args{expert.data(), 5, 3, forward.data(), backward.data(), offsets.data(), nullptr};
  check_launch(ummrm::cuda::sort_slots(args, workspace.data(), nullptr), "sort_slots");
  CHECK((backward == std::vector<int32_t>{2, 4, 0, 1, 3} && offsets == std::vector<int32_t>{0, 1, 2, 3}),
        "indices out of range go last");
  return finish();
}
