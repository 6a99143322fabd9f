// The non-zeros of a dense array, at most K for each sample and channel. Its gradient is to_dense.

#pragma once

#include "xla_kernels/common/target.h"

namespace ilajax {

struct FromDenseShape {
  int64_t batch = kUnread, sites = kUnread, channels = kUnread, capacity = kUnread;

  ffi::Error Check(const char* op) const { return CheckCapacity(op, capacity); }
};

#define ILAJAX_FROM_DENSE_FWD(ARG, RET, ATTR)    \
  ARG(Values, x, batch, sites, channels)         \
  RET(S32, keys, batch, channels, capacity)      \
  RET(Values, values, batch, channels, capacity) \
  RET(U8, workspace)                             \
  ATTR(std::string_view, select)                 \
  ATTR(Span, plan)
ILAJAX_CALL(FromDenseFwd, FromDenseShape, "from_dense", ILAJAX_FROM_DENSE_FWD)

}  // namespace ilajax
