// Submanifold convolution, responses at the input's own sites, and its gradient.

#pragma once

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/target.h"

namespace ilajax {

// Keys are [B, 1, K], one support for all channels of input and output. Responses are those that
// are not zero.
struct SubmanifoldShape : ConvShape {
  ffi::Error Check(const char* op) {
    capacity = slots;
    ILAJAX_RETURN_IF_ERROR(CheckShared(op, key_channels));
    for (int a = 0; a < w.rank; ++a) {
      if (w.strides[a] != 1 || w.input_shape[a] != w.output_shape[a]) {
        return InvalidArgument(op, ": input and output must have one grid, and stride 1");
      }
    }
    return ConvShape::Check(op);
  }
};

#define ILAJAX_SUBMANIFOLD_FWD(ARG, RET, ATTR)      \
  ARG(S32, keys, batch, key_channels, slots)        \
  ARG(Values, values, batch, in_channels, slots)    \
  ARG(S32, kernel_keys, weights)                    \
  ARG(F32, weights, weights)                        \
  ARG(F32, bias, out_channels)                      \
  ARG(S32, map, map_items, map_words, map_slots)    \
  RET(Values, features, batch, out_channels, slots) \
  RET(S32, responses, batch, out_channels)          \
  RET(U8, workspace)                                \
  ATTR(Span, window)                                \
  ATTR(Span, plan)
ILAJAX_CALL(SubmanifoldFwd, SubmanifoldShape, "submanifold", ILAJAX_SUBMANIFOLD_FWD)

#define ILAJAX_SUBMANIFOLD_BWD(ARG, RET, ATTR)       \
  ARG(S32, keys, batch, key_channels, slots)         \
  ARG(Values, values, batch, in_channels, slots)     \
  ARG(S32, kernel_keys, weights)                     \
  ARG(F32, weights, weights)                         \
  ARG(Values, cotangent, batch, out_channels, slots) \
  ARG(S32, map, map_items, map_words, map_slots)     \
  RET(Values, values_bar, batch, in_channels, slots) \
  RET(F32, weights_bar, groups, weights)             \
  RET(F32, bias_bar, groups, out_channels)           \
  RET(U8, workspace)                                 \
  ATTR(Span, window)                                 \
  ATTR(Span, plan)
ILAJAX_CALL(SubmanifoldBwd, SubmanifoldShape, "submanifold", ILAJAX_SUBMANIFOLD_BWD)

}  // namespace ilajax
