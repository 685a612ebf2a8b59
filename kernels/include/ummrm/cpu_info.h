// What the CPU kernels found out about the processor: which clone of each kernel runs, and who made it.
#pragma once

namespace ummrm::cpu {

// "x86-64-v4", "x86-64-v3" or "baseline": the instruction set that the dispatched kernels use on this machine.
const char* isa();

// True on AMD processors, where MKL's fp32 GEMM is slower than oneDNN's (see csrc/gemm.h).
bool is_amd();

}  // namespace ummrm::cpu
