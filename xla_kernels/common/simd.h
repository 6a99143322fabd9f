// Vectors of eight floats, and code compiled for more than one instruction set.
//
// A file of inner loops, marked ILAJAX_SIMD, is included by simd_targets.h once for each
// instruction set, into a namespace of its own; `HasAvx2` tells at run time which to call.
// Everything else is compiled for the baseline, so that no function of an unsupported instruction
// set can be linked in the place of another.

#ifndef ILAJAX_XLA_KERNELS_COMMON_SIMD_H_
#define ILAJAX_XLA_KERNELS_COMMON_SIMD_H_

#include <cstdint>

#if defined(__x86_64__) && !defined(__AVX2__)
#define ILAJAX_HAS_AVX2_TARGET 1
#else
#define ILAJAX_HAS_AVX2_TARGET 0
#endif

namespace ilajax {

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef int64_t Longs __attribute__((vector_size(32)));

inline bool HasAvx2() {
#if ILAJAX_HAS_AVX2_TARGET
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                          __builtin_cpu_supports("popcnt");
  return has;
#else
  return false;
#endif
}

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_SIMD_H_
