// Kernels with one bug each, and one without: shows that check_sass.py sees what it is for. They are
// compiled, and never run.

#include "xla_kernels/common/block.cuh"

namespace ilajax {

// No bug: what a lane decides alone is over before the warp or the block meets again.
__global__ void __launch_bounds__(256) Right(const float* in, float* out) {
  __shared__ float shared[8];
  float value = in[threadIdx.x];
  if (value < 0.0f) value = in[threadIdx.x + 256] * value + 1.0f;
  const float sum = WarpSum(value);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = sum;
  __syncthreads();
  out[threadIdx.x] = shared[7 - (threadIdx.x >> 5)];
}

__global__ void ShuffleInBothBranches(const float* in, float* out) {
  const int lane = threadIdx.x & 31;
  float sum;
  if (lane & 1) {
    sum = WarpSum(in[threadIdx.x]);
  } else {
    sum = WarpSum(in[threadIdx.x + 1]) * 2.0f;
  }
  out[threadIdx.x] = sum;
}

__global__ void ShuffleBehindContinue(const int* reached, float* out, int n) {
  for (int i = threadIdx.x; i - static_cast<int>(threadIdx.x) < n; i += 256) {
    if (reached[i] == 0) continue;
    out[i] = WarpSum(out[i]);
  }
}

// The lanes go round a different number of times.
__global__ void BallotInLanesLoop(const int* ends, unsigned* out) {
  unsigned all = 0;
  for (int i = 0; i < ends[threadIdx.x]; ++i) all += __ballot_sync(kWarp, ends[i] > i);
  out[threadIdx.x] = all;
}

__global__ void LocalArray(const int* in, int* out) {
  int array[64];
  for (int i = 0; i < 64; ++i) array[in[i] & 63] = in[i + threadIdx.x];
  out[threadIdx.x] = array[in[threadIdx.x] & 63];
}

__global__ void TooMuchStaticShared(int* out) {
  __shared__ int shared[kWarp % 2 * 600];
  shared[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[out[0]];
}

// One copy of a sum that is made twice, as if the compiler had not contracted it.
__global__ void ProductRounded(const float* x, const float* w, float* out, int n) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum = __fadd_rn(sum, __fmul_rn(x[i], w[i + threadIdx.x]));
  float other = 0.0f;
  for (int i = 0; i < n; ++i) other += x[i] * w[i + threadIdx.x];
  out[threadIdx.x] = sum == other ? sum : 0.0f;
}

}  // namespace ilajax
