// The kernels of convolution at given sites, and of its gradient; see cuda_calls.cuh.

#pragma once

#include "xla_kernels/common/axes.cuh"
#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/cuda.h"

namespace ilajax {
namespace {

constexpr int kSites = 128;        // sites of a block
constexpr int kThreads = 256;      // of the kernels that go over other things
constexpr int kTile = 32;          // channels in the registers of a thread,
constexpr int kNarrowTile = 8;     // and where no more are needed
constexpr int kPairs = 8;          // weights_bar: a lane sums kPairs x kPairs channels,
constexpr int kPairThreads = 128;  // in a block that goes over so many sites at a time
constexpr int kPairWarps = kPairThreads / 32;

// A dense filter as vectors of `block` weights, for output channels from `first`: one for each tap
// and input channel, over which responses are summed. Transposed: the channels change places.
//   vectors  f32[tap][summed channel][block]
//   live     u32[tap][tile of the vector][group of 32 summed channels]: a bit for each
struct Filter {
  float* vectors;
  uint32_t* live;
  int64_t taps, in_channels, out_channels, first, block;
  bool transposed;

  __host__ __device__ int64_t summed_channels() const {
    return transposed ? out_channels : in_channels;
  }
  __host__ __device__ int64_t groups() const { return (summed_channels() + 31) / 32; }
  __host__ __device__ int64_t columns() const {
    const int64_t all = transposed ? in_channels : out_channels;
    return all - first < block ? all - first : block;
  }
  __host__ __device__ int64_t tile() const {
    return columns() <= kNarrowTile ? kNarrowTile : kTile;
  }
  __host__ __device__ int64_t tiles() const { return (columns() + tile() - 1) / tile(); }

  __device__ int64_t Vector(int64_t tap, int64_t channel) const {
    return tap * summed_channels() + channel;
  }
  __device__ uint32_t* Live(int64_t tap, int64_t tile) const {
    return live + (tap * tiles() + tile) * groups();
  }
};

// Where a weight stands: its tap, input and output channel; false for padding.
__device__ bool Decode(const Filter& f, int32_t key, int64_t& tap, int64_t& ic, int64_t& oc) {
  if (key < 0 || key >= f.out_channels * f.in_channels * f.taps) return false;
  tap = key % f.taps;
  ic = key / f.taps % f.in_channels;
  oc = key / f.taps / f.in_channels;
  return true;
}

__global__ void __launch_bounds__(kThreads)
    ZeroKernel(Filter f, int64_t count, int32_t* responses) {
  const int64_t vectors = f.taps * f.summed_channels();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t begin = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = begin; i < vectors * f.block; i += stride) f.vectors[i] = 0.0f;
  for (int64_t i = begin; i < f.taps * f.tiles() * f.groups(); i += stride) f.live[i] = 0;
  for (int64_t i = begin; i < count; i += stride) responses[i] = 0;
}

// Behind ZeroKernel: one thread a weight.
__global__ void __launch_bounds__(kThreads)
    FillKernel(Filter f, int64_t weights, const int32_t* kernel_keys, const float* values) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < weights; n += stride) {
    int64_t tap, ic, oc;
    if (!Decode(f, kernel_keys[n], tap, ic, oc)) continue;
    const int64_t summed = f.transposed ? oc : ic;
    const int64_t column = (f.transposed ? ic : oc) - f.first;
    if (column < 0 || column >= f.columns()) continue;
    f.vectors[f.Vector(tap, summed) * f.block + column] = values[n];
    atomicOr(f.Live(tap, column / f.tile()) + summed / 32, 1u << (summed % 32));
  }
}

// The window of a call, whose input may be spread apart.
template <int R>
struct Reach : Axes<R> {
  Divisor apart[R];
  bool spread = false;

  explicit Reach(const Window& w) : Axes<R>(w) {
    for (int a = 0; a < w.rank; ++a) {
      apart[R - w.rank + a] = Divisor(w.input_dilation[a]);
      spread |= w.input_dilation[a] != 1;
    }
  }

  // Where a tap at offset 0 reads for an output site.
  __device__ __forceinline__ void Origin(uint32_t site, int32_t (&p)[R]) const {
    this->Unravel(site, this->output_size, p);
#pragma unroll
    for (int a = 0; a < R; ++a) p[a] = p[a] * this->stride[a] - this->low[a];
  }

