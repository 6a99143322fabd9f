// The loops over pairs of sites, for the instruction set of this processor.

#pragma once

#include <algorithm>
#include <type_traits>

#include "xla_kernels/common/simd.h"
#include "xla_kernels/products/pairs.h"

namespace ilajax::products::baseline {
using Vector = Floats;
constexpr int kVectors = 2;  // of a block of output channels
constexpr int kPairs = 6;    // at once: as many as there are registers for
#include "xla_kernels/products/loops.inc"
}  // namespace ilajax::products::baseline

#if ILAJAX_HAS_AVX2_TARGET
ILAJAX_BEGIN_AVX2
namespace ilajax::products::avx2 {
using Vector = Floats;
constexpr int kVectors = 2, kPairs = 6;
#include "xla_kernels/products/loops.inc"
}  // namespace ilajax::products::avx2
ILAJAX_END_TARGET
ILAJAX_BEGIN_AVX512
namespace ilajax::products::avx512 {
using Vector = WideFloats;
constexpr int kVectors = 1, kPairs = 12;
#include "xla_kernels/products/loops.inc"
}  // namespace ilajax::products::avx512
ILAJAX_END_TARGET
#else
namespace ilajax::products::avx2 {
using baseline::Loops;
}  // namespace ilajax::products::avx2
namespace ilajax::products::avx512 {
using baseline::Loops;
}  // namespace ilajax::products::avx512
#endif

namespace ilajax::products {

// Calls f.template operator()<Loops>().
template <typename F>
void DispatchLoops(F&& f) {
  if (HasAvx512()) return f.template operator()<avx512::Loops>();
  if (HasAvx2()) return f.template operator()<avx2::Loops>();
  return f.template operator()<baseline::Loops>();
}

}  // namespace ilajax::products
