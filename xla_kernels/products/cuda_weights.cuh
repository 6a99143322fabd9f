// The kernels of the gradients of weights and biases, where supports are given; see cuda_calls.cuh.

#pragma once

#include "xla_kernels/products/cuda_kernels.cuh"

namespace ilajax {
namespace {

constexpr int kPairs = 8;          // a lane sums kPairs x kPairs channels,
constexpr int kPairThreads = 128;  // in a block that goes over so many sites at a time
constexpr int kPairWarps = kPairThreads / 32;

// The tiles of kPairs x kPairs channels that weights have gradients of, and how many of them a block
// takes at once, a power of 2: a warp each, or several that share the sites.
struct WeightTiles {
  int64_t across, all;
  int at_once;

  WeightTiles(int64_t in_channels, int64_t block)
      : across(CeilDiv(in_channels, kPairs)), all(across * CeilDiv(block, kPairs)), at_once(1) {
    while (at_once < kPairWarps && at_once < all) at_once *= 2;
  }
  __host__ __device__ int64_t blocks() const { return (all + at_once - 1) / at_once; }
};

// A block of the weights' gradients: sums[group][part][tap][ic][block], over `parts` runs of sites.
template <typename T>
struct WeightSums {
  WeightTiles tiles;
  bool own;
  int64_t taps, sites, groups, items, parts, in_slots, slots;  // items of a group
  int64_t in_channels, out_channels, first, block;
  const int32_t *in_keys, *keys;
  const T* values;
  const T* cotangent;
  float* sums;
};

// What a warp sums: kPairs input channels from `ic`, and as many output channels from `oc`, of which
// there are fewer at the end.
struct WeightTile {
  int64_t ic, oc;
  int ics, ocs;

  template <typename T>
  __device__ __forceinline__ WeightTile(const WeightSums<T>& a, int64_t number)
      : ic(number % a.tiles.across * kPairs), oc(a.first + number / a.tiles.across * kPairs) {
    const bool any = number < a.tiles.all;
    ics = any ? static_cast<int>(min(a.in_channels - ic, int64_t{kPairs})) : 0;
    const int64_t end = min(a.first + a.block, a.out_channels);
    ocs = any ? static_cast<int>(min(end - oc, int64_t{kPairs})) : 0;
  }
};

// w_bar += x g, of one site. kCareful: a zero factor adds nothing, not even against inf or NaN.
template <bool kCareful, typename T>
__device__ __forceinline__ void AddPair(const T* value, int64_t in_slots, const T* cotangent,
                                        int64_t slots, const WeightTile& tile,
                                        float (&w_bar)[kPairs * kPairs]) {
  float x[kPairs], g[kPairs];
#pragma unroll
  for (int c = 0; c < kPairs; ++c, value += in_slots) {
    x[c] = c < tile.ics ? static_cast<float>(*value) : 0.0f;
  }
#pragma unroll
  for (int c = 0; c < kPairs; ++c, cotangent += slots) {
    g[c] = c < tile.ocs ? static_cast<float>(*cotangent) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (!kCareful || (x[i] != 0.0f && g[j] != 0.0f)) w_bar[i * kPairs + j] += x[i] * g[j];
    }
  }
}

// In shared memory: the slots of output sites and of their neighbours through a tap.
struct PairList {
  int2 pairs[kPairThreads];
  int scratch[kPairWarps];
};

// The lane's sums over a part of the sites. The block finds the sites' neighbours through a tap,
// kPairThreads at a time, and lists those that there are; the warps of a tile share the list.
template <bool kCareful, typename T, int R>
__device__ __forceinline__ void SumPairs(const WeightSums<T>& a, const Reach<R>& reach,
                                         const TapOffset<R>& tap, int64_t group, int64_t part,
                                         const WeightTile& tile, PairList& list,
                                         float (&w_bar)[kPairs * kPairs]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t chunks = (a.slots + kPairThreads - 1) / kPairThreads, units = a.items * chunks;
  for (int64_t unit = part * units / a.parts; unit < (part + 1) * units / a.parts; ++unit) {
    const int64_t item = group * a.items + unit / chunks;
    const int64_t i = unit % chunks * kPairThreads + threadIdx.x;
    const Sites in = {a.in_keys + item * a.in_slots, a.in_slots};
    const Sites out = {a.keys + item * a.slots, a.slots};
    const int32_t slot = Neighbour(reach, a.sites, in, Place(out, a.own, i), tap);
    int count;
    const int at = BlockExclusiveScan(slot >= 0 ? 1 : 0, list.scratch, count);
    if (slot >= 0) list.pairs[at] = make_int2(static_cast<int>(i), slot);
    __syncthreads();
    const T* value = a.values + (item * a.in_channels + tile.ic) * a.in_slots;
    const T* cotangent = a.cotangent + (item * a.out_channels + tile.oc) * a.slots;
    for (int n = warp / a.tiles.at_once * 32 + lane; n < count;
         n += kPairThreads / a.tiles.at_once) {
      const int2 pair = list.pairs[n];
      AddPair<kCareful>(value + pair.y, a.in_slots, cotangent + pair.x, a.slots, tile, w_bar);
    }
  }
}

// A block takes a (group, part, tap, some tiles). The plain sums are right where they are finite;
// where one is not, a factor was not, and all are made again with care.
template <typename T, int R>
__global__ void __launch_bounds__(kPairThreads, 3)
    WeightSumsKernel(WeightSums<T> a, Reach<R> reach) {
  constexpr int kSums = kPairs * kPairs;
  __shared__ PairList list;
  __shared__ float sums[kPairWarps][kSums];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at_once = a.tiles.at_once;
  const int64_t tasks = a.groups * a.parts * a.taps * a.tiles.blocks();
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t rest = task;
    const int64_t first_tile = rest % a.tiles.blocks() * at_once;
    const int64_t tap = (rest /= a.tiles.blocks()) % a.taps;
    const int64_t part = (rest /= a.taps) % a.parts, group = rest / a.parts;
    const TapOffset<R> offset(reach, static_cast<uint32_t>(tap));
    const WeightTile tile(a, first_tile + warp % at_once);
    bool careful = false, again;
    do {
      float w_bar[kSums] = {};
      if (careful) {
        SumPairs<true>(a, reach, offset, group, part, tile, list, w_bar);
      } else {
        SumPairs<false>(a, reach, offset, group, part, tile, list, w_bar);
      }
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        const float sum = WarpSum(w_bar[k]);
        if (lane == k % 32) sums[warp][k] = sum;
      }
      __syncthreads();
      bool finite = true;
      for (int k = threadIdx.x; k < at_once * kSums; k += kPairThreads) {
        float sum = 0.0f;
        for (int w = k / kSums; w < kPairWarps; w += at_once) sum += sums[w][k % kSums];
        finite &= sum - sum == 0.0f;
        const WeightTile of(a, first_tile + k / kSums);
        const int i = k % kSums / kPairs, j = k % kPairs;
        if (i >= of.ics || j >= of.ocs) continue;
        const int64_t vector =
            ((group * a.parts + part) * a.taps + tap) * a.in_channels + of.ic + i;
        a.sums[vector * a.block + of.oc - a.first + j] = sum;
      }
      again = __syncthreads_or(!finite) && !careful;
      careful = true;
    } while (again);
  }
}

