// Stands in for CUDA's <cuda_runtime.h>, so that the .cu files compile with a host compiler and run
// on the CPU, a block at a time, its threads as fibers. See README.md. Only what the kernels use is
// here: a missing name is a compile error, to be added next to its like.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_CUDA_RUNTIME_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_CUDA_RUNTIME_H_

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

// ---- Qualifiers. One block runs at a time, so what its threads share is static.

#define __global__
#define __device__
#define __host__
#define __constant__ static
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static  // its ends are watched
#else
#define __shared__ static thread_local  // apart from all else, so that a block finds rubbish there
#endif
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// ---- Where a thread is.

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- Barriers. Each knows the line it was called from: all threads that meet must come from one
// line.

namespace cuda_on_host {

enum class Barrier { kBlock, kWarp };

// Waits for all threads of the block, or for the lanes of `mask`.
void Wait(Barrier barrier, uint32_t mask, const char* file, int line);

// The same for the lanes of a warp, with an order for memory.
void SyncWarp(uint32_t mask, const char* file, int line);

// Hands `value` to the lanes of `mask`, and returns what all of them handed over, [32].
const uint64_t* Exchange(uint32_t mask, uint64_t value, const char* file, int line);

inline int Lane() {
  const unsigned rank = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  return static_cast<int>(rank % warpSize);
}

template <typename T>
uint64_t Pack(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T Unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of lane `source` within a group of `width` lanes, own where that is not in the mask's
// warp.
template <typename T>
T Shuffle(uint32_t mask, T value, int source, bool inside, const char* file, int line) {
  const uint64_t* values = Exchange(mask, Pack(value), file, line);
  return inside && (mask >> source & 1) ? Unpack<T>(values[source]) : value;
}

// Shared memory whose size the launch says.
void* DynamicShared();

// What an atomic has touched, for ThreadSanitizer; a fence.
void AfterAtomic(const void* address);
void Fence();

// A thread that may wait for another block lets that go on.
void LetOthersRun();

// What block.cuh has for these.
template <typename T>
T LoadRelaxed(const T* address) {
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}
template <typename T>
void StoreRelaxed(T* address, T value) {
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T LoadFresh(const T* address) {
  LetOthersRun();
  const T value = LoadRelaxed(address);
  AfterAtomic(address);
  return value;
}

}  // namespace cuda_on_host

#define ILAJAX_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(ILAJAX_HERE) {
  cuda_on_host::Wait(cuda_on_host::Barrier::kBlock, 0, file, line);
}
inline void __syncwarp(uint32_t mask = ~0u, ILAJAX_HERE) {
  cuda_on_host::SyncWarp(mask, file, line);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, ILAJAX_HERE) {
  const uint64_t* values = cuda_on_host::Exchange(mask, predicate != 0, file, line);
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && values[lane] != 0) ballot |= 1u << lane;
  }
  return ballot;
}
inline int __any_sync(uint32_t mask, int predicate, ILAJAX_HERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, ILAJAX_HERE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value, ILAJAX_HERE) {
  const uint64_t* values = cuda_on_host::Exchange(mask, value, file, line);
  uint32_t sum = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) sum += static_cast<uint32_t>(values[lane]);
  }
  return sum;
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, ILAJAX_HERE) {
  const int first = cuda_on_host::Lane() & ~(width - 1);
  return cuda_on_host::Shuffle(mask, value, first + (source & (width - 1)), true, file, line);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, ILAJAX_HERE) {
  const int lane = cuda_on_host::Lane(), source = lane - static_cast<int>(delta);
  return cuda_on_host::Shuffle(mask, value, source & 31, source >= (lane & ~(width - 1)), file,
                               line);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, ILAJAX_HERE) {
  const int lane = cuda_on_host::Lane(), source = lane + static_cast<int>(delta);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return cuda_on_host::Shuffle(mask, value, source & 31, inside, file, line);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, ILAJAX_HERE) {
  const int lane = cuda_on_host::Lane(), source = lane ^ lanes;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return cuda_on_host::Shuffle(mask, value, source & 31, inside, file, line);
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value, ILAJAX_HERE) {
  const uint64_t own = cuda_on_host::Pack(value);
  const uint64_t* values = cuda_on_host::Exchange(mask, own, file, line);
  uint32_t matches = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && values[lane] == own) matches |= 1u << lane;
  }
  return matches;
}
template <typename T, typename F>
T cuda_on_host_reduce(uint32_t mask, T value, F&& f, const char* file, int line) {
  const uint64_t* values = cuda_on_host::Exchange(mask, cuda_on_host::Pack(value), file, line);
  std::optional<T> total;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T other = cuda_on_host::Unpack<T>(values[lane]);
    total = total ? f(*total, other) : other;
  }
  return *total;
}
template <typename T>
T __reduce_add_sync(uint32_t mask, T value, ILAJAX_HERE) {
  return cuda_on_host_reduce(mask, value, [](T a, T b) { return a + b; }, file, line);
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value, ILAJAX_HERE) {
  return cuda_on_host_reduce(mask, value, [](T a, T b) { return a > b ? a : b; }, file, line);
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value, ILAJAX_HERE) {
  return cuda_on_host_reduce(mask, value, [](T a, T b) { return a < b ? a : b; }, file, line);
}

