// Vectors of eight floats, and loops compiled for more than one instruction set.
//
// What is shipped runs on any x86-64 (or another processor), and uses AVX2 or AVX-512 where there is
// some. A file of inner loops, such as lines/loops.inc, is compiled several times in one translation
// unit: it is included into namespace `baseline`, for what every processor has, and into `avx2` and
// maybe `avx512`, where a pragma lets the compiler use those and fused multiply-adds. These
// namespaces end in a struct `Loops` with the same members, and HasAvx2() and HasAvx512() choose
// once at run time. Everything outside of those files is compiled for the baseline: an inline
// function of another instruction set, kept by the linker in the place of its twin, would stop an
// older processor.
//
// Loops are written with GCC's vector types, which Clang has as well: on the baseline the compiler
// makes two vectors of four of each. A constant number of vectors is a template parameter, so that
// sums stay in registers; `#pragma GCC unroll` sees to that.

#pragma once

#include <cstdint>

#if defined(__x86_64__) && !defined(__AVX2__)
#define ILAJAX_HAS_AVX2_TARGET 1
#else
#define ILAJAX_HAS_AVX2_TARGET 0
#endif

// Around functions that may use an instruction set, where it has to be asked for.
#if !ILAJAX_HAS_AVX2_TARGET
#define ILAJAX_BEGIN_TARGET(features)
#define ILAJAX_END_TARGET
#elif defined(__clang__)
#define ILAJAX_BEGIN_TARGET(features) \
  ILAJAX_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define ILAJAX_END_TARGET _Pragma("clang attribute pop")
#else
#define ILAJAX_BEGIN_TARGET(features) \
  _Pragma("GCC push_options") ILAJAX_PRAGMA(GCC target(features))
#define ILAJAX_END_TARGET _Pragma("GCC pop_options")
#endif
#define ILAJAX_PRAGMA(text) _Pragma(#text)
#define ILAJAX_BEGIN_AVX2 ILAJAX_BEGIN_TARGET("avx2,fma,bmi,bmi2,popcnt")
#define ILAJAX_BEGIN_AVX512 \
  ILAJAX_BEGIN_TARGET("avx2,fma,bmi,bmi2,popcnt,avx512f,avx512vl,avx512bw,avx512dq")

namespace ilajax {

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef float WideFloats __attribute__((vector_size(64)));  // of AVX-512 alone
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

// AVX-512 for vectors of eight floats: they are no longer, but there are twice as many registers.
inline bool HasAvx512() {
#if ILAJAX_HAS_AVX2_TARGET
  static const bool has = HasAvx2() && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return has;
#else
  return false;
#endif
}

}  // namespace ilajax
