// The loops over pairs of sites, for the instruction set of this processor.

#pragma once

#include <algorithm>
#include <type_traits>

#include "xla_kernels/common/simd.h"
#include "xla_kernels/products/pairs.h"

namespace ilajax::products::baseline {
#include "xla_kernels/products/loops.inc"
}  // namespace ilajax::products::baseline

#if ILAJAX_HAS_AVX2_TARGET
ILAJAX_BEGIN_AVX2
namespace ilajax::products::avx2 {
#include "xla_kernels/products/loops.inc"
}  // namespace ilajax::products::avx2
ILAJAX_END_TARGET
#else
namespace ilajax::products::avx2 {
using baseline::Loops;
}  // namespace ilajax::products::avx2
#endif

namespace ilajax::products {

// Calls f.template operator()<Loops>().
template <typename F>
void DispatchLoops(F&& f) {
  if (HasAvx2()) return f.template operator()<avx2::Loops>();
  return f.template operator()<baseline::Loops>();
}

}  // namespace ilajax::products
