// The shapes of to_dense, the same for both platforms:
//
//   keys      s32[B, C or 1, K]   ascending in each segment; a key outside [0, sites) is padding
//   values    T[B, C, K]          T = float32, bfloat16 or float16
//   dense     T[B, C, sites]

#ifndef ILAJAX_XLA_KERNELS_TO_DENSE_H_
#define ILAJAX_XLA_KERNELS_TO_DENSE_H_

#include <cstdint>

#include "xla_kernels/common/ffi.h"

namespace ilajax {

struct ToDenseShape {
  int64_t batch = 0, channels = 0, capacity = 0, sites = 0;
  bool shared = false;  // one support for all channels

  ILAJAX_HOST_DEVICE int64_t segments() const { return batch * channels; }

  // Where the keys of segment b * channels + c begin.
  ILAJAX_HOST_DEVICE int64_t KeyOffset(int64_t segment) const {
    return (shared ? segment / channels : segment) * capacity;
  }

  static ffi::Error Read(const ffi::Buffer<ffi::S32>& keys, const ffi::AnyBuffer& values,
                         const ffi::AnyBuffer& dense, ToDenseShape& s) {
    const auto k = keys.dimensions(), v = values.dimensions(), d = dense.dimensions();
    if (k.size() != 3 || v.size() != 3 || d.size() != 3) {
      return InvalidArgument("to_dense: keys, values and dense have ", k.size(), ", ", v.size(),
                             " and ", d.size(), " dimensions, expected 3");
    }
    s = {v[0], v[1], v[2], d[2], k[1] == 1};
    const int64_t key_channels = s.shared ? 1 : s.channels;
    ILAJAX_RETURN_IF_ERROR(CheckShape("to_dense: keys", keys, {s.batch, key_channels, s.capacity}));
    ILAJAX_RETURN_IF_ERROR(CheckShape("to_dense: dense", dense, {s.batch, s.channels, s.sites}));
    if (dense.element_type() != values.element_type()) {
      return InvalidArgument("to_dense: values and dense have different dtypes");
    }
    return ffi::Error::Success();
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_TO_DENSE_H_
