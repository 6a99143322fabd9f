// The shapes of conv, the same for both platforms:
//
//   keys         s32[B, Cin or 1, K]   ascending in each segment; outside the grid: padding
//   values       T[B, Cin, K]          T = float32, bfloat16 or float16
//   kernel_keys  s32[N]                (oc * Cin + ic) * taps + tap; anything else is padding
//   weights      f32[N]
//   bias         f32[Cout]
//   out_keys     s32[B, Cout, K']
//   out_values   T[B, Cout, K']
//   responses    s32[B, Cout]
//
// and of its gradient, where the batch holds `groups` independent calls, one behind the other:
//
//   values_bar T[B, Cin, K], weights_bar f32[groups, N], bias_bar f32[groups, Cout]

#ifndef ILAJAX_XLA_KERNELS_CONV_H_
#define ILAJAX_XLA_KERNELS_CONV_H_

#include <cstdint>

#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/window.h"

namespace ilajax {

struct ConvShape {
  int64_t batch = 0, in_channels = 0, slots = 0, weights = 0, out_channels = 0, capacity = 0;
  bool shared = false;

  ILAJAX_HOST_DEVICE int64_t KeyOffset(int64_t item, int64_t channel) const {
    return (shared ? item : item * in_channels + channel) * slots;
  }

  // Reads the shapes both directions have in common; `output` is the keys of the kept responses.
  static ffi::Error Read(const ffi::Buffer<ffi::S32>& keys, const ffi::AnyBuffer& values,
                         const ffi::Buffer<ffi::S32>& kernel_keys,
                         const ffi::Buffer<ffi::F32>& weights, const ffi::Buffer<ffi::S32>& output,
                         const Window& window, ConvShape& s) {
    const auto k = keys.dimensions(), v = values.dimensions(), o = output.dimensions();
    if (k.size() != 3 || v.size() != 3 || o.size() != 3 || kernel_keys.dimensions().size() != 1) {
      return InvalidArgument("conv: keys, values and output need 3 dimensions, kernel_keys 1");
    }
    s = {v[0], v[1], v[2], kernel_keys.dimensions()[0], o[1], o[2], k[1] == 1};
    ILAJAX_RETURN_IF_ERROR(
        CheckShape("conv: keys", keys, {s.batch, s.shared ? 1 : s.in_channels, s.slots}));
    ILAJAX_RETURN_IF_ERROR(CheckShape("conv: weights", weights, {s.weights}));
    ILAJAX_RETURN_IF_ERROR(
        CheckShape("conv: output", output, {s.batch, s.out_channels, s.capacity}));
    if (window.taps * s.in_channels * s.out_channels > 0x7fffffff) {
      return InvalidArgument("conv: a kernel has 2^31 weights or more");
    }
    return ffi::Error::Success();
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_H_
