// What planted_kernels.cu hands over: kernels with a bug, and beside each the same without it, by the order of the
// enumeration.
#pragma once

enum Planted {
  kNoBarrierBeforeReading,
  kNoBarrierBeforeReuse,
  kNoBarrierBetweenStages,
  kShuffleInABranch,
  kShuffleAfterSomeLeft,
  kBarrierInBothBranches,
  kBarrierInOneBranch,
  kLaneOutsideItsMask,
  kSourceOutsideTheMask,
  kDifferentCollectives,
  kSharedReadUnwritten,
  kNoSyncwarp,
  kSharedOverrun,
  kGlobalOverrun,
  kMisalignedVector,
  kLastRowUnwritten,
  kOrderOfBlocks,
  kLostUpdate,
  kLastBlockSums,
  kPlantedCount
};

struct PlantedKernel {
  const void *bug, *right;
};
extern const PlantedKernel kPlantedKernels[kPlantedCount];
