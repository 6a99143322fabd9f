// The loops over a line, for the instruction set of this processor and a number of channels.

#pragma once

#include <algorithm>
#include <cstring>

#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/simd.h"
#include "xla_kernels/lines/line.h"

namespace ilajax::baseline {
constexpr int kRegisters = 8;  // of eight floats
#include "xla_kernels/lines/loops.inc"
}  // namespace ilajax::baseline

#if ILAJAX_HAS_AVX2_TARGET
ILAJAX_BEGIN_AVX2
namespace ilajax::avx2 {
constexpr int kRegisters = 16;
#include "xla_kernels/lines/loops.inc"
}  // namespace ilajax::avx2
ILAJAX_END_TARGET

ILAJAX_BEGIN_AVX512
namespace ilajax::avx512 {
constexpr int kRegisters = 32;
#include "xla_kernels/lines/loops.inc"
}  // namespace ilajax::avx512
ILAJAX_END_TARGET
#else
namespace ilajax::avx2 {
using baseline::Loops;
}  // namespace ilajax::avx2
namespace ilajax::avx512 {
using baseline::Loops;
}  // namespace ilajax::avx512
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
  if (HasAvx512()) return DispatchOctets<avx512::Loops>(block, f);
  if (HasAvx2()) return DispatchOctets<avx2::Loops>(block, f);
  return DispatchOctets<baseline::Loops>(block, f);
}

}  // namespace ilajax
