// Convolution at given sites, transposed convolution too, and its gradient.

#pragma once

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/target.h"

namespace ilajax {

// Keys are [B, 1, K], one support for all channels of the input, and another for those of the
// output. Responses are those that are not zero.
struct ConvAtShape : ConvShape {
  int64_t out_key_channels = kUnread;

  ffi::Error Check(const char* op) {
    ILAJAX_RETURN_IF_ERROR(CheckShared(op, out_key_channels));
    return CheckSpread(op);
  }
};

#define ILAJAX_CONV_AT_FWD(ARG, RET, ATTR)              \
  ARG(S32, keys, batch, key_channels, slots)            \
  ARG(Values, values, batch, in_channels, slots)        \
  ARG(S32, out_keys, batch, out_key_channels, capacity) \
  ARG(S32, kernel_keys, weights)                        \
  ARG(F32, weights, weights)                            \
  ARG(F32, bias, out_channels)                          \
  ARG(S32, map, map_items, map_words, map_slots)        \
  RET(Values, features, batch, out_channels, capacity)  \
  RET(S32, responses, batch, out_channels)              \
  RET(U8, workspace)                                    \
  ATTR(Span, window)                                    \
  ATTR(Span, plan)
ILAJAX_CALL(ConvAtFwd, ConvAtShape, "conv_at", ILAJAX_CONV_AT_FWD)

#define ILAJAX_CONV_AT_BWD(ARG, RET, ATTR)              \
  ARG(S32, keys, batch, key_channels, slots)            \
  ARG(Values, values, batch, in_channels, slots)        \
  ARG(S32, out_keys, batch, out_key_channels, capacity) \
  ARG(S32, kernel_keys, weights)                        \
  ARG(F32, weights, weights)                            \
  ARG(Values, cotangent, batch, out_channels, capacity) \
  ARG(S32, map, map_items, map_words, map_slots)        \
  RET(Values, values_bar, batch, in_channels, slots)    \
  RET(F32, weights_bar, groups, weights)                \
  RET(F32, bias_bar, groups, out_channels)              \
  RET(U8, workspace)                                    \
  ATTR(Span, window)                                    \
  ATTR(Span, plan)
ILAJAX_CALL(ConvAtBwd, ConvAtShape, "conv_at", ILAJAX_CONV_AT_BWD)

}  // namespace ilajax
