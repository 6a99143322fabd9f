// Stored values in a zero-filled grid, and the gradient, which gathers them back.

#pragma once

#include "xla_kernels/common/target.h"

namespace ilajax {

struct ToDenseShape {
  int64_t batch = kUnread, channels = kUnread, slots = kUnread, sites = kUnread;
  int64_t key_channels = kUnread;  // 1: one support for all channels

  ILAJAX_HOST_DEVICE int64_t segments() const { return batch * channels; }

  // Where the keys of segment b * channels + c begin.
  ILAJAX_HOST_DEVICE int64_t KeyOffset(int64_t segment) const {
    return (key_channels == 1 ? segment / channels : segment) * slots;
  }
  ffi::Error Check(const char* op) const { return CheckKeyChannels(op, key_channels, channels); }
};

#define ILAJAX_TO_DENSE_FWD(ARG, RET, ATTR)   \
  ARG(S32, keys, batch, key_channels, slots)  \
  ARG(Values, values, batch, channels, slots) \
  RET(Values, dense, batch, channels, sites)
ILAJAX_CALL(ToDenseFwd, ToDenseShape, "to_dense", ILAJAX_TO_DENSE_FWD)

#define ILAJAX_TO_DENSE_BWD(ARG, RET, ATTR)      \
  ARG(S32, keys, batch, key_channels, slots)     \
  ARG(Values, dense_bar, batch, channels, sites) \
  RET(Values, values_bar, batch, channels, slots)
ILAJAX_CALL(ToDenseBwd, ToDenseShape, "to_dense", ILAJAX_TO_DENSE_BWD)

}  // namespace ilajax
