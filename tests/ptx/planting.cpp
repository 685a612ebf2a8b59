// See planting.h.
#include "planting.h"

namespace ptx::planting {
namespace {

std::string fault_of(const Bug& bug, Order order, unsigned seed) {
  options.order = order, options.shuffle = seed != 0, options.seed = seed;
  try {
    return bug.run();
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace

int missed_of(const std::vector<Bug>& bugs) {
  int missed = 0;
  for (const Bug& bug : bugs) {
    runtime::on_launch = nullptr;
    const std::string right = fault_of(bug, Order::late, 3);
    bool planted = false;
    std::string found;
    for (const auto& [order, seed] : {std::pair{Order::late, 0u}, {Order::late, 3u}, {Order::random, 4u}}) {
      if (!found.empty()) continue;
      bool first = true;  // of the products that a case launches, the others are what it is held to
      runtime::on_launch = [&](const runtime::Started& started) {
        if (started.kernel.name.find("cutlass") == std::string::npos || !first) return;
        planted |= bug.plant(started);
        first = false;
      };
      found = fault_of(bug, order, seed);
      for (auto change = kept.rbegin(); change != kept.rend(); ++change) *change->first = change->second;
      kept.clear();
    }
    const bool caught = right.empty() && planted && !found.empty();
    missed += !caught;
    std::printf("%s: %s%s\n", bug.name.c_str(),
                caught    ? "caught, "
                : planted ? "NOT CAUGHT "
                          : "NOT PLANTED ",
                (right.empty() ? found : "wrong without it: " + right).substr(0, 160).c_str());
    std::fflush(stdout);
  }
  runtime::on_launch = nullptr;
  std::printf("%zu of %zu caught\n", bugs.size() - static_cast<size_t>(missed), bugs.size());
  return missed;
}

}  // namespace ptx::planting
