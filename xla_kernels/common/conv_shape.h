// The sizes of a convolution, whatever its support.

#pragma once

#include "xla_kernels/common/target.h"

namespace ilajax {

struct ConvShape {
  int64_t batch = kUnread, in_channels = kUnread, slots = kUnread, weights = kUnread;
  int64_t out_channels = kUnread, capacity = kUnread;
  int64_t key_channels = kUnread;  // 1: one support for all input channels
  int64_t groups = kUnread;  // independent calls in the batch, each with a gradient of its filter
  // Of a site map (site_map/spec.h); 0 where a call has none.
  int64_t map_items = kUnread, map_words = kUnread, map_slots = kUnread;
  Window w;

  ILAJAX_HOST_DEVICE bool shared() const { return key_channels == 1; }
  ILAJAX_HOST_DEVICE int64_t KeyOffset(int64_t item, int64_t channel) const {
    return (shared() ? item : item * in_channels + channel) * slots;
  }

  // What the shapes of buffers do not say.
  ffi::Error Check(const char* op) {
    ILAJAX_RETURN_IF_ERROR(w.CheckUndilated(op));
    return CheckSizes(op);
  }
  // Where the input may be dilated: the products' bitmaps, forward and backward, are those of grids
  // that are spread apart.
  ffi::Error CheckSpread(const char* op) {
    int64_t input_sites = 1, output_sites = 1;
    for (int a = 0; a < w.rank; ++a) {
      input_sites *= (w.input_shape[a] - 1) * w.input_dilation[a] + 1;
      output_sites *= (w.output_shape[a] - 1) * w.strides[a] + 1;
      if (input_sites > 0x7fffffff || output_sites > 0x7fffffff) {
        return InvalidArgument(op, ": a grid, spread by its stride, has 2^31 sites or more");
      }
    }
    return CheckSizes(op);
  }
  // Where there is one support for all channels: a site map has 29 bits for a slot.
  ffi::Error CheckShared(const char* op, int64_t output_key_channels) const {
    if (key_channels != 1 || output_key_channels != 1) {
      return InvalidArgument(op, ": keys must be those of all channels");
    }
    if (slots > 1 << 29 || capacity > 1 << 29) {
      return InvalidArgument(op, ": a support of more than 2^29 slots");
    }
    return ffi::Error::Success();
  }
  ffi::Error CheckSizes(const char* op) {
    if (groups == kUnread) groups = 1;
    ILAJAX_RETURN_IF_ERROR(CheckKeyChannels(op, key_channels, in_channels));
    ILAJAX_RETURN_IF_ERROR(CheckCapacity(op, capacity));
    if (groups < 1 || batch % groups != 0) {
      return InvalidArgument(op, ": a batch of ", batch, " does not hold ", groups, " groups");
    }
    if (w.taps * in_channels * out_channels > 0x7fffffff) {
      return InvalidArgument(op, ": a kernel has 2^31 weights or more");
    }
    return ffi::Error::Success();
  }
};

// A weight's channels and tap, from its key. Keys mostly ascend by one.
class WeightPlace {
 public:
  WeightPlace(int64_t in_channels, int64_t out_channels, int64_t taps)
      : in_channels_(in_channels), taps_(taps), weights_(in_channels * out_channels * taps) {}

  // False for padding.
  bool MoveTo(int64_t key) {
    if (key < 0 || key >= weights_) return false;
    if (static_cast<uint64_t>(key - run_) >= static_cast<uint64_t>(taps_)) {
      const int64_t pair = key / taps_;
      run_ = pair * taps_;
      out = pair / in_channels_, in = pair - out * in_channels_;
    }
    tap = key - run_;
    return true;
  }

  int64_t in = 0, out = 0, tap = 0;

 private:
  int64_t in_channels_, taps_, weights_;
  int64_t run_ = 0;  // the key of the first tap of the channels
};

}  // namespace ilajax
