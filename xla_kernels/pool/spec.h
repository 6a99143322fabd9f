// Pooling over non-overlapping cells, and its gradient.

#ifndef ILAJAX_XLA_KERNELS_POOL_SPEC_H_
#define ILAJAX_XLA_KERNELS_POOL_SPEC_H_

#include <cstdint>
#include <string_view>

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

  // What the shapes of buffers do not say.
  ffi::Error Check() const {
    ILAJAX_RETURN_IF_ERROR(CheckKeyChannels("pool", key_channels, channels));
    if (key_channels < channels && Cuts()) {
      return InvalidArgument("pool: a selection that cuts needs keys for each channel");
    }
    for (int a = 0; a < w.rank; ++a) {
      if (w.output_shape[a] != CeilDiv(w.input_shape[a], w.strides[a]) || w.low[a] != 0) {
        return InvalidArgument("pool: cells must cover the grid without overlap");
      }
    }
    return CheckCapacity("pool", capacity);
  }
};

// `average` from the attribute `mode`.
inline ffi::Error ReadMode(std::string_view mode, bool& average) {
  average = mode == "avg";
  if (average || mode == "max") return ffi::Error::Success();
  return InvalidArgument("pool: mode is \"", mode, "\"");
}

struct PoolFwd {
  using Shape = PoolShape;
  static constexpr const char* kName = "pool";

  S32 keys;
  Values values;
  Ret<S32> pooled_keys;
  Ret<Values> pooled;
  Ret<U8> workspace;
  std::string_view mode;
  Span window, plan;

  static auto Bind() {
    return ffi::Ffi::Bind()
        .Arg<S32>()
        .Arg<Values>()
        .Ret<S32>()
        .Ret<Values>()
        .Ret<U8>()
        .Attr<std::string_view>("mode")
        .Attr<Span>("window")
        .Attr<Span>("plan");
  }
  static ffi::Error Read(Shapes shapes, PoolShape& s) {
    ILAJAX_RETURN_IF_ERROR(ReadSizes(kName, shapes,
                                     {{"keys", {&s.batch, &s.key_channels, &s.slots}},
                                      {"values", {&s.batch, &s.channels, &s.slots}},
                                      {"pooled_keys", {&s.batch, &s.key_channels, &s.capacity}},
                                      {"pooled", {&s.batch, &s.channels, &s.capacity}}}));
    return s.Check();
  }
};

struct PoolBwd {
  using Shape = PoolShape;
  static constexpr const char* kName = "pool";

  S32 keys;
  Values values;
  S32 pooled_keys;
  Values cotangent;  // of pooled
  Ret<Values> values_bar;
  Ret<U8> workspace;
  std::string_view mode;
  Span window, plan;

  static auto Bind() {
    return ffi::Ffi::Bind()
        .Arg<S32>()
        .Arg<Values>()
        .Arg<S32>()
        .Arg<Values>()
        .Ret<Values>()
        .Ret<U8>()
        .Attr<std::string_view>("mode")
        .Attr<Span>("window")
        .Attr<Span>("plan");
  }
  static ffi::Error Read(Shapes shapes, PoolShape& s) {
    ILAJAX_RETURN_IF_ERROR(ReadSizes(kName, shapes,
                                     {{"keys", {&s.batch, &s.key_channels, &s.slots}},
                                      {"values", {&s.batch, &s.channels, &s.slots}},
                                      {"pooled_keys", {&s.batch, &s.key_channels, &s.capacity}},
                                      {"cotangent", {&s.batch, &s.channels, &s.capacity}},
                                      {"values_bar", {&s.batch, &s.channels, &s.slots}}}));
    return s.Check();
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_POOL_SPEC_H_
