// Includes the file ILAJAX_SIMD_FILE once for each instruction set, see simd.h. No include guard:
// each header with loops of its own includes this once.

namespace ilajax::baseline {
#include ILAJAX_SIMD_FILE
}  // namespace ilajax::baseline

#if ILAJAX_HAS_AVX2_TARGET
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")
#endif
namespace ilajax::avx2 {
#include ILAJAX_SIMD_FILE
}  // namespace ilajax::avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace ilajax::avx2 {
using baseline::Loops;
}  // namespace ilajax::avx2
#endif
