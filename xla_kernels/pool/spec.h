// Pooling over non-overlapping cells, and its gradient.

#pragma once

#include "xla_kernels/common/target.h"

namespace ilajax {

// The window's strides are the cells' sides, its output grid is that of cells.
struct PoolShape {
  int64_t batch = kUnread, channels = kUnread, slots = kUnread, capacity = kUnread;
  int64_t key_channels = kUnread;  // 1: one support for all channels
  Window w;

  ILAJAX_HOST_DEVICE int64_t segments() const { return batch * channels; }
  ILAJAX_HOST_DEVICE int64_t key_segments() const { return batch * key_channels; }
  ILAJAX_HOST_DEVICE int64_t KeySegment(int64_t segment) const {
    return key_channels == 1 ? segment / channels : segment;
  }
  // Whether a segment writes the keys: of a shared support the first channel does.
  ILAJAX_HOST_DEVICE bool WritesKeys(int64_t segment) const {
    return key_channels != 1 || segment % channels == 0;
  }
  // Cells that a segment can have.
  int64_t most_cells() const { return slots < w.output_sites ? slots : w.output_sites; }
  bool Cuts() const { return capacity < most_cells(); }

  ffi::Error Check(const char* op) const {
    ILAJAX_RETURN_IF_ERROR(w.CheckUndilated(op));
    ILAJAX_RETURN_IF_ERROR(CheckKeyChannels(op, key_channels, channels));
    if (key_channels < channels && Cuts()) {
      return InvalidArgument(op, ": a selection that cuts needs keys for each channel");
    }
    for (int a = 0; a < w.rank; ++a) {
      if (w.output_shape[a] != CeilDiv(w.input_shape[a], w.strides[a]) || w.low[a] != 0) {
        return InvalidArgument(op, ": cells must cover the grid without overlap");
      }
    }
    return CheckCapacity(op, capacity);
  }
};

// Whether a value takes the place of a cell's largest: NaN beats numbers, and nothing beats NaN; of
// equal values the first stays.
ILAJAX_HOST_DEVICE inline bool Beats(float value, float largest) {
  return value > largest || (value != value && largest == largest);
}

// Sites of a cell inside the grid. Keys and shapes are below 2^31: 32-bit divisions cost half.
ILAJAX_HOST_DEVICE inline float SitesOf(const Window& w, uint32_t cell) {
  int64_t sites = 1;
  for (int a = w.rank - 1; a >= 0; --a) {
    const uint32_t size = static_cast<uint32_t>(w.output_shape[a]);
    const int64_t stride = w.strides[a], rest = w.input_shape[a] - cell % size * stride;
    sites *= stride < rest ? stride : rest;
    cell /= size;
  }
  return static_cast<float>(sites);
}

// `average` from the attribute `mode`.
inline ffi::Error ReadMode(std::string_view mode, bool& average) {
  average = mode == "avg";
  if (average || mode == "max") return ffi::Error::Success();
  return InvalidArgument("pool: mode is \"", mode, "\"");
}

#define ILAJAX_POOL_FWD(ARG, RET, ATTR)                \
  ARG(S32, keys, batch, key_channels, slots)           \
  ARG(Values, values, batch, channels, slots)          \
  RET(S32, pooled_keys, batch, key_channels, capacity) \
  RET(Values, pooled, batch, channels, capacity)       \
  RET(U8, workspace)                                   \
  ATTR(std::string_view, mode)                         \
  ATTR(Span, window)                                   \
  ATTR(Span, plan)
ILAJAX_CALL(PoolFwd, PoolShape, "pool", ILAJAX_POOL_FWD)

#define ILAJAX_POOL_BWD(ARG, RET, ATTR)                \
  ARG(S32, keys, batch, key_channels, slots)           \
  ARG(Values, values, batch, channels, slots)          \
  ARG(S32, pooled_keys, batch, key_channels, capacity) \
  ARG(Values, cotangent, batch, channels, capacity)    \
  RET(Values, values_bar, batch, channels, slots)      \
  RET(U8, workspace)                                   \
  ATTR(std::string_view, mode)                         \
  ATTR(Span, window)                                   \
  ATTR(Span, plan)
ILAJAX_CALL(PoolBwd, PoolShape, "pool", ILAJAX_POOL_BWD)

}  // namespace ilajax
