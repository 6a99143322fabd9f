// Convolution at given sites on the GPU.

#include "xla_kernels/conv_at/spec.h"
#include "xla_kernels/products/cuda_calls.cuh"

namespace ilajax {
namespace {

using ConvAtForward = AtSitesForward<ConvAtFwd>;
using ConvAtBackward = AtSitesBackward<ConvAtBwd>;

}  // namespace
}  // namespace ilajax

ILAJAX_CUDA_TARGET(ConvAtFwd, ConvAtForward);
ILAJAX_CUDA_TARGET(ConvAtBwd, ConvAtBackward);
