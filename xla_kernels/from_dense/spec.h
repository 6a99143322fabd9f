// The non-zeros of a dense array, at most K for each sample and channel. Its gradient is to_dense.

#ifndef ILAJAX_XLA_KERNELS_FROM_DENSE_SPEC_H_
#define ILAJAX_XLA_KERNELS_FROM_DENSE_SPEC_H_

#include <cstdint>
#include <string_view>

#include "xla_kernels/common/target.h"

namespace ilajax {

struct FromDenseShape {
  int64_t batch = kUnread, sites = kUnread, channels = kUnread, capacity = kUnread;
};

struct FromDenseFwd {
  using Shape = FromDenseShape;
  static constexpr const char* kName = "from_dense";

  Values x;
  Ret<S32> keys;
  Ret<Values> values;
  Ret<U8> workspace;
  std::string_view select;
  Span plan;

  static auto Bind() {
    return ffi::Ffi::Bind()
        .Arg<Values>()
        .Ret<S32>()
        .Ret<Values>()
        .Ret<U8>()
        .Attr<std::string_view>("select")
        .Attr<Span>("plan");
  }
  static ffi::Error Read(Shapes shapes, FromDenseShape& s) {
    ILAJAX_RETURN_IF_ERROR(ReadSizes(kName, shapes,
                                     {{"x", {&s.batch, &s.sites, &s.channels}},
                                      {"keys", {&s.batch, &s.channels, &s.capacity}},
                                      {"values", {&s.batch, &s.channels, &s.capacity}}}));
    return CheckCapacity(kName, s.capacity);
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_FROM_DENSE_SPEC_H_
