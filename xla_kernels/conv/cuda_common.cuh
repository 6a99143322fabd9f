// What both directions have in common: blocks of output channels, and what they cannot do.

#ifndef ILAJAX_XLA_KERNELS_CONV_CUDA_COMMON_CUH_
#define ILAJAX_XLA_KERNELS_CONV_CUDA_COMMON_CUH_

#include <algorithm>
#include <cstdint>
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
constexpr int64_t kFullGpu =
    528;  // blocks that fill a large one: 4 for each of 132 multiprocessors

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

}  // namespace
}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_CUDA_COMMON_CUH_
