// Includes the file ILAJAX_SIMD_FILE, inside namespace ilajax, once for each instruction set: as
// namespace baseline and, where the compiler's own target is not already as wide, as namespace
// avx2. No include guard: each .cc with loops of its own includes this once.

#define ILAJAX_SIMD
namespace ilajax::baseline {
#include ILAJAX_SIMD_FILE
}  // namespace ilajax::baseline
#undef ILAJAX_SIMD

#if ILAJAX_HAS_AVX2_TARGET
#define ILAJAX_SIMD __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
namespace ilajax::avx2 {
#include ILAJAX_SIMD_FILE
}  // namespace ilajax::avx2
#undef ILAJAX_SIMD
#else
namespace ilajax::avx2 {
using baseline::Loops;
}  // namespace ilajax::avx2
#endif
