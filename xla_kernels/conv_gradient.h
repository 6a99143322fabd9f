// The gradient of a convolution with given outputs, defined in conv.cc: those that conv has kept,
// or the input's own sites, which is the gradient of submanifold.cc.

#ifndef ILAJAX_XLA_KERNELS_CONV_GRADIENT_H_
#define ILAJAX_XLA_KERNELS_CONV_GRADIENT_H_

#include <cstdint>
#include <string_view>

#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/window.h"
#include "xla_kernels/conv.h"

namespace ilajax {

struct GradientPlan {
  int64_t block, line_sites, slab_rows, dense_rows, dense_percent, room, parts, workers;
};

struct GradientBuffers {
  ffi::Buffer<ffi::S32> keys;
  ffi::AnyBuffer values;
  ffi::Buffer<ffi::S32> kernel_keys;
  ffi::Buffer<ffi::F32> weights;
  ffi::Buffer<ffi::S32> out_keys;
  ffi::AnyBuffer cotangent;
  ffi::Result<ffi::AnyBuffer> values_bar;
  ffi::Result<ffi::Buffer<ffi::F32>> weights_bar;
  ffi::Result<ffi::Buffer<ffi::F32>> bias_bar;
  ffi::Result<ffi::Buffer<ffi::U8>> workspace;
};

// `s` has been read from the buffers. With `out_shared` a sample has one list of output keys.
ffi::Error ConvGradient(std::string_view op, ffi::ThreadPool& pool, const ConvShape& s,
                        Window window, bool out_shared, const GradientPlan& plan,
                        GradientBuffers buffers);

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_GRADIENT_H_
