// Direct sparse convolution with k-selection, and its gradient.

#ifndef ILAJAX_XLA_KERNELS_CONV_SPEC_H_
#define ILAJAX_XLA_KERNELS_CONV_SPEC_H_

#include <cstdint>
#include <string_view>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/target.h"

namespace ilajax {

struct ConvFwd {
  using Shape = ConvShape;
  static constexpr const char* kName = "conv";

  S32 keys;
  Values values;
  S32 kernel_keys;  // (oc * Cin + ic) * taps + tap; anything else is padding
  F32 weights;
  F32 bias;
  Ret<S32> out_keys;
  Ret<Values> out_values;
  Ret<S32> responses;  // candidates before the selection
  Ret<U8> workspace;
  std::string_view select;
  Span window, plan;

  static auto Bind() {
    return ffi::Ffi::Bind()
        .Arg<S32>()
        .Arg<Values>()
        .Arg<S32>()
        .Arg<F32>()
        .Arg<F32>()
        .Ret<S32>()
        .Ret<Values>()
        .Ret<S32>()
        .Ret<U8>()
        .Attr<std::string_view>("select")
        .Attr<Span>("window")
        .Attr<Span>("plan");
  }
  static ffi::Error Read(Shapes shapes, ConvShape& s) {
    ILAJAX_RETURN_IF_ERROR(ReadSizes(kName, shapes,
                                     {{"keys", {&s.batch, &s.key_channels, &s.slots}},
                                      {"values", {&s.batch, &s.in_channels, &s.slots}},
                                      {"kernel_keys", {&s.weights}},
                                      {"weights", {&s.weights}},
                                      {"bias", {&s.out_channels}},
                                      {"out_keys", {&s.batch, &s.out_channels, &s.capacity}},
                                      {"out_values", {&s.batch, &s.out_channels, &s.capacity}},
                                      {"responses", {&s.batch, &s.out_channels}}}));
    return s.Check(kName);
  }
};

struct ConvBwd {
  using Shape = ConvShape;
  static constexpr const char* kName = "conv";

  S32 keys;
  Values values;
  S32 kernel_keys;
  F32 weights;
  S32 out_keys;
  Values cotangent;  // of out_values
  Ret<Values> values_bar;
  Ret<F32> weights_bar;
  Ret<F32> bias_bar;
  Ret<U8> workspace;
  Span window, plan;

  static auto Bind() {
    return ffi::Ffi::Bind()
        .Arg<S32>()
        .Arg<Values>()
        .Arg<S32>()
        .Arg<F32>()
        .Arg<S32>()
        .Arg<Values>()
        .Ret<Values>()
        .Ret<F32>()
        .Ret<F32>()
        .Ret<U8>()
        .Attr<Span>("window")
        .Attr<Span>("plan");
  }
  static ffi::Error Read(Shapes shapes, ConvShape& s) {
    s.groups = kUnread;
    ILAJAX_RETURN_IF_ERROR(ReadSizes(kName, shapes,
                                     {{"keys", {&s.batch, &s.key_channels, &s.slots}},
                                      {"values", {&s.batch, &s.in_channels, &s.slots}},
                                      {"kernel_keys", {&s.weights}},
                                      {"weights", {&s.weights}},
                                      {"out_keys", {&s.batch, &s.out_channels, &s.capacity}},
                                      {"cotangent", {&s.batch, &s.out_channels, &s.capacity}},
                                      {"values_bar", {&s.batch, &s.in_channels, &s.slots}},
                                      {"weights_bar", {&s.groups, &s.weights}},
                                      {"bias_bar", {&s.groups, &s.out_channels}}}));
    return s.Check(kName);
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_SPEC_H_
