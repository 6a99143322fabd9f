// What both directions have in common: blocks of output channels, what they cannot do, and the
// first launch, which makes the site map and the filters as dense vectors; see cuda.cu.

#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>

#include "xla_kernels/common/axes.cuh"
#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/site_map.cuh"
#include "xla_kernels/conv/spec.h"

namespace ilajax {
namespace {

constexpr int kBlock = 8;  // output channels of a block

constexpr int64_t kMost = 0x7fffffff;
constexpr int64_t kFullGpu = 528;  // blocks: 4 for each of 132 multiprocessors

// --- What a kernel cannot do here, in words; "" if it can. Its handler returns an error then.

std::string CountLimit(const ConvShape& s) {
  const int64_t slots = std::max(s.slots, s.capacity);
  if (slots * kMapGroup > kMost) {
    return std::to_string(slots) + " slots of a channel are 2^26 or more";
  }
  if (s.batch * std::max(s.in_channels, s.out_channels) > kMost) {
    return "a batch of " + std::to_string(s.batch) + " has 2^31 channels or more";
  }
  if (s.w.taps > 1 << 24) {
    return "a window of " + std::to_string(s.w.taps) + " taps has more than 2^24";
  }
  return "";
}

std::string SharedLimit(int64_t dynamic, const Tuning& tuning) {
  const int64_t needed = dynamic + kStaticShared;
  if (needed <= tuning.shared_memory) return "";
  return "needs " + std::to_string(CeilDiv(needed, 1024)) +
         " KB of shared memory, the device has " + std::to_string(tuning.shared_memory / 1024) +
         " KB";
}

std::string GridLimit(int64_t blocks) {
  if (blocks <= kMost) return "";
  return "needs " + std::to_string(blocks) + " blocks, a launch has at most 2^31 - 1";
}

std::string FirstOf(std::initializer_list<std::string> limits) {
  for (const std::string& limit : limits) {
    if (!limit.empty()) return limit;
  }
  return "";
}

ffi::Error CheckCounts(const ConvShape& s) {
  const std::string limit = CountLimit(s);
  return limit.empty() ? ffi::Error::Success() : InvalidArgument("conv: ", limit);
}

ffi::Error CheckShared(const Window& w, int64_t bytes) {
  const int64_t most = MaxDynamicShared();
  if (bytes <= most) return ffi::Error::Success();
  return InvalidArgument("conv: a window of ", w.taps, " taps needs ", bytes,
                         " bytes of shared memory, the device has ", most);
}

// A block's list of live taps: for 3 axes, or for all that there may be.
int64_t TapBytes(const Window& w, int64_t groups) {
  return w.rank <= 3 ? TapList<3>::SharedBytes(w.taps, groups)
                     : TapList<kMaxRank>::SharedBytes(w.taps, groups);
}

DenseFilters FiltersOf(const ConvShape& s) {
  return {kBlock, static_cast<int>(s.in_channels), static_cast<int>(s.out_channels),
          static_cast<int>(s.w.taps)};
}

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
