// The shapes of pooling over non-overlapping cells, the same for both platforms:
//
//   keys         s32[B, C or 1, K]    ascending in each segment; outside the grid: padding
//   values       T[B, C, K]           T = float32, bfloat16 or float16
//   pooled_keys  s32[B, C or 1, K']   of the grid of cells
//   pooled       T[B, C, K']
//
// Gradient: values_bar T[B, C, K].

#ifndef ILAJAX_XLA_KERNELS_POOL_H_
#define ILAJAX_XLA_KERNELS_POOL_H_

#include <cstdint>
#include <string_view>

#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/window.h"

namespace ilajax {

struct PoolShape {
  int64_t batch = 0, channels = 0, slots = 0, capacity = 0;
  bool shared = false, average = false;
  Window w;

  ILAJAX_HOST_DEVICE int64_t segments() const { return batch * channels; }
  ILAJAX_HOST_DEVICE int64_t key_segments() const { return shared ? batch : segments(); }
  ILAJAX_HOST_DEVICE int64_t KeySegment(int64_t segment) const {
    return shared ? segment / channels : segment;
  }
  // Cells that a segment can have.
  int64_t most_cells() const { return slots < w.output_sites ? slots : w.output_sites; }
  bool Cuts() const { return capacity < most_cells(); }

  // Reads all but the window, which has been read. `pooled` are the output's, or their cotangent.
  static ffi::Error Read(const ffi::Buffer<ffi::S32>& keys, const ffi::AnyBuffer& values,
                         const ffi::Buffer<ffi::S32>& pooled_keys, const ffi::AnyBuffer& pooled,
                         std::string_view mode, PoolShape& s) {
    const auto v = values.dimensions(), k = keys.dimensions(), o = pooled.dimensions();
    if (v.size() != 3 || k.size() != 3 || o.size() != 3) {
      return InvalidArgument("pool: buffers need 3 dimensions");
    }
    s.batch = v[0], s.channels = v[1], s.slots = v[2], s.capacity = o[2];
    s.shared = k[1] == 1;
    s.average = mode == "avg";
    if (mode != "avg" && mode != "max") return InvalidArgument("pool: mode is \"", mode, "\"");
    const int64_t key_channels = s.shared ? 1 : s.channels;
    ILAJAX_RETURN_IF_ERROR(CheckShape("pool: keys", keys, {s.batch, key_channels, s.slots}));
    ILAJAX_RETURN_IF_ERROR(
        CheckShape("pool: pooled_keys", pooled_keys, {s.batch, key_channels, s.capacity}));
    ILAJAX_RETURN_IF_ERROR(CheckShape("pool: pooled", pooled, {s.batch, s.channels, s.capacity}));
    if (pooled.element_type() != values.element_type()) {
      return InvalidArgument("pool: values and pooled have different dtypes");
    }
    if (s.shared && s.channels > 1 && s.Cuts()) {
      return InvalidArgument("pool: a selection that cuts needs keys for each channel");
    }
    for (int a = 0; a < s.w.rank; ++a) {
      if (s.w.output_shape[a] != CeilDiv(s.w.input_shape[a], s.w.strides[a]) || s.w.low[a] != 0) {
        return InvalidArgument("pool: cells must cover the grid without overlap");
      }
    }
    return ffi::Error::Success();
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_POOL_H_