  // The key of the input's site that lies `offset` from there; -1 if there is none.
  __device__ __forceinline__ int32_t Key(const int32_t (&origin)[R],
                                         const int32_t (&offset)[R]) const {
    bool inside = true;
    int32_t p[R];
#pragma unroll
    for (int a = 0; a < R; ++a) {
      p[a] = origin[a] + offset[a];
      if (spread) {
        const uint32_t at = apart[a].Quotient(static_cast<uint32_t>(p[a]) & 0x7fffffff);
        inside &= p[a] >= 0 && at * apart[a].value == static_cast<uint32_t>(p[a]);
        p[a] = static_cast<int32_t>(at);
      }
      inside &= static_cast<uint32_t>(p[a]) < static_cast<uint32_t>(this->input[a]);
    }
    return inside ? static_cast<int32_t>(this->InputKey(p)) : -1;
  }
};

// How far a tap is from the first one along each axis.
template <int R>
struct TapOffset {
  int32_t along[R];

  __device__ __forceinline__ TapOffset(const Reach<R>& reach, uint32_t tap) {
    Reach<R>::Unravel(tap, reach.window_size, along);
#pragma unroll
    for (int a = 0; a < R; ++a) along[a] *= reach.dilation[a];
  }

  // To the next tap.
  __device__ __forceinline__ void Step(const Reach<R>& reach) {
    bool carry = true;
#pragma unroll
    for (int a = R - 1; a >= 0; --a) {
      const bool last = along[a] == (reach.window[a] - 1) * reach.dilation[a];
      if (carry) along[a] = last ? 0 : along[a] + reach.dilation[a];
      carry = carry && last;
    }
  }
};

// The sites that a window reads, of one sample.
struct Sites {
  const int32_t* keys;
  int64_t slots;
};

// Finds slots by their keys, which ascend: from where the last key is, or would be, the next one is
// no more slots away than keys. So that of the next tap of a row costs one probe.
struct SlotSearch {
  const int32_t* keys;
  int32_t slots;
  int32_t key = 0, slot = 0;  // the first slot whose key is not below `key`,
  bool found = false;         // and whether it is `key`
  bool begun = false;

  // `own`: a slot with this key, where one is known, else -1.
  __device__ __forceinline__ SlotSearch(const Sites& in, int32_t site, int64_t own)
      : keys(in.keys), slots(static_cast<int32_t>(in.slots)) {
    if (own < 0) return;
    key = site, slot = static_cast<int32_t>(own);
    found = begun = true;
  }

  // The slot of a key; -1 if there is none, or for a key below 0.
  __device__ __forceinline__ int32_t Find(int32_t next) {
    if (next < 0) return -1;
    if (begun && next - key == 1) {
      slot += found ? 1 : 0;
    } else {
      int32_t first = 0, count = slots;
      if (begun) {
        const int32_t distance = next - key;
        first = max(slot + min(distance, 0), 0);
        count = distance < 0 ? slot - first : min(distance, slots - slot);
      }
      while (count > 0) {
        const int32_t half = count / 2;
        const bool below = keys[first + half] < next;
        first = below ? first + half + 1 : first;
        count = below ? count - half - 1 : half;
      }
      slot = first;
    }
    key = next;
    begun = true;
    found = slot < slots && keys[slot] == next;
    return found ? slot : -1;
  }
};

// sums += x * weights. A zero factor adds nothing, not even against inf or NaN.
template <int kColumns>
__device__ __forceinline__ void AddProducts(float x, const float* weights,
                                            float (&sums)[kColumns]) {
  if (x == 0.0f) return;
  const float4* four = reinterpret_cast<const float4*>(weights);
  float w[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns / 4; ++j) {
    const float4 each = four[j];
    w[4 * j] = each.x, w[4 * j + 1] = each.y, w[4 * j + 2] = each.z, w[4 * j + 3] = each.w;
  }
  if (x - x == 0.0f) {  // finite
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[j] += x * w[j];
  } else {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (w[j] != 0.0f) sums[j] += x * w[j];
    }
  }
}

// An output site, and its slot where the output's sites are the input's, else -1.
struct Place {
  int32_t site;
  int64_t own_slot;

  // That of slot i; beyond the last a site outside the grid.
  __device__ Place(const Sites& out, bool own, int64_t i)
      : site(i < out.slots ? out.keys[i] : -1), own_slot(own ? i : -1) {}
  __device__ explicit Place(int32_t key) : site(key), own_slot(-1) {}

  __device__ bool InGrid(int64_t sites) const { return site >= 0 && site < sites; }
};

// The slot of the site that a tap reads for an output site; -1 if there is none.
template <int R>
__device__ __forceinline__ int32_t Neighbour(const Reach<R>& reach, int64_t sites, const Sites& in,
                                             const Place& out, const TapOffset<R>& tap) {
  const bool inside = out.InGrid(sites);
  int32_t origin[R];
  reach.Origin(inside ? out.site : 0, origin);
  const int32_t key = inside ? reach.Key(origin, tap.along) : -1;
  return SlotSearch(in, out.site, out.own_slot).Find(key);
}

