// The header emulator's planted bugs (tests/emulator/planted.h), compiled by nvcc, for run_planted_kernels.cpp.
#include "../emulator/planted.h"
#include "planted_kernels.h"

#define BOTH(kernel) \
  {reinterpret_cast<const void*>(&planted::kernel<true>), reinterpret_cast<const void*>(&planted::kernel<false>)}

const PlantedKernel kPlantedKernels[kPlantedCount] = {BOTH(no_barrier_before_reading),
                                                      BOTH(no_barrier_before_reuse),
                                                      BOTH(no_barrier_between_stages),
                                                      BOTH(shuffle_in_a_branch),
                                                      BOTH(shuffle_after_some_left),
                                                      BOTH(barrier_in_both_branches),
                                                      BOTH(barrier_in_one_branch),
                                                      BOTH(lane_outside_its_mask),
                                                      BOTH(source_outside_the_mask),
                                                      BOTH(different_collectives),
                                                      BOTH(shared_read_unwritten),
                                                      BOTH(no_syncwarp),
                                                      BOTH(shared_overrun),
                                                      BOTH(global_overrun),
                                                      BOTH(misaligned_vector),
                                                      BOTH(last_row_unwritten),
                                                      BOTH(order_of_blocks),
                                                      BOTH(lost_update),
                                                      BOTH(last_block_sums)};
