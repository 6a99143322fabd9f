// k-selection of stored entries, and its gradient.

#pragma once

#include "xla_kernels/common/target.h"

namespace ilajax {

struct KSelectShape {
  int64_t batch = kUnread, channels = kUnread, slots = kUnread, capacity = kUnread;

  ILAJAX_HOST_DEVICE int64_t segments() const { return batch * channels; }
  ffi::Error Check(const char* op) const { return CheckCapacity(op, capacity); }
};

#define ILAJAX_K_SELECT_FWD(ARG, RET, ATTR)           \
  ARG(S32, keys, batch, channels, slots)              \
  ARG(Values, values, batch, channels, slots)         \
  RET(S32, kept_keys, batch, channels, capacity)      \
  RET(Values, kept_values, batch, channels, capacity) \
  RET(U8, workspace)                                  \
  ATTR(int64_t, sites)                                \
  ATTR(std::string_view, select)                      \
  ATTR(Span, plan)
ILAJAX_CALL(KSelectFwd, KSelectShape, "k_select", ILAJAX_K_SELECT_FWD)

#define ILAJAX_K_SELECT_BWD(ARG, RET, ATTR)         \
  ARG(S32, keys, batch, channels, slots)            \
  ARG(S32, kept_keys, batch, channels, capacity)    \
  ARG(Values, cotangent, batch, channels, capacity) \
  RET(Values, values_bar, batch, channels, slots)   \
  ATTR(int64_t, sites)
ILAJAX_CALL(KSelectBwd, KSelectShape, "k_select", ILAJAX_K_SELECT_BWD)

}  // namespace ilajax
