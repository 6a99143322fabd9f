// Submanifold convolution on the GPU: convolution at given sites, those of the input.

#include "xla_kernels/products/cuda_calls.cuh"
#include "xla_kernels/submanifold/spec.h"

namespace ilajax {
namespace {

using SubmanifoldForward = AtSitesForward<SubmanifoldFwd>;
using SubmanifoldBackward = AtSitesBackward<SubmanifoldBwd>;

}  // namespace
}  // namespace ilajax

ILAJAX_CUDA_TARGET(SubmanifoldFwd, SubmanifoldForward);
ILAJAX_CUDA_TARGET(SubmanifoldBwd, SubmanifoldBackward);
