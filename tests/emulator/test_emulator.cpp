// The emulator's own test: every kernel of planted.h with its bug must be caught, under some order of the schedule, by
// the build that is meant to catch it; without its bug it must pass under every order and in every build. Each run is a
// child process, since what is caught ends one.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "planted.h"
#include "testing.h"

using namespace planted;

extern "C" const char* __tsan_default_options() { return "exitcode=66:halt_on_error=1:symbolize=0"; }
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

// Which builds catch a bug for certain. ASan stands for ASan with UBSan.
enum Build : unsigned { kPlain = 1, kAsan = 2, kTsan = 4 };
#if defined(__SANITIZE_ADDRESS__)
constexpr Build kThis = kAsan;
#elif defined(__SANITIZE_THREAD__)
constexpr Build kThis = kTsan;
#else
constexpr Build kThis = kPlain;
#endif

struct Data {
  std::vector<float> in, out, want;
};

// Runs one kernel on fresh memory; false if the result is wrong or the launch refused.
using Run = std::function<bool(bool planted)>;

template <class Kernel, class... Rest>
static bool launch(Kernel kernel, unsigned blocks, Rest... rest) {
  const cudaLaunchConfig_t config{dim3(blocks), dim3(kThreads), 0, nullptr};
  return cudaLaunchKernelEx(&config, kernel, rest...) == cudaSuccess;
}

using Pair = void (*)(const float*, float*);

static Data fresh() {
  Data d{std::vector<float>(kThreads), std::vector<float>(kThreads, NAN), std::vector<float>(kThreads, NAN)};
  testing::Random random(7);
  for (float& x : d.in) x = static_cast<float>(random.below(9) + 1);
  return d;
}

// A kernel from `in` to `out` whose result is want(in, i); indices where `want` is NaN are not looked at.
static Run from_to(Pair bug, Pair right, unsigned blocks,
                   std::function<float(const std::vector<float>&, unsigned)> want) {
  return [=](bool planted) {
    Data d = fresh();
    if (!launch(planted ? bug : right, blocks, d.in.data(), d.out.data())) return false;
    for (unsigned i = 0; i < kThreads; ++i) {
      const float expected = want(d.in, i);
      if (expected == expected && !(d.out[i] == expected)) return false;
    }
    return true;
  };
}

static float sum(const std::vector<float>& in) {
  float total = 0;
  for (const float x : in) total += x;
  return total;
}

static bool count(bool planted) {
  const Data d = fresh();
  int total = 0;
  const bool ran = launch(planted ? &lost_update<true> : &lost_update<false>, 1, d.in.data(), &total);
  return ran && (planted || total == static_cast<int>(kThreads));
}

static bool ticketed(bool planted) {
  Data d = fresh();
  float parts[2] = {NAN, NAN};
  unsigned ticket = 0;
  const bool ran =
      launch(planted ? &last_block_sums<true> : &last_block_sums<false>, 2, d.in.data(), parts, &ticket, d.out.data());
  return ran && d.out[0] == 3 * sum(d.in) && d.out[kThreads - 1] == 3 * sum(d.in);
}

static bool oversized(bool planted) {
  Data d = fresh();
  const cudaLaunchConfig_t config{dim3(1), planted ? dim3(64, 32) : dim3(kThreads), 0, nullptr};
  return cudaLaunchKernelEx(&config, &last_row_unwritten<false>, d.in.data(), d.out.data()) == cudaSuccess;
}

static bool empty_grid(bool planted) {
  Data d = fresh();
  const cudaLaunchConfig_t config{dim3(planted ? 0 : 1), dim3(kThreads), 0, nullptr};
  return cudaLaunchKernelEx(&config, &last_row_unwritten<false>, d.in.data(), d.out.data()) == cudaSuccess;
}

// True if the run ended as it should have: by itself, with the right result.
static bool passes(const Run& run, bool planted, emulator::Order order) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (planted && std::freopen("/dev/null", "w", stderr) == nullptr) std::exit(4);  // the reports are expected
    emulator::set_order(order);
    std::exit(run(planted) ? 0 : 3);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

#define PAIR(kernel) &kernel<true>, &kernel<false>

