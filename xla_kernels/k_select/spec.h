// k-selection of stored entries, and its gradient.

#ifndef ILAJAX_XLA_KERNELS_K_SELECT_SPEC_H_
#define ILAJAX_XLA_KERNELS_K_SELECT_SPEC_H_

#include <cstdint>
#include <string_view>

#include "xla_kernels/common/target.h"

namespace ilajax {

struct KSelectShape {
  int64_t batch = kUnread, channels = kUnread, slots = kUnread, capacity = kUnread;

  ILAJAX_HOST_DEVICE int64_t segments() const { return batch * channels; }
};

struct KSelectFwd {
  using Shape = KSelectShape;
  static constexpr const char* kName = "k_select";

  S32 keys;
  Values values;
  Ret<S32> kept_keys;
  Ret<Values> kept_values;
  Ret<U8> workspace;
  int64_t sites;
  std::string_view select;
  Span plan;

  static auto Bind() {
    return ffi::Ffi::Bind()
        .Arg<S32>()
        .Arg<Values>()
        .Ret<S32>()
        .Ret<Values>()
        .Ret<U8>()
        .Attr<int64_t>("sites")
        .Attr<std::string_view>("select")
        .Attr<Span>("plan");
  }
  static ffi::Error Read(Shapes shapes, KSelectShape& s) {
    ILAJAX_RETURN_IF_ERROR(ReadSizes(kName, shapes,
                                     {{"keys", {&s.batch, &s.channels, &s.slots}},
                                      {"values", {&s.batch, &s.channels, &s.slots}},
                                      {"kept_keys", {&s.batch, &s.channels, &s.capacity}},
                                      {"kept_values", {&s.batch, &s.channels, &s.capacity}}}));
    return CheckCapacity(kName, s.capacity);
  }
};

struct KSelectBwd {
  using Shape = KSelectShape;
  static constexpr const char* kName = "k_select";

  S32 keys;
  S32 kept_keys;
  Values cotangent;  // of kept_values
  Ret<Values> values_bar;
  int64_t sites;

  static auto Bind() {
    return ffi::Ffi::Bind().Arg<S32>().Arg<S32>().Arg<Values>().Ret<Values>().Attr<int64_t>(
        "sites");
  }
  static ffi::Error Read(Shapes shapes, KSelectShape& s) {
    return ReadSizes(kName, shapes,
                     {{"keys", {&s.batch, &s.channels, &s.slots}},
                      {"kept_keys", {&s.batch, &s.channels, &s.capacity}},
                      {"cotangent", {&s.batch, &s.channels, &s.capacity}},
                      {"values_bar", {&s.batch, &s.channels, &s.slots}}});
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_K_SELECT_SPEC_H_
