// The first launch of both directions: the site map, the filters as dense vectors, zeroed counters.

#ifndef ILAJAX_XLA_KERNELS_CONV_CUDA_PREPARE_CUH_
#define ILAJAX_XLA_KERNELS_CONV_CUDA_PREPARE_CUH_

#include <cstdint>

#include "xla_kernels/common/axes.cuh"
#include "xla_kernels/common/block.cuh"
#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/site_map.cuh"

namespace ilajax {
namespace {

template <typename T>
struct Prepare {
  SiteMap map;
  SiteMapInput<T> input;
  int items;
  DenseFilters filters;
  const int32_t* kernel_keys;
  const float* weights;
  int weight_count;
  bool fill_filters;
  uint32_t* zeros;
  int64_t zero_count;

  ILAJAX_HOST_DEVICE int64_t map_blocks() const {
    return items * map.groups() * ((map.sites + kMapChunk - 1) / kMapChunk);
  }
  ILAJAX_HOST_DEVICE int64_t filter_blocks() const {
    return fill_filters ? filters.blocks() * filters.in_channels : 0;
  }
  static constexpr int64_t kZerosOfBlock = 16 * kMapThreads;
  ILAJAX_HOST_DEVICE int64_t zero_blocks() const {
    return (zero_count + kZerosOfBlock - 1) / kZerosOfBlock;
  }
};

template <typename T>
__global__ void __launch_bounds__(kMapThreads, 5) PrepareKernel(Prepare<T> p) {
  uint4* shared = DynamicShared();
  uint32_t task = blockIdx.x;
  if (task < p.map_blocks()) {
    const uint32_t chunks = static_cast<uint32_t>((p.map.sites + kMapChunk - 1) / kMapChunk);
    const int segment = static_cast<int>(task / chunks);
    BuildSiteMap(p.map, p.input, segment / p.map.groups(), segment % p.map.groups(), task % chunks,
                 reinterpret_cast<uint32_t*>(shared));
    return;
  }
  task -= static_cast<uint32_t>(p.map_blocks());
  if (task < p.filter_blocks()) {
    p.filters.Fill(static_cast<int>(task / p.filters.in_channels),
                   static_cast<int>(task % p.filters.in_channels), p.kernel_keys, p.weights,
                   p.weight_count);
    return;
  }
  task -= static_cast<uint32_t>(p.filter_blocks());
  const int64_t begin = int64_t{task} * p.kZerosOfBlock;
  const int64_t end = min(begin + p.kZerosOfBlock, p.zero_count);
  for (int64_t i = begin + threadIdx.x; i < end; i += kMapThreads) p.zeros[i] = 0;
}

template <typename T>
ffi::Error LaunchPrepare(cudaStream_t stream, const Prepare<T>& p) {
  const int64_t blocks = p.map_blocks() + p.filter_blocks() + p.zero_blocks();
  return LaunchEach<PrepareKernel<T>>(blocks, kMapThreads, SiteMap::SharedBytes(), stream, p);
}

}  // namespace
}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_CUDA_PREPARE_CUH_
