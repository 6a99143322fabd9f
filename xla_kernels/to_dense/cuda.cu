// to_dense on the GPU: scatter stored values into a zero-filled grid, and gather them back.
//
// Forward: a block fills one chunk of one segment in shared memory: zeros, then the chunk's keys,
// which lie together and are found by bisection; then the chunk is written out whole. So dense is
// written once, coalesced, with no memset before it, and values are read once. A block writes only
// inside its chunk whatever the keys are; of duplicate keys (a broken tensor) any one wins.
// Backward: values_bar[k] = dense_bar[keys[k]], 0 at padding; one thread an entry.

#include "xla_kernels/common/block.cuh"
#include "xla_kernels/common/cuda.h"
#include "xla_kernels/to_dense/spec.h"

namespace ilajax {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 4096;  // grid positions of one block: 16 KiB of shared memory in float32

template <typename T>
__global__ void __launch_bounds__(kThreads)
    FwdKernel(ToDenseShape s, int64_t chunks, const int32_t* keys, const T* values, T* dense) {
  __shared__ T chunk[kChunk];
  __shared__ int64_t range[2];
  for (int64_t task = blockIdx.x; task < s.segments() * chunks; task += gridDim.x) {
    const int64_t segment = task / chunks, begin = task % chunks * kChunk;
    const int64_t end = min(begin + kChunk, s.sites);
    const int32_t* key = keys + s.KeyOffset(segment);
    const T* value = values + segment * s.slots;
    T* out = dense + segment * s.sites;

    if (threadIdx.x < 2) {
      range[threadIdx.x] = LowerBound(key, s.slots, threadIdx.x == 0 ? begin : end);
    }
    for (int64_t i = threadIdx.x; i < end - begin; i += kThreads) chunk[i] = T(0.0f);
    __syncthreads();
    for (int64_t i = range[0] + threadIdx.x; i < range[1]; i += kThreads) {
      if (key[i] >= begin && key[i] < end) chunk[key[i] - begin] = value[i];
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < end - begin; i += kThreads) out[begin + i] = chunk[i];
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    BwdKernel(ToDenseShape s, const int32_t* keys, const T* dense_bar, T* values_bar) {
  const int64_t entries = s.segments() * s.slots;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < entries; i += stride) {
    const int64_t segment = i / s.slots;
    const int32_t key = keys[s.KeyOffset(segment) + i % s.slots];
    values_bar[i] = key >= 0 && key < s.sites ? dense_bar[segment * s.sites + key] : T(0.0f);
  }
}

struct ToDenseForward {
  using Call = ToDenseFwd;

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, ToDenseFwd call, const ToDenseShape& s) {
    const int64_t chunks = CeilDiv(s.sites, kChunk);
    return Launch<FwdKernel<T>>(GridFor(s.segments() * chunks), kThreads, 0, stream, s, chunks,
                                call.keys.typed_data(), Data<T>(call.values), Data<T>(*call.dense));
  }
};

struct ToDenseBackward {
  using Call = ToDenseBwd;

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, ToDenseBwd call, const ToDenseShape& s) {
    return Launch<BwdKernel<T>>(GridFor(CeilDiv(s.segments() * s.slots, kThreads)), kThreads, 0,
                                stream, s, call.keys.typed_data(), Data<T>(call.dense_bar),
                                Data<T>(*call.values_bar));
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CUDA_TARGET(ToDenseFwd, ToDenseForward);
ILAJAX_CUDA_TARGET(ToDenseBwd, ToDenseBackward);
