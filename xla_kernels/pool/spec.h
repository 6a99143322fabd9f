// Pooling over windows, which are cells where they do not overlap, and its gradient.

#pragma once

#include <algorithm>
#include <cstdlib>

#include "xla_kernels/common/target.h"

namespace ilajax {

// What is made of a window's stored entries. An average is over all its sites inside the grid, or over the
// stored ones.
enum class PoolMode { kMax, kSum, kOverSites, kOverStored };

// An output site is a window; the output grid is that of windows.
struct PoolShape {
  int64_t batch = kUnread, channels = kUnread, slots = kUnread, capacity = kUnread;
  int64_t key_channels = kUnread;  // 1: one support for all channels
  int64_t value_slots = kUnread;   // in the gradient: as many as slots, or none
  Window w;

  static constexpr int64_t kMost = 0x7fffffff;

  ILAJAX_HOST_DEVICE int64_t segments() const { return batch * channels; }
  ILAJAX_HOST_DEVICE int64_t key_segments() const { return batch * key_channels; }
  ILAJAX_HOST_DEVICE int64_t KeySegment(int64_t segment) const {
    return key_channels == 1 ? segment / channels : segment;
  }
  // Whether a segment writes the keys: of a shared support the first channel does.
  ILAJAX_HOST_DEVICE bool WritesKeys(int64_t segment) const {
    return key_channels != 1 || segment % channels == 0;
  }
  // How many windows may hold a site along an axis, and in all.
  ILAJAX_HOST_DEVICE int64_t Reach(int a) const {
    return (w.window_shape[a] + w.strides[a] - 1) / w.strides[a];
  }
  int64_t reach() const {
    int64_t all = 1;
    for (int a = 0; a < w.rank; ++a) all *= Reach(a);
    return all;
  }
  // Whether each site lies in one window, as in cells side by side from the first site on.
  bool Plain() const {
    bool plain = true;
    for (int a = 0; a < w.rank; ++a) {
      plain &= w.low[a] == 0 && w.window_shape[a] == w.strides[a] &&
               w.output_shape[a] == CeilDiv(w.input_shape[a], w.strides[a]);
    }
    return plain;
  }

  // Windows that a segment can fill.
  int64_t most_cells() const { return std::min(slots * reach(), w.output_sites); }
  bool Cuts() const { return capacity < most_cells(); }

  ffi::Error Check(const char* op) const {
    ILAJAX_RETURN_IF_ERROR(w.CheckUndilated(op));
    ILAJAX_RETURN_IF_ERROR(CheckKeyChannels(op, key_channels, channels));
    if (value_slots > 0 && value_slots != slots) {
      return InvalidArgument(op, ": ", value_slots, " values of ", slots, " slots");
    }
    if (!Plain()) {
      for (int a = 0; a < w.rank; ++a) {
        // Positions in the padded grid are numbers of 32 bits.
        const int64_t end = (w.output_shape[a] - 1) * w.strides[a] + w.window_shape[a];
        const int64_t low = std::abs(std::clamp(w.low[a], -kMost, kMost));
        if (std::max(end, w.input_shape[a]) > kMost - low) {
          return InvalidArgument(op, ": the padded grid has 2^31 sites or more along axis ", a);
        }
        if (w.dilation[a] != 1) return InvalidArgument(op, ": windows must not be dilated");
      }
    }
    return CheckCapacity(op, capacity);
  }
};

struct PoolForwardShape : PoolShape {
  ffi::Error Check(const char* op) const {
    ILAJAX_RETURN_IF_ERROR(PoolShape::Check(op));
    if (key_channels == channels || !Cuts()) return ffi::Error::Success();
    return InvalidArgument(op, ": a selection that cuts needs keys for each channel");
  }
};

// Whether a value takes the place of a cell's largest: NaN beats numbers, and nothing beats NaN; of
// equal values the first stays.
ILAJAX_HOST_DEVICE inline bool Beats(float value, float largest) {
  return value > largest || (value != value && largest == largest);
}

// The sites of a window inside the grid along an axis: the first one, and how many there are.
struct Extent {
  int64_t first, count;

  ILAJAX_HOST_DEVICE Extent(const Window& w, int a, int64_t window) {
    const int64_t start = window * w.strides[a] - w.low[a], end = start + w.window_shape[a];
    first = start > 0 ? start : 0;
    count = (end < w.input_shape[a] ? end : w.input_shape[a]) - first;
  }
};

// Sites of a window inside the grid. Keys and shapes are below 2^31: 32-bit divisions cost half.
ILAJAX_HOST_DEVICE inline float SitesOf(const Window& w, uint32_t cell) {
  int64_t sites = 1;
  for (int a = w.rank - 1; a >= 0; --a) {
    const uint32_t size = static_cast<uint32_t>(w.output_shape[a]);
    sites *= Extent(w, a, cell % size).count;
    cell /= size;
  }
  return static_cast<float>(sites);
}

// From the attribute `mode`.
inline ffi::Error ReadMode(std::string_view name, const PoolShape& s, PoolMode& mode) {
  constexpr std::string_view kNames[] = {"max", "sum", "over_sites", "over_stored"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  if (found == std::end(kNames)) return InvalidArgument("pool: mode is \"", name, "\"");
  mode = static_cast<PoolMode>(found - kNames);
  if (mode != PoolMode::kMax || s.value_slots == kUnread || s.value_slots == s.slots) {
    return ffi::Error::Success();
  }
  return InvalidArgument("pool: the gradient of a maximum needs values");
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
ILAJAX_CALL(PoolFwd, PoolForwardShape, "pool", ILAJAX_POOL_FWD)

// The gradient of a maximum alone reads values: for the others there need be none.
#define ILAJAX_POOL_BWD(ARG, RET, ATTR)                \
  ARG(S32, keys, batch, key_channels, slots)           \
  ARG(Values, values, batch, channels, value_slots)    \
  ARG(S32, pooled_keys, batch, key_channels, capacity) \
  ARG(Values, cotangent, batch, channels, capacity)    \
  RET(Values, values_bar, batch, channels, slots)      \
  RET(U8, workspace)                                   \
  ATTR(std::string_view, mode)                         \
  ATTR(Span, window)                                   \
  ATTR(Span, plan)
ILAJAX_CALL(PoolBwd, PoolShape, "pool", ILAJAX_POOL_BWD)

}  // namespace ilajax
