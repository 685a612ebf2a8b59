// Operands to values and addresses, and special registers (PTX ISA 10).
#include "machine.h"

namespace ptx {
namespace {

uint64_t special(const Step& step, Special which, int lane) {
  const Block& block = *step.warp.block;
  const Launch& launch = step.launch;
  const unsigned thread = static_cast<unsigned>(step.warp.id * kLanes + lane);
  const Dim &size = launch.block, &grid = launch.grid, &cluster = launch.cluster;
  switch (which) {
    case Special::tid_x: return thread % size.x;
    case Special::tid_y: return thread / size.x % size.y;
    case Special::tid_z: return thread / size.x / size.y;
    case Special::ntid_x: return size.x;
    case Special::ntid_y: return size.y;
    case Special::ntid_z: return size.z;
    case Special::ctaid_x: return block.id.x;
    case Special::ctaid_y: return block.id.y;
    case Special::ctaid_z: return block.id.z;
    case Special::nctaid_x: return grid.x;
    case Special::nctaid_y: return grid.y;
    case Special::nctaid_z: return grid.z;
    case Special::laneid: return static_cast<uint64_t>(lane);
    case Special::warpid: return static_cast<uint64_t>(step.warp.id);
    case Special::cluster_ctarank: return static_cast<uint64_t>(block.rank);
    case Special::cluster_nctarank: return cluster.size();
    case Special::cluster_ctaid_x: return block.place.x;
    case Special::cluster_ctaid_y: return block.place.y;
    case Special::cluster_ctaid_z: return block.place.z;
    case Special::cluster_nctaid_x: return cluster.x;
    case Special::cluster_nctaid_y: return cluster.y;
    case Special::cluster_nctaid_z: return cluster.z;
    case Special::clusterid_x: return block.cluster->id.x;
    case Special::clusterid_y: return block.cluster->id.y;
    case Special::clusterid_z: return block.cluster->id.z;
    case Special::nclusterid_x: return grid.x / cluster.x;
    case Special::nclusterid_y: return grid.y / cluster.y;
    case Special::nclusterid_z: return grid.z / cluster.z;
    case Special::smid: return 0;
    case Special::clock:
    case Special::clock64: return step.launch.clock;
  }
  return 0;
}

}  // namespace

uint64_t value(const Step& step, const Operand& operand, int lane) {
  const auto offset = static_cast<uint64_t>(operand.offset);
  switch (operand.kind) {
    case Operand::Kind::reg: {
      const uint64_t held = step.warp.reg(operand.reg)[lane];
      return operand.negated ? held == 0 : held + offset;
    }
    case Operand::Kind::constant: return operand.negated ? operand.value == 0 : operand.value + offset;
    case Operand::Kind::parameter:
      return reinterpret_cast<uint64_t>(step.launch.parameters.data()) + operand.value + offset;
    case Operand::Kind::special: return special(step, static_cast<Special>(operand.value), lane);
    default: step.fail("an operand without a value");
  }
}

const uint64_t* values(const Step& step, const Operand& operand, uint64_t (&scratch)[kLanes]) {
  if (operand.kind == Operand::Kind::reg && !operand.negated && operand.offset == 0) return step.warp.reg(operand.reg);
  if (operand.kind == Operand::Kind::constant && !operand.negated) {
    const uint64_t constant = operand.value + static_cast<uint64_t>(operand.offset);
    for (uint64_t& lane : scratch) lane = constant;
  } else {
    for_lanes(step.lanes, [&](int lane) { scratch[lane] = value(step, operand, lane); });
  }
  return scratch;
}

uint64_t* result(const Step& step, const Operand& operand) {
  static thread_local uint64_t unwanted[kLanes];
  if (operand.kind == Operand::Kind::reg) return step.warp.reg(operand.reg);
  if (operand.kind == Operand::Kind::sink) return unwanted;
  step.fail("a result that is no register");
}

}  // namespace ptx