int main() {
  using In = const std::vector<float>&;
  const auto same = [](In in, unsigned i) { return in[i]; };
  const auto partner = [](In in, unsigned i) { return in[i ^ 1]; };
  struct Row {
    const char* name;
    unsigned caught_by;
    Run run;
  };
  const Row rows[] = {
      {"no barrier before reading", kPlain | kAsan | kTsan,
       from_to(PAIR(no_barrier_before_reading), 1, [](In in, unsigned) { return sum(in); })},
      {"no barrier before reuse", kPlain | kAsan | kTsan,
       from_to(PAIR(no_barrier_before_reuse), 1, [](In in, unsigned) { return 3 * sum(in); })},
      {"no barrier between stages", kPlain | kAsan | kTsan,
       from_to(PAIR(no_barrier_between_stages), 1,
               [](In in, unsigned i) {
                 float total = 0;
                 for (unsigned step = 0; step < 4; ++step) total += in[((i ^ 64) + step) % kThreads];
                 return total;
               })},
      {"shuffle in a branch", kPlain | kAsan | kTsan,
       from_to(PAIR(shuffle_in_a_branch), 1, [](In in, unsigned i) { return in[i] + in[i ^ 1]; })},
      {"shuffle after some left", kPlain | kAsan | kTsan,
       from_to(PAIR(shuffle_after_some_left), 1, [](In in, unsigned i) { return in[i / 32 * 32]; })},
      {"barrier in both branches", kPlain | kAsan | kTsan, from_to(PAIR(barrier_in_both_branches), 1, same)},
      {"barrier in one branch", kPlain | kAsan | kTsan, from_to(PAIR(barrier_in_one_branch), 1, same)},
      {"lane outside its mask", kPlain | kAsan | kTsan,
       from_to(PAIR(lane_outside_its_mask), 1, [](In in, unsigned i) { return in[i / 32 * 32 + i % 2]; })},
      {"source outside the mask", kPlain | kAsan | kTsan,
       from_to(PAIR(source_outside_the_mask), 1,
               [](In in, unsigned i) { return i % 32 < 16 ? in[i / 32 * 32 + 15] : NAN; })},
      {"different collectives", kPlain | kAsan | kTsan,
       from_to(PAIR(different_collectives), 1, [](In in, unsigned i) { return in[i / 32 * 32 + 3]; })},
      {"shared memory read unwritten", kPlain, from_to(PAIR(shared_read_unwritten), 1, same)},
      {"no __syncwarp", kPlain | kAsan | kTsan, from_to(PAIR(no_syncwarp), 1, partner)},
      {"shared overrun", kAsan, from_to(PAIR(shared_overrun), 1, same)},
      {"global overrun", kAsan,
       from_to(PAIR(global_overrun), 1, [](In in, unsigned i) { return i + 1 < kThreads ? NAN : in[i]; })},
      {"misaligned vector", kAsan, from_to(PAIR(misaligned_vector), 1, [](In, unsigned) { return NAN; })},
      {"index overflow", kAsan, from_to(PAIR(index_overflow), 1, [](In, unsigned) { return NAN; })},
      {"last row unwritten", kPlain | kAsan | kTsan, from_to(PAIR(last_row_unwritten), 1, same)},
      {"lost update", kTsan, count},
      {"order of blocks", kPlain | kAsan | kTsan, from_to(PAIR(order_of_blocks), 2, same)},
      {"last block by number", kPlain | kAsan | kTsan, ticketed},
      {"too many threads", kPlain | kAsan | kTsan, oversized},
      {"empty grid", kPlain | kAsan | kTsan, empty_grid},
  };
  int expected = 0;
  for (const Row& row : rows) {
    bool caught = false;
    for (const auto order : emulator::kOrders) {
      CHECK(passes(row.run, false, order), "'%s' without its bug does not pass in order %d", row.name,
            static_cast<int>(order));
      if (row.caught_by & kThis) caught |= !passes(row.run, true, order);
    }
    if ((row.caught_by & kThis) == 0) continue;
    ++expected;
    CHECK(caught, "'%s' is not caught", row.name);
  }
  std::printf("%d of %d planted bugs are this build's to catch\n", expected, static_cast<int>(std::size(rows)));
  return testing::finish();
}
