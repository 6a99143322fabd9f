// What the threads of a warp or a block do together: search, scan, sum. All orders are fixed.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ilajax {

constexpr unsigned kWarp = 0xffffffffu;

// The shared memory that the launch asked for.
__device__ inline uint4* DynamicShared() {
#ifdef __CUDACC__
  extern __shared__ uint4 shared[];
  return shared;
#else
  return static_cast<uint4*>(cuda_on_host::DynamicShared());
#endif
}

#ifdef __CUDACC__
// Reads and writes what other threads may write at the same time: several of them one value, or
// bits that the reader leaves aside.
template <typename T>
__device__ __forceinline__ T LoadRelaxed(const T* p) {
  return *static_cast<const volatile T*>(p);
}
template <typename T>
__device__ __forceinline__ void StoreRelaxed(T* p, T value) {
  *static_cast<volatile T*>(p) = value;
}
// Reads what other blocks of this launch have written.
__device__ __forceinline__ uint32_t LoadFresh(const uint32_t* p) { return LoadRelaxed(p); }
// Has a number, or a pointer to global memory, computed once and kept, where the compiler would
// compute it again in each round of a loop, to save registers.
__device__ __forceinline__ uint32_t Kept(uint32_t value) {
  asm("" : "+r"(value));
  return value;
}
template <typename T>
__device__ __forceinline__ T* Kept(T* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}
#else
using cuda_on_host::LoadFresh, cuda_on_host::LoadRelaxed, cuda_on_host::StoreRelaxed;
template <typename T>
T Kept(T value) {
  return value;
}
#endif

// The first of `count` ascending keys that is not below `bound`.
__device__ inline int64_t LowerBound(const int32_t* keys, int64_t count, int64_t bound) {
  int64_t first = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    if (keys[first + half] < bound) {
      first += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return first;
}

// The same for `bound` >= 0, found by a whole warp: 32
// probes a step, so that 65536 keys take four dependent loads. Negative keys are padding like those
// beyond the last, and count as such. Of keys in disorder some place in [0, count].
__device__ inline int WarpLowerBound(const int32_t* keys, int count, int64_t bound) {
  const int lane = threadIdx.x & 31;
  int first = 0;
  while (count > 0) {
    const int step = (count - 1) / 32 + 1;
    const int probe = min((lane + 1) * step, count) - 1;
    const int passed =
        __popc(__ballot_sync(kWarp, static_cast<uint32_t>(keys[first + probe]) < bound));
    const int skip = min(passed * step, count);
    count = passed == 32 ? 0 : max(min((passed + 1) * step, count) - 1 - skip, 0);
    first += skip;
  }
  return first;
}

// The sum of `value` over the lower lanes of the warp.
__device__ inline int WarpExclusiveScan(int value) {
  const int lane = threadIdx.x & 31;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kWarp, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - value;
}

// The sum of `value` over the lower threads of a block of kWarps warps, and over all of them.
// `scratch` is shared; it may be used again at once.
template <int kWarps>
__device__ inline int BlockExclusiveScan(int value, int (&scratch)[kWarps], int& total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int before = WarpExclusiveScan(value);
  if (lane == 31) scratch[warp] = before + value;
  __syncthreads();
  int base = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) base = total;
    total += scratch[w];
  }
  __syncthreads();
  return base + before;
}

// The sum of `value` over the warp, the same in every lane.
__device__ inline float WarpSum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
  return value;
}

}  // namespace ilajax
