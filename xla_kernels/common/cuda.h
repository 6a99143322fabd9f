// What every CUDA handler uses: one way to launch a kernel.
//
// Kernels are launched through Launch() and never with <<<>>>, so that a .cu file is plain C++ to a
// host compiler, and so that no launch goes unchecked.

#ifndef ILAJAX_XLA_KERNELS_COMMON_CUDA_H_
#define ILAJAX_XLA_KERNELS_COMMON_CUDA_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "xla_kernels/common/ffi.h"

namespace ilajax {

using Stream = ffi::PlatformStream<cudaStream_t>;

// `what` failed with `status`.
inline ffi::Error CudaError(const char* what, cudaError_t status) {
  std::ostringstream message;
  message << what << ": " << cudaGetErrorName(status) << ": " << cudaGetErrorString(status);
  return ffi::Error::Internal(message.str());
}

// Launches `kernel` on `stream`. Nothing waits and nothing is allocated, so the launch can be
// captured into a command buffer. Arguments are converted to the kernel's parameter types. A grid
// without blocks is no work. More than the 48 KiB of shared memory that every kernel gets is opted
// into.
template <typename... Params, typename... Args>
ffi::Error Launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                  cudaStream_t stream, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "a kernel takes exactly its parameters");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return ffi::Error::Success();
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes));
  }
  if (status == cudaSuccess) {
    std::tuple<Params...> values(static_cast<Params>(std::forward<Args>(args))...);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    status = std::apply(
        [&](Params&... value) {
          void* pointers[] = {static_cast<void*>(&value)..., nullptr};
          return cudaLaunchKernelExC(&config, function, pointers);
        },
        values);
  }
  if (status == cudaSuccess) return ffi::Error::Success();
  (void)cudaGetLastError();  // so that the next call does not report it again
  return CudaError("CUDA kernel launch", status);
}

// The grid for `tasks` in a loop that strides over blocks: a block each, within CUDA's limit.
inline dim3 GridFor(int64_t tasks) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  return dim3(static_cast<unsigned>(tasks < kMaxBlocks ? tasks : kMaxBlocks));
}

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_CUDA_H_
