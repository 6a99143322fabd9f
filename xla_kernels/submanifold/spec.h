// Submanifold convolution, responses at the input's own sites, and its gradient.

#ifndef ILAJAX_XLA_KERNELS_SUBMANIFOLD_SPEC_H_
#define ILAJAX_XLA_KERNELS_SUBMANIFOLD_SPEC_H_

#include <cstdint>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/target.h"

namespace ilajax {

// Keys are [B, 1, K], one support for all channels of input and output.
inline ffi::Error CheckSubmanifold(const char* op, ConvShape& s) {
  s.capacity = s.slots;
  if (s.key_channels != 1) return InvalidArgument(op, ": keys must be those of all channels");
  for (int a = 0; a < s.w.rank; ++a) {
    if (s.w.strides[a] != 1 || s.w.input_shape[a] != s.w.output_shape[a]) {
      return InvalidArgument(op, ": input and output must have one grid, and stride 1");
    }
  }
  return s.Check(op);
}

struct SubmanifoldFwd {
  using Shape = ConvShape;
  static constexpr const char* kName = "submanifold";

  S32 keys;
  Values values;
  S32 kernel_keys;  // (oc * Cin + ic) * taps + tap; anything else is padding
  F32 weights;
  F32 bias;
  Ret<Values> features;
  Ret<S32> responses;  // that are not zero
  Ret<U8> workspace;
  Span window, plan;

  static auto Bind() {
    return ffi::Ffi::Bind()
        .Arg<S32>()
        .Arg<Values>()
        .Arg<S32>()
        .Arg<F32>()
        .Arg<F32>()
        .Ret<Values>()
        .Ret<S32>()
        .Ret<U8>()
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
                                      {"features", {&s.batch, &s.out_channels, &s.slots}},
                                      {"responses", {&s.batch, &s.out_channels}}}));
    return CheckSubmanifold(kName, s);
  }
};

struct SubmanifoldBwd {
  using Shape = ConvShape;
  static constexpr const char* kName = "submanifold";

  S32 keys;
  Values values;
  S32 kernel_keys;
  F32 weights;
  Values cotangent;  // of features
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
                                      {"cotangent", {&s.batch, &s.out_channels, &s.slots}},
                                      {"values_bar", {&s.batch, &s.in_channels, &s.slots}},
                                      {"weights_bar", {&s.groups, &s.weights}},
                                      {"bias_bar", {&s.groups, &s.out_channels}}}));
    return CheckSubmanifold(kName, s);
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_SUBMANIFOLD_SPEC_H_