// weights_bar[group][n] for the live weights of the block: the sum over the parts, in their order.
__global__ void __launch_bounds__(kThreads)
    GatherKernel(Filter f, int64_t groups, int64_t parts, int64_t weights,
                 const int32_t* kernel_keys, const float* sums, float* weights_bar) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < groups * weights;
       i += stride) {
    int64_t tap = 0, ic = 0, oc = f.first;
    const bool stored = Decode(f, kernel_keys[i % weights], tap, ic, oc);
    if (oc < f.first || oc >= f.first + f.columns()) continue;
    float total = 0.0f;
    for (int64_t part = 0; stored && part < parts; ++part) {
      const int64_t vector =
          (i / weights * parts + part) * f.taps * f.in_channels + f.Vector(tap, ic);
      total += sums[vector * f.block + oc - f.first];
    }
    weights_bar[i] = total;
  }
}

// bias_bar[group][oc], for groups of `items`: the sum of the cotangents at stored sites; a block
// each. Given the numbers one by one: the whole shape costs registers, which spill.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    BiasKernel(int64_t groups, int64_t items, int64_t channels, int64_t slots, int64_t sites,
               const int32_t* keys, const T* cotangent, float* bias_bar) {
  __shared__ float sums[kThreads];
  for (int64_t task = blockIdx.x; task < groups * channels; task += gridDim.x) {
    const int64_t group = task / channels, oc = task % channels;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < items * slots; i += kThreads) {
      const int64_t item = group * items + i / slots, slot = i % slots;
      const int32_t key = keys[item * slots + slot];
      if (key < 0 || key >= sites) continue;
      sum += static_cast<float>(cotangent[(item * channels + oc) * slots + slot]);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) bias_bar[task] = sums[0];
    __syncthreads();
  }
}

}  // namespace
}  // namespace ilajax
