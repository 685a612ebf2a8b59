// How one wheel serves every processor: each kernel is an always-inlined template, and a plain function per element
// type calls it under GCC's target_clones, which compiles that function (and what is inlined) once per instruction set
// and lets the loader pick. A default build of the bf16 kernels is 3 to 13 times slower than the best clone.
// Other compilers and architectures get the plain function, built for whatever they are told to target.
#pragma once

#include "numeric.h"

// Sanitizers cannot run before the loader's resolvers; their builds define UMMRM_NO_CLONES. musl has no resolvers.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && !defined(UMMRM_NO_CLONES)
#if __GNUC__ >= 12  // the first to know the micro-architecture levels
#define UMMRM_HAS_CLONES 1
#endif
#endif

#ifdef UMMRM_HAS_CLONES
#define UMMRM_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define UMMRM_CLONES
#endif

// Defines `launcher_f64`, ... calling the template `body<T>`, and `launcher`, which picks one by args.dtype.
#define UMMRM_DEFINE_LAUNCHER(launcher, Args, body)                                        \
  UMMRM_CLONES static void launcher##_f64(const Args& args, int64_t begin, int64_t end) {  \
    body<double>(args, begin, end);                                                        \
  }                                                                                        \
  UMMRM_CLONES static void launcher##_f32(const Args& args, int64_t begin, int64_t end) {  \
    body<float>(args, begin, end);                                                         \
  }                                                                                        \
  UMMRM_CLONES static void launcher##_bf16(const Args& args, int64_t begin, int64_t end) { \
    body<bf16>(args, begin, end);                                                          \
  }                                                                                        \
  UMMRM_CLONES static void launcher##_f16(const Args& args, int64_t begin, int64_t end) {  \
    body<f16>(args, begin, end);                                                           \
  }                                                                                        \
  void launcher(const Args& args, int64_t begin, int64_t end) {                            \
    switch (args.dtype) {                                                                  \
      case DType::f64: return launcher##_f64(args, begin, end);                            \
      case DType::f32: return launcher##_f32(args, begin, end);                            \
      case DType::bf16: return launcher##_bf16(args, begin, end);                          \
      case DType::f16: return launcher##_f16(args, begin, end);                            \
    }                                                                                      \
  }

// The same for kernels that widen on loading and differ only by the type they compute in: two functions, not four.
#define UMMRM_DEFINE_WIDE_LAUNCHER(launcher, Args, body)                                                   \
  UMMRM_CLONES static void launcher##_f64(const Args& args, int64_t begin, int64_t end) {                  \
    body<double>(args, begin, end);                                                                        \
  }                                                                                                        \
  UMMRM_CLONES static void launcher##_f32(const Args& args, int64_t begin, int64_t end) {                  \
    body<float>(args, begin, end);                                                                         \
  }                                                                                                        \
  void launcher(const Args& args, int64_t begin, int64_t end) {                                            \
    return args.dtype == DType::f64 ? launcher##_f64(args, begin, end) : launcher##_f32(args, begin, end); \
  }
