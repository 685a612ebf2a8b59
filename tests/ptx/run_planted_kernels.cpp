// The header emulator's planted bugs on the machine, as nvcc compiles them: each is noticed in some order, and without
// it the result is right in every order. An index that overflows is not among them, since PTX has no sign of it: the
// header emulator sees that.
#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "planted_kernels.h"
#include "runtime.h"
#include "testing.h"

using namespace ptx;

namespace {

constexpr unsigned kThreads = 128;

// Memory of the device for just so many numbers.
template <class T>
struct Array {
  T* at = nullptr;
  explicit Array(size_t count) { cudaMalloc(reinterpret_cast<void**>(&at), count * sizeof(T)); }
  Array(const Array&) = delete;
  ~Array() { cudaFree(at); }
};

struct Data {
  Array<float> in{kThreads}, out{kThreads};
  Data() {
    testing::Random random(7);
    for (unsigned i = 0; i < kThreads; ++i) in.at[i] = static_cast<float>(random.below(9) + 1);
  }
  float sum() const {
    float total = 0;
    for (unsigned i = 0; i < kThreads; ++i) total += in.at[i];
    return total;
  }
};

using Want = std::function<float(const float*, unsigned)>;  // NaN: not looked at
using Run = std::function<bool(bool planted)>;              // false: wrong; or it throws

bool launched(Planted which, bool planted, unsigned blocks, std::vector<void*> arguments,
              dim3 threads = dim3(kThreads)) {
  const PlantedKernel& pair = kPlantedKernels[which];
  return cudaLaunchKernel(planted ? pair.bug : pair.right, dim3(blocks), threads, arguments.data(), 0, nullptr) ==
         cudaSuccess;
}

Run from_to(Planted which, unsigned blocks, const Want& want) {
  return [=](bool planted) {
    Data data;
    if (!launched(which, planted, blocks, {&data.in.at, &data.out.at})) return false;
    for (unsigned i = 0; i < kThreads; ++i) {
      const float expected = want(data.in.at, i);
      if (!std::isnan(expected) && !(data.out.at[i] == expected)) return false;
    }
    return true;
  };
}

bool counted(bool planted) {
  Data data;
  Array<int> total(1);
  *total.at = 0;
  return launched(kLostUpdate, planted, 1, {&data.in.at, &total.at}) && *total.at == static_cast<int>(kThreads);
}

bool ticketed(bool planted) {
  Data data;
  Array<float> parts(2);
  Array<unsigned> ticket(1);
  *ticket.at = 0;
  const bool ran = launched(kLastBlockSums, planted, 2, {&data.in.at, &parts.at, &ticket.at, &data.out.at});
  return ran && data.out.at[0] == 3 * data.sum() && data.out.at[kThreads - 1] == 3 * data.sum();
}

bool oversized(bool planted) {
  Data data;
  return launched(kLastRowUnwritten, false, 1, {&data.in.at, &data.out.at}, planted ? dim3(64, 32) : dim3(kThreads));
}

bool empty_grid(bool planted) {
  Data data;
  return launched(kLastRowUnwritten, false, planted ? 0 : 1, {&data.in.at, &data.out.at});
}

}  // namespace

int main() {
  const auto same = [](const float* in, unsigned i) { return in[i]; };
  const auto total = [](const float* in) {
    float sum = 0;
    for (unsigned i = 0; i < kThreads; ++i) sum += in[i];
    return sum;
  };
  const auto unseen = [](const float*, unsigned) { return NAN; };
  struct Row {
    const char* name;
    Run run;
  };
  const Row rows[] = {
      {"no barrier before reading",
       from_to(kNoBarrierBeforeReading, 1, [&](const float* in, unsigned) { return total(in); })},
      {"no barrier before reuse",
       from_to(kNoBarrierBeforeReuse, 1, [&](const float* in, unsigned) { return 3 * total(in); })},
      {"no barrier between stages", from_to(kNoBarrierBetweenStages, 1,
                                            [](const float* in, unsigned i) {
                                              float sum = 0;
                                              for (unsigned step = 0; step < 4; ++step)
                                                sum += in[((i ^ 64) + step) % kThreads];
                                              return sum;
                                            })},
      {"shuffle in a branch",
       from_to(kShuffleInABranch, 1, [](const float* in, unsigned i) { return in[i] + in[i ^ 1]; })},
      {"shuffle after some left",
       from_to(kShuffleAfterSomeLeft, 1, [](const float* in, unsigned i) { return in[i / 32 * 32]; })},
      {"barrier in both branches", from_to(kBarrierInBothBranches, 1, same)},
      {"barrier in one branch", from_to(kBarrierInOneBranch, 1, same)},
      {"lane outside its mask",
       from_to(kLaneOutsideItsMask, 1, [](const float* in, unsigned i) { return in[i / 32 * 32 + i % 2]; })},
      {"source outside the mask",
       from_to(kSourceOutsideTheMask, 1,
               [](const float* in, unsigned i) { return i % 32 < 16 ? in[i / 32 * 32 + 15] : NAN; })},
      {"different collectives",
       from_to(kDifferentCollectives, 1, [](const float* in, unsigned i) { return in[i / 32 * 32 + 3]; })},
      {"shared memory read unwritten", from_to(kSharedReadUnwritten, 1, same)},
      {"no __syncwarp", from_to(kNoSyncwarp, 1, [](const float* in, unsigned i) { return in[i ^ 1]; })},
      {"shared overrun", from_to(kSharedOverrun, 1, same)},
      {"global overrun",
       from_to(kGlobalOverrun, 1, [](const float* in, unsigned i) { return i + 1 < kThreads ? NAN : in[i]; })},
      {"misaligned vector", from_to(kMisalignedVector, 1, unseen)},
      {"last row unwritten", from_to(kLastRowUnwritten, 1, same)},
      {"lost update", counted},
      {"order of blocks", from_to(kOrderOfBlocks, 2, same)},
      {"last block by number", ticketed},
      {"too many threads", oversized},
      {"empty grid", empty_grid},
  };
  runtime::device = {0, 8, 0, 4};
  for (const Row& row : rows) {
    std::string found;
    for (unsigned seed = 0; seed < 16; ++seed) {
      options.shuffle = seed != 0, options.seed = seed;
      std::string right;
      try {
        right = row.run(false) ? "" : "wrong";
      } catch (const Error& error) {
        right = error.what();
      }
      CHECK(right.empty(), "'%s' without its bug: %s, seed %u", row.name, right.c_str(), seed);
      if (!found.empty()) continue;
      try {
        found = row.run(true) ? "" : "wrong, or refused";
      } catch (const Error& error) {
        found = error.what();
      }
    }
    CHECK(!found.empty(), "'%s' is not caught", row.name);
    std::printf("%s: %s\n", row.name, found.substr(0, 120).c_str());
  }
  return testing::finish();
}
