// The loops over a line, for the instruction set of this processor and a number of channels.

#pragma once

#include <algorithm>
#include <cstring>

#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/simd.h"
#include "xla_kernels/lines/line.h"

namespace ilajax::baseline {
#include "xla_kernels/lines/loops.inc"
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
#include "xla_kernels/lines/loops.inc"
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

namespace ilajax {

// Calls f.template operator()<Loops, kOctets>() for a block of 8 * kOctets channels.
template <typename Loops, typename F>
void DispatchOctets(int64_t block, F&& f) {
  switch (block / kLanes) {
    case 1:
      return f.template operator()<Loops, 1>();
    case 2:
      return f.template operator()<Loops, 2>();
    case 3:
      return f.template operator()<Loops, 3>();
    default:
      return f.template operator()<Loops, 4>();
  }
}
template <typename F>
void DispatchLoops(int64_t block, F&& f) {
  if (HasAvx2()) return DispatchOctets<avx2::Loops>(block, f);
  return DispatchOctets<baseline::Loops>(block, f);
}

}  // namespace ilajax
