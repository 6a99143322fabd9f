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

// Finds the output sites that a stored entry reaches, within a slab of rows of the leading axis.
class TapWalk {
 public:
  TapWalk(const Window& w, int64_t row_begin, int64_t row_end)
      : w_(w), row_begin_(row_begin), row_end_(row_end), output_row_(w.output_row()) {
    int64_t step = 1;
    for (int a = w.rank - 1; a >= 1; --a) {
      output_step_[a] = step;
      step *= w.output_shape[a];
      unit_strides_ &= w.strides[a] == 1;
    }
  }

  // Turns to the entry at input key `key`, which must lie inside the grid.
  void Seek(int64_t key) {
    base_ = 0;
    interior_ = unit_strides_;
    for (int a = w_.rank - 1; a >= 1; --a) {
      const int64_t p = key % w_.input_shape[a] + w_.low[a];
      key /= w_.input_shape[a];
      place_[a] = p;
      base_ += p * output_step_[a];
      interior_ &= p >= (w_.window_shape[a] - 1) * w_.dilation[a] && p < w_.output_shape[a];
    }
    place_[0] = key + w_.low[0];
  }

  // The output site that the entry reaches through a tap, counted from the slab's first, or -1.
  int64_t Reach(const int32_t* tap_offset) const {
    int64_t row = place_[0] - tap_offset[0];
    if (w_.strides[0] != 1) {
      if (row % w_.strides[0] != 0) return -1;
      row /= w_.strides[0];
    }
    if (row < row_begin_ || row >= row_end_) return -1;
    int64_t site = (row - row_begin_) * output_row_;
    if (interior_) return site + base_ - tap_offset[w_.rank];
    for (int a = 1; a < w_.rank; ++a) {
      int64_t p = place_[a] - tap_offset[a];
      if (w_.strides[a] != 1) {
        if (p % w_.strides[a] != 0) return -1;
        p /= w_.strides[a];
      }
      if (p < 0 || p >= w_.output_shape[a]) return -1;
      site += p * output_step_[a];
    }
    return site;
  }

  // Writes what Reach takes for each tap, [taps][kTapOffsets]: its offset along each axis, and
  // behind them the flat one over all axes but the first.
  static constexpr int kTapOffsets = kMaxRank + 1;
  static void TapOffsets(const Window& w, int32_t* offsets) {
    for (int64_t tap = 0; tap < w.taps; ++tap, offsets += kTapOffsets) {
      int64_t rest = tap, step = 1, flat = 0;
      for (int a = w.rank - 1; a >= 0; --a) {
        const int64_t offset = rest % w.window_shape[a] * w.dilation[a];
        rest /= w.window_shape[a];
        offsets[a] = static_cast<int32_t>(offset);
        if (a >= 1) flat += offset * step;
        step *= w.output_shape[a];
      }
      offsets[w.rank] = static_cast<int32_t>(flat);
    }
  }

 private:
  const Window& w_;
  const int64_t row_begin_, row_end_, output_row_;
  int64_t output_step_[kMaxRank] = {};
  bool unit_strides_ = true;
  int64_t place_[kMaxRank] = {};
  int64_t base_ = 0;
  bool interior_ = false;
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_WINDOW_H_
