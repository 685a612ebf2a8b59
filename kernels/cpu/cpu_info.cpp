// Asks the processor, once, what dispatch.h's resolvers ask.
#include "ummrm/cpu_info.h"

#include "dispatch.h"

namespace ummrm::cpu {

const char* isa() {
#ifdef UMMRM_HAS_CLONES
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "baseline";
}

bool is_amd() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace ummrm::cpu
