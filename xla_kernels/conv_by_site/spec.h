// Convolution that keeps the strongest sites, transposed convolution too. Its gradient is that of
// convolution at the sites which it kept.

#pragma once

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/target.h"

namespace ilajax {

// Keys are [B, 1, K], one support for all channels of the input, and another for those of the
// output. Responses are the sites that are candidates before the selection.
struct ConvBySiteShape : ConvShape {
  int64_t out_key_channels = kUnread;

  // Sites that some tap reads a stored one for, at most: candidates are among them.
  int64_t reached() const {
    return w.taps > w.output_sites / std::max<int64_t>(slots, 1) ? w.output_sites : w.taps * slots;
  }

  ffi::Error Check(const char* op) {
    ILAJAX_RETURN_IF_ERROR(CheckShared(op, out_key_channels));
    return CheckSpread(op);
  }
};

#define ILAJAX_CONV_BY_SITE_FWD(ARG, RET, ATTR)         \
  ARG(S32, keys, batch, key_channels, slots)            \
  ARG(Values, values, batch, in_channels, slots)        \
  ARG(S32, kernel_keys, weights)                        \
  ARG(F32, weights, weights)                            \
  ARG(F32, bias, out_channels)                          \
  RET(S32, out_keys, batch, out_key_channels, capacity) \
  RET(Values, features, batch, out_channels, capacity)  \
  RET(S32, responses, batch, out_key_channels)          \
  RET(U8, workspace)                                    \
  ATTR(std::string_view, select)                        \
  ATTR(Span, window)                                    \
  ATTR(Span, plan)
ILAJAX_CALL(ConvBySiteFwd, ConvBySiteShape, "conv_by_site", ILAJAX_CONV_BY_SITE_FWD)

// What a selection of sites may be.
inline ffi::Error ReadSiteSelect(std::string_view name, bool& positive) {
  positive = name == "positive";
  if (positive || name == "magnitude") return ffi::Error::Success();
  return InvalidArgument("select is \"", name, "\", expected positive or magnitude");
}

}  // namespace ilajax
