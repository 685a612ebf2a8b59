// Work that an instruction starts and that is done later: cp.async, tensor copies and wgmma. When it is done,
// Options::order says: at once, as late as the program allows (when something waits for it, or nobody can go on), or at
// random between.
#pragma once

#include "machine.h"

namespace ptx {

bool do_at_once(Launch& launch);  // what is issued now

// ---- for the scheduler
void do_some(Launch& launch, Warp& warp);         // of what the warp has under way, as the seed draws it
bool do_first(Launch& launch, Cluster& cluster);  // the oldest tensor load, if there is one
void finish(Launch& launch, Warp& warp);          // a warp that has ended

// ---- each kind, where its instructions are
void do_copy(Warp& warp, Copy& copy);                               // copies.cpp
void do_load(Launch& launch, Cluster& cluster, size_t index);       // tensors.cpp; takes it off the list
void read_store(Launch& launch, Warp& warp, TensorStore& store);    // its shared memory
void do_store(Launch& launch, Warp& warp, TensorStore& store);      // and writes
void do_product(Launch& launch, Warp& warp, WarpProduct& product);  // wgmma.cpp

}  // namespace ptx
