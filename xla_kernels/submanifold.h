// The shapes of a submanifold convolution, the same for both platforms:
//
//   keys         s32[B, 1, K]     one support for all channels, of input and output
//   values       T[B, Cin, K]     T = float32, bfloat16 or float16
//   kernel_keys  s32[N]           (oc * Cin + ic) * taps + tap; anything else is padding
//   weights      f32[N]
//   bias         f32[Cout]
//   features     T[B, Cout, K]    responses s32[B, Cout]: how many are not zero
//
// and of its gradient, where the batch holds `groups` independent calls, one behind the other:
//
//   values_bar T[B, Cin, K], weights_bar f32[groups, N], bias_bar f32[groups, Cout]

#ifndef ILAJAX_XLA_KERNELS_SUBMANIFOLD_H_
#define ILAJAX_XLA_KERNELS_SUBMANIFOLD_H_

#include <cstdint>

#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/window.h"

namespace ilajax {

struct SubmanifoldShape {
  int64_t batch = 0, in_channels = 0, slots = 0, weights = 0, out_channels = 0;

  // `features` are the output's, or their cotangent.
  static ffi::Error Read(const ffi::Buffer<ffi::S32>& keys, const ffi::AnyBuffer& values,
                         const ffi::Buffer<ffi::S32>& kernel_keys,
                         const ffi::Buffer<ffi::F32>& weights, const ffi::AnyBuffer& features,
                         const Window& w, SubmanifoldShape& s) {
    const auto v = values.dimensions(), f = features.dimensions();
    if (v.size() != 3 || f.size() != 3 || kernel_keys.dimensions().size() != 1) {
      return InvalidArgument("submanifold: values and features need 3 dimensions, kernel_keys 1");
    }
    s = {v[0], v[1], v[2], kernel_keys.dimensions()[0], f[1]};
    ILAJAX_RETURN_IF_ERROR(CheckShape("submanifold: keys", keys, {s.batch, 1, s.slots}));
    ILAJAX_RETURN_IF_ERROR(CheckShape("submanifold: weights", weights, {s.weights}));
    ILAJAX_RETURN_IF_ERROR(
        CheckShape("submanifold: features", features, {s.batch, s.out_channels, s.slots}));
    if (features.element_type() != values.element_type()) {
      return InvalidArgument("submanifold: values and features have different dtypes");
    }
    for (int a = 0; a < w.rank; ++a) {
      if (w.strides[a] != 1 || w.input_shape[a] != w.output_shape[a]) {
        return InvalidArgument("submanifold: input and output must have one grid, and stride 1");
      }
    }
    if (w.taps * s.in_channels * s.out_channels > 0x7fffffff) {
      return InvalidArgument("submanifold: a kernel has 2^31 weights or more");
    }
    return ffi::Error::Success();
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_SUBMANIFOLD_H_
