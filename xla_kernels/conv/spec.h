// Direct sparse convolution with k-selection, and its gradient.

#pragma once

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/target.h"

namespace ilajax {

// A weight's key is (oc * Cin + ic) * taps + tap; anything else is padding. Responses are the
// candidates before the selection.
#define ILAJAX_CONV_FWD(ARG, RET, ATTR)                  \
  ARG(S32, keys, batch, key_channels, slots)             \
  ARG(Values, values, batch, in_channels, slots)         \
  ARG(S32, kernel_keys, weights)                         \
  ARG(F32, weights, weights)                             \
  ARG(F32, bias, out_channels)                           \
  RET(S32, out_keys, batch, out_channels, capacity)      \
  RET(Values, out_values, batch, out_channels, capacity) \
  RET(S32, responses, batch, out_channels)               \
  RET(U8, workspace)                                     \
  ATTR(std::string_view, select)                         \
  ATTR(Span, window)                                     \
  ATTR(Span, plan)
ILAJAX_CALL(ConvFwd, ConvShape, "conv", ILAJAX_CONV_FWD)

#define ILAJAX_CONV_BWD(ARG, RET, ATTR)                 \
  ARG(S32, keys, batch, key_channels, slots)            \
  ARG(Values, values, batch, in_channels, slots)        \
  ARG(S32, kernel_keys, weights)                        \
  ARG(F32, weights, weights)                            \
  ARG(S32, out_keys, batch, out_channels, capacity)     \
  ARG(Values, cotangent, batch, out_channels, capacity) \
  RET(Values, values_bar, batch, in_channels, slots)    \
  RET(F32, weights_bar, groups, weights)                \
  RET(F32, bias_bar, groups, out_channels)              \
  RET(U8, workspace)                                    \
  ATTR(Span, window)                                    \
  ATTR(Span, plan)
ILAJAX_CALL(ConvBwd, ConvShape, "conv", ILAJAX_CONV_BWD)

}  // namespace ilajax