inline int __syncthreads_count(int predicate, ILAJAX_HERE) {
  __shared__ int count;
  __syncthreads(file, line);
  __atomic_store_n(&count, 0, __ATOMIC_RELAXED);
  __syncthreads(file, line);
  __atomic_fetch_add(&count, predicate != 0, __ATOMIC_RELAXED);
  __syncthreads(file, line);
  const int result = count;
  __syncthreads(file, line);
  return result;
}
inline int __syncthreads_or(int predicate, ILAJAX_HERE) {
  return __syncthreads_count(predicate, file, line) != 0;
}
inline int __syncthreads_and(int predicate, ILAJAX_HERE) {
  return __syncthreads_count(!predicate, file, line) == 0;
}

// ---- Atomics: fibers switch at barriers only. Sums of floats depend on the order of threads, so
// there are none of them.

template <typename T, typename F>
T cuda_on_host_atomic(T* address, F&& f) {
  static_assert(std::is_integral_v<T>, "atomics on floating-point numbers are not repeatable");
  const T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, f(old), __ATOMIC_RELAXED);
  cuda_on_host::AfterAtomic(address);
  return old;
}
#define ILAJAX_ATOMIC(name, expression)                                                     \
  template <typename T>                                                                     \
  T name(T* address, std::type_identity_t<T> value) {                                       \
    return cuda_on_host_atomic(address, [&](T old) { return static_cast<T>(expression); }); \
  }
ILAJAX_ATOMIC(atomicAdd, old + value)
ILAJAX_ATOMIC(atomicSub, old - value)
ILAJAX_ATOMIC(atomicMin, old < value ? old : value)
ILAJAX_ATOMIC(atomicMax, old > value ? old : value)
ILAJAX_ATOMIC(atomicAnd, old& value)
ILAJAX_ATOMIC(atomicOr, old | value)
ILAJAX_ATOMIC(atomicXor, old ^ value)
ILAJAX_ATOMIC(atomicExch, (static_cast<void>(old), value))
#undef ILAJAX_ATOMIC
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return cuda_on_host_atomic(address, [&](T old) { return old == compare ? value : old; });
}
inline void __threadfence() { cuda_on_host::Fence(); }
inline void __threadfence_block() { cuda_on_host::Fence(); }

// ---- Arithmetic.

#define ILAJAX_MIN_MAX(T)                          \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
ILAJAX_MIN_MAX(int)
ILAJAX_MIN_MAX(unsigned)
ILAJAX_MIN_MAX(long)
ILAJAX_MIN_MAX(unsigned long)
ILAJAX_MIN_MAX(long long)
ILAJAX_MIN_MAX(unsigned long long)
ILAJAX_MIN_MAX(float)
#undef ILAJAX_MIN_MAX

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

#define ILAJAX_VECTORS(T, name)                              \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
ILAJAX_VECTORS(float, float)
ILAJAX_VECTORS(int, int)
ILAJAX_VECTORS(unsigned, uint)
#undef ILAJAX_VECTORS

// ---- Launches.

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
// Recorded, and checked at every launch.
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int bytes);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t status);
const char* cudaGetErrorString(cudaError_t status);  // what went wrong on this thread last

namespace cuda_on_host {

namespace machine {

// A parameter of a kernel, for its machine code.
struct Parameter {
  const void* data;
  size_t size, alignment;

  template <typename T>
  explicit Parameter(const T& value) : data(&value), size(sizeof(T)), alignment(alignof(T)) {}
};

}  // namespace machine

// The blocks of a kernel that strides, at most; of machine code as many as on a GPU.
int64_t StridingBlocks();

inline const cudaStream_t kStream = reinterpret_cast<cudaStream_t>(uintptr_t{0x57});

// Runs `body` for every thread of every block. `kernel` is recorded as executed; `launch` has its
// name in it.
cudaError_t Run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& body, const char* launch,
                const std::vector<machine::Parameter>& parameters = {});

}  // namespace cuda_on_host

// CUDA passes a kernel's arguments without their types. The host needs those, and takes them from
// what Launch() in xla_kernels/common/cuda.h calls them.
#define cudaLaunchKernelExC(config, function, pointers) \
  cuda_on_host::Run(*(config), function,                \
                    [&] {                               \
                      (void)pointers;                   \
                      kernel(value...);                 \
                    },                                  \
                    __PRETTY_FUNCTION__, {cuda_on_host::machine::Parameter(value)...})

// XLA has no stream on the CPU, so the context of every handler decodes to this one.
template <>
struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return cuda_on_host::kStream;
  }
};

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_CUDA_RUNTIME_H_
