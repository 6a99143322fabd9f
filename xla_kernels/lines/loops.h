// The loops over a line, for the instruction set of this processor and a number of channels.

#ifndef ILAJAX_XLA_KERNELS_LINES_LOOPS_H_
#define ILAJAX_XLA_KERNELS_LINES_LOOPS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/divider.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/simd.h"
#include "xla_kernels/lines/line.h"

#define ILAJAX_SIMD_FILE "xla_kernels/lines/loops.inc"
#include "xla_kernels/common/simd_targets.h"

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

#endif  // ILAJAX_XLA_KERNELS_LINES_LOOPS_H_
