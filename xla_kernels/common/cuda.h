// What every CUDA handler uses: one way to launch a kernel.
//
// Kernels are launched through Launch<kernel>() and never with <<<>>>, so that a .cu file is plain
// C++ to a host compiler, and so that no launch goes unchecked.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <tuple>
#include <utility>

#include "xla_kernels/common/ffi.h"

namespace ilajax {

// Shared memory that is static in any kernel which asks for dynamic shared memory, at most.
constexpr int64_t kStaticShared = 2048;
// What a block has, static and dynamic, without opting in; and may have on every device: 8.6, 8.9
// and 12.0 have the least.
constexpr int64_t kSharedByDefault = 48 * 1024;
constexpr int64_t kSharedAnywhere = 99 * 1024;

// The dynamic shared memory that a launch on the current device may ask for.
inline int64_t MaxDynamicShared() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    (void)cudaGetLastError();  // the launch will report it
    return kSharedByDefault - kStaticShared;
  }
  return bytes - kStaticShared;
}

// Lets the blocks of `kernel` on the current device have all the shared memory that there is, once.
// The bound is the same whoever sets it: of two threads that launch with different sizes, none can
// lower it under the other.
template <auto kernel>
cudaError_t OptInToShared() {
  static std::atomic<uint64_t> done = 0;  // a bit for each device
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done.load(std::memory_order_acquire) & bit) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(MaxDynamicShared()));
  if (status == cudaSuccess) done.fetch_or(bit, std::memory_order_release);
  return status;
}

// The parameters of a kernel, as a tuple.
template <typename Kernel>
struct ParametersOf;
template <typename... Params>
struct ParametersOf<void (*)(Params...)> {
  using Tuple = std::tuple<Params...>;
};

// Launches `kernel` on `stream`. Nothing waits and nothing is allocated, so the launch can be
// captured into a command buffer. Arguments are converted to the kernel's parameter types. A grid
// without blocks is no work. More than the 48 KiB of shared memory that every kernel gets is opted
// into.
template <auto kernel, typename... Args>
ffi::Error Launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  using Parameters = typename ParametersOf<decltype(kernel)>::Tuple;
  static_assert(std::tuple_size_v<Parameters> == sizeof...(Args),
                "a kernel takes exactly its parameters");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return ffi::Error::Success();
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kSharedByDefault - kStaticShared) status = OptInToShared<kernel>();
  if (status == cudaSuccess) {
    Parameters values(std::forward<Args>(args)...);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    status = std::apply(
        [&](auto&... value) {
          void* pointers[] = {static_cast<void*>(&value)..., nullptr};
          return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
        },
        values);
  }
  if (status == cudaSuccess) return ffi::Error::Success();
  (void)cudaGetLastError();  // so that the next call does not report it again
  std::ostringstream message;
  message << "CUDA kernel launch: " << cudaGetErrorName(status) << ": "
          << cudaGetErrorString(status);
  return ffi::Error::Internal(message.str());
}

constexpr int64_t kMaxBlocks = 0x7fffffff;  // CUDA's limit

// As Launch, of a kernel that has a block for each task.
template <auto kernel, typename... Args>
ffi::Error LaunchEach(int64_t blocks, dim3 block, size_t shared_bytes, cudaStream_t stream,
                      Args&&... args) {
  if (blocks > kMaxBlocks) return InvalidArgument("a launch of ", blocks, " blocks, over 2^31 - 1");
  return Launch<kernel>(dim3(static_cast<unsigned>(blocks)), block, shared_bytes, stream,
                        std::forward<Args>(args)...);
}

// The grid for `tasks` in a loop that strides over blocks: a block each, within CUDA's limit. Tests
// define less, so that the loop goes round.
#ifndef ILAJAX_STRIDING_BLOCKS
#define ILAJAX_STRIDING_BLOCKS kMaxBlocks
#endif
inline dim3 GridFor(int64_t tasks) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(tasks, ILAJAX_STRIDING_BLOCKS)));
}

}  // namespace ilajax