// The sums of a tile of the filter's columns at an output site, over `in` T[summed channels, slots].
// Taps are those of the window, in their order; those of a transposed filter go backwards.
template <typename T, int kColumns, int R>
__device__ __forceinline__ void SumTile(const Reach<R>& reach, int64_t sites, const Filter& f,
                                        const Sites& in_sites, const T* in, const Place& out,
                                        int64_t tile, float (&sums)[kColumns]) {
  const bool inside = out.InGrid(sites);
  int32_t origin[R];
  reach.Origin(inside ? out.site : 0, origin);
  SlotSearch search(in_sites, out.site, out.own_slot);
  TapOffset<R> offset(reach, 0);
  const int groups = static_cast<int>(f.groups());
  for (int64_t t = 0; t < f.taps; ++t, offset.Step(reach)) {
    const int64_t tap = f.transposed ? f.taps - 1 - t : t;
    const uint32_t* live = f.Live(tap, tile);
    int32_t slot = -2;  // not looked for yet
    for (int g = 0; g < groups; ++g) {
      uint32_t rest = live[g];
      if (rest == 0) continue;
      if (slot == -2) slot = inside ? search.Find(reach.Key(origin, offset.along)) : -1;
      if (slot < 0) break;
      const float* weights = f.vectors + f.Vector(tap, g * 32) * f.block + tile * kColumns;
      const T* value = in + int64_t{g} * 32 * in_sites.slots + slot;
      for (; rest != 0; rest >>= 8) {
#pragma unroll
        for (int c = 0; c < 8; ++c, weights += f.block, value += in_sites.slots) {
          if (rest >> c & 1) AddProducts(static_cast<float>(*value), weights, sums);
        }
      }
    }
  }
}

// One direction of the convolution: from `in` T[items, summed channels, in_slots] at `in_keys` to a
// block of the channels of `out` T[items, out_channels, slots] at `keys`. Backward the window is the
// reversed one, and the filter transposed.
template <typename T>
struct Apply {
  Filter filter;
  bool own;
  int64_t items, in_slots, slots, out_channels;
  const int32_t *in_keys, *keys;
  const T* in;
  T* out;
  const float* bias;   // forward only, else null
  int32_t* responses;  // how many are not zero; null: that is not asked for
  bool positive;       // only what is above 0 passes, or NaN
  int64_t sites = 0;   // of the output's grid
};

// Blocks of a multiprocessor, of the kernels that sum tiles: with more, some spill.
constexpr int SiteBlocks(int rank) { return rank <= 3 ? 4 : 3; }

template <typename T, int kColumns, int R>
__global__ void __launch_bounds__(kSites, SiteBlocks(R)) ApplyKernel(Apply<T> a, Reach<R> reach) {
  const Filter& f = a.filter;
  const int64_t tiles = f.tiles();
  const int64_t chunks = (a.slots + kSites - 1) / kSites;
  for (int64_t task = blockIdx.x; task < a.items * chunks * tiles; task += gridDim.x) {
    const int64_t tile = task % tiles, chunk = task / tiles % chunks, item = task / tiles / chunks;
    const int64_t i = chunk * kSites + threadIdx.x;
    const Sites in_sites = {a.in_keys + item * a.in_slots, a.in_slots};
    const Sites out_sites = {a.keys + item * a.slots, a.slots};
    const T* in = a.in + item * f.summed_channels() * a.in_slots;
    float sums[kColumns] = {};
    const Place place(out_sites, a.own, i);
    if (__any_sync(kWarp, place.InGrid(a.sites))) {  // not so in padding
      SumTile(reach, a.sites, f, in_sites, in, place, tile, sums);
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t column = tile * kColumns + j;
      if (column >= f.columns()) break;  // the same in all threads
      const int64_t channel = f.first + column;
      const bool responds = sums[j] != 0.0f;
      float value = sums[j];
      if (a.bias != nullptr) {
        value = responds ? value + a.bias[channel] : 0.0f;
        if (a.positive && value <= 0.0f) value = 0.0f;
      }
      if (a.responses != nullptr) {
        const int32_t count = __popc(__ballot_sync(~0u, responds));
        if (threadIdx.x % 32 == 0 && count != 0) {
          atomicAdd(&a.responses[item * a.out_channels + channel], count);
        }
      }
      if (i < a.slots) a.out[(item * a.out_channels + channel) * a.slots + i] = T(value);
    }
  }
}

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
