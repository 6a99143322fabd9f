// A site map: which stored sites of one support a window reads at the sites of another. Layers that share both
// supports share their map, since XLA makes equal calls once.
//
// The sites that neighbouring taps read are neighbours among the stored ones, too. So there is a word for
// each group of up to three (TapGroups in products/pairs.h): the slot of the first site, times 8, and a bit for
// each tap that reads one.

#pragma once

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/target.h"

namespace ilajax {

struct SiteMapShape : ConvShape {
  int64_t out_key_channels = kUnread;

  ffi::Error Check(const char* op) {
    ILAJAX_RETURN_IF_ERROR(CheckShared(op, out_key_channels));
    in_channels = out_channels = 1;
    return CheckSpread(op);
  }
};

#define ILAJAX_SITE_MAP_FWD(ARG, RET, ATTR)             \
  ARG(S32, keys, batch, key_channels, slots)            \
  ARG(S32, out_keys, batch, out_key_channels, capacity) \
  RET(S32, map, batch, map_words, capacity)             \
  RET(U8, workspace)                                    \
  ATTR(Span, window)                                    \
  ATTR(Span, plan)
ILAJAX_CALL(SiteMapFwd, SiteMapShape, "site_map", ILAJAX_SITE_MAP_FWD)

}  // namespace ilajax
