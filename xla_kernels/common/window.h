// The geometry of a sliding window, ilajax/geometry.py's Window: tap t of output site o reads input
// site o * stride + t * dilation - low.

#ifndef ILAJAX_XLA_KERNELS_COMMON_WINDOW_H_
#define ILAJAX_XLA_KERNELS_COMMON_WINDOW_H_

#include <cstdint>

#include "xla_kernels/common/ffi.h"

namespace ilajax {

constexpr int kMaxRank = 8;

using Span = ffi::Span<const int64_t>;

struct Window {
  int rank = 0;
  int64_t input_shape[kMaxRank], window_shape[kMaxRank], strides[kMaxRank], dilation[kMaxRank];
  int64_t low[kMaxRank], output_shape[kMaxRank];
  int64_t taps = 1, input_sites = 1, output_sites = 1;

  // Sites of one step along the leading axis.
  ILAJAX_HOST_DEVICE int64_t input_row() const { return input_sites / input_shape[0]; }
  ILAJAX_HOST_DEVICE int64_t output_row() const { return output_sites / output_shape[0]; }
  // Reach of the window along the leading axis.
  ILAJAX_HOST_DEVICE int64_t extent() const { return (window_shape[0] - 1) * dilation[0] + 1; }

  static ffi::Error Read(Span input_shape, Span window_shape, Span strides, Span dilation, Span low,
                         Span output_shape, Window& w) {
    const size_t rank = input_shape.size();
    if (rank < 1 || rank > kMaxRank) {
      return InvalidArgument("a grid has ", rank, " axes; kernels take 1 to ", kMaxRank);
    }
    for (const Span& span : {window_shape, strides, dilation, low, output_shape}) {
      if (span.size() != rank) return InvalidArgument("window attributes differ in rank");
    }
    constexpr int64_t kMaxSites = 0x7fffffff;
    w = {};
    w.rank = static_cast<int>(rank);
    for (int a = 0; a < w.rank; ++a) {
      w.input_shape[a] = input_shape[a];
      w.window_shape[a] = window_shape[a];
      w.strides[a] = strides[a];
      w.dilation[a] = dilation[a];
      w.low[a] = low[a];
      w.output_shape[a] = output_shape[a];
      for (int64_t size :
           {input_shape[a], window_shape[a], strides[a], dilation[a], output_shape[a]}) {
        if (size < 1 || size > kMaxSites)
          return InvalidArgument("window attribute ", size, " out of range");
      }
      w.taps *= window_shape[a];
      w.input_sites *= input_shape[a];
      w.output_sites *= output_shape[a];
      if (w.taps > kMaxSites || w.input_sites > kMaxSites || w.output_sites > kMaxSites) {
        return InvalidArgument("a grid or window has 2^31 sites or more");
      }
    }
    return ffi::Error::Success();
  }
};

// Writes how far each tap reaches along each axis, [taps][rank].
inline void TapOffsets(const Window& w, int32_t* offsets) {
  for (int64_t tap = 0; tap < w.taps; ++tap, offsets += w.rank) {
    int64_t rest = tap;
    for (int a = w.rank - 1; a >= 0; --a) {
      offsets[a] = static_cast<int32_t>(rest % w.window_shape[a] * w.dilation[a]);
      rest /= w.window_shape[a];
    }
  }
}

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_WINDOW_H_
