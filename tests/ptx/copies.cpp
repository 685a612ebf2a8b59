// cp.async, the copies of Ampere: 4, 8 or 16 bytes of a lane from device to shared memory, in groups that are waited
// for (PTX ISA 9.7.9.25.3).
#include "async.h"
#include "form.h"
#include "memory.h"
#include "shadow.h"

namespace ptx {

void do_copy(Warp& warp, Copy& copy) {
  if (copy.bytes == 0) return;
  unsigned char* to = warp.block->shared.data() + copy.to;
  if (copy.real > 0) std::memcpy(to, reinterpret_cast<const void*>(copy.from), static_cast<size_t>(copy.real));
  std::memset(to + copy.real, 0, static_cast<size_t>(copy.bytes - copy.real));
  shadow::arrived(*warp.block, copy.to, copy.bytes);
  copy.bytes = 0;  // done
}

namespace {

Outcome start_copy(const Step& step) {
  const bool at_once = do_at_once(step.launch);
  for_lanes(step.lanes, [&](int l) {
    const int bytes = static_cast<int>(value(step, step.operand(2), l));
    const int real = step.in.operands.size() > 3 ? static_cast<int>(value(step, step.operand(3), l)) : bytes;
    if (bytes != 16 && (step.in.a != 0 || (bytes != 4 && bytes != 8)))
      step.fail("a copy of " + std::to_string(bytes) + " bytes");
    if (real < 0 || real > bytes) step.fail("a copy that reads more than it writes");
    const Place to = place_of(step, Space::shared, address(step, step.operand(0), l), bytes);
    if (to.block != step.warp.block) step.fail("cp.async to another block");
    const uint64_t from = address(step, step.operand(1), l);
    if (real > 0) place_of(step, Space::global, from, real, bytes);
    Copy copy{to.offset, from, bytes, real};
    shadow::will_write(*to.block, to.offset, bytes);
    if (at_once) do_copy(step.warp, copy);
    step.warp.copies.push_back(copy);
  });
  return Outcome::done;
}

Outcome commit(const Step& step) {
  step.warp.copy_groups.push_back(std::move(step.warp.copies));
  step.warp.copies.clear();
  return Outcome::done;
}

Outcome wait(const Step& step) {
  auto& groups = step.warp.copy_groups;
  const uint64_t left = step.in.a != 0 ? 0 : value(step, step.operand(0), step.first_lane());
  while (groups.size() > left) {
    for (Copy& copy : groups.front()) do_copy(step.warp, copy);
    groups.pop_front();
  }
  if (step.in.a != 0) {
    for (Copy& copy : step.warp.copies) do_copy(step.warp, copy);
    step.warp.copies.clear();
  }
  return Outcome::done;
}

}  // namespace

void copies(Form& form, Instruction& in) {
  if (!form.take("async")) return;
  if (form.take("bulk")) return tensors(form, in);
  if (form.take("commit_group")) {
    in.execute = &commit;
  } else if (form.take("wait_group")) {
    in.execute = &wait;
  } else if (form.take("wait_all")) {
    in.a = 1;
    in.execute = &wait;
  } else {
    in.a = form.take_one({"ca", "cg"});  // cg takes 16 bytes alone
    for (const char* hint : {"L2::64B", "L2::128B", "L2::256B"}) form.take(hint);
    if (in.a >= 0 && form.take("shared") && form.take("global")) in.execute = &start_copy;
  }
}

}  // namespace ptx
