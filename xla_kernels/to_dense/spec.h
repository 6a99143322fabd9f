// Stored values in a zero-filled grid, and the gradient, which gathers them back.

#ifndef ILAJAX_XLA_KERNELS_TO_DENSE_SPEC_H_
#define ILAJAX_XLA_KERNELS_TO_DENSE_SPEC_H_

#include <cstdint>

#include "xla_kernels/common/target.h"

namespace ilajax {

struct ToDenseShape {
  int64_t batch = kUnread, channels = kUnread, slots = kUnread, sites = kUnread;
  int64_t key_channels = kUnread;  // 1: one support for all channels

  ILAJAX_HOST_DEVICE int64_t segments() const { return batch * channels; }

  // Where the keys of segment b * channels + c begin.
  ILAJAX_HOST_DEVICE int64_t KeyOffset(int64_t segment) const {
    return (key_channels == 1 ? segment / channels : segment) * slots;
  }
};

struct ToDenseFwd {
  using Shape = ToDenseShape;
  static constexpr const char* kName = "to_dense";

  S32 keys;
  Values values;
  Ret<Values> dense;

  static auto Bind() { return ffi::Ffi::Bind().Arg<S32>().Arg<Values>().Ret<Values>(); }
  static ffi::Error Read(Shapes shapes, ToDenseShape& s) {
    ILAJAX_RETURN_IF_ERROR(ReadSizes(kName, shapes,
                                     {{"keys", {&s.batch, &s.key_channels, &s.slots}},
                                      {"values", {&s.batch, &s.channels, &s.slots}},
                                      {"dense", {&s.batch, &s.channels, &s.sites}}}));
    return CheckKeyChannels(kName, s.key_channels, s.channels);
  }
};

struct ToDenseBwd {
  using Shape = ToDenseShape;
  static constexpr const char* kName = "to_dense";

  S32 keys;
  Values dense_bar;
  Ret<Values> values_bar;

  static auto Bind() { return ffi::Ffi::Bind().Arg<S32>().Arg<Values>().Ret<Values>(); }
  static ffi::Error Read(Shapes shapes, ToDenseShape& s) {
    ILAJAX_RETURN_IF_ERROR(ReadSizes(kName, shapes,
                                     {{"keys", {&s.batch, &s.key_channels, &s.slots}},
                                      {"dense_bar", {&s.batch, &s.channels, &s.sites}},
                                      {"values_bar", {&s.batch, &s.channels, &s.slots}}}));
    return CheckKeyChannels(kName, s.key_channels, s.channels);
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_TO_DENSE_SPEC_H_
