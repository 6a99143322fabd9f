// The kernels of the gradient; see cuda.cu.

#pragma once

#include "xla_kernels/conv/cuda_common.cuh"

namespace ilajax {
namespace {

constexpr int kGradientThreads = 128;
constexpr int kGradientWarps = kGradientThreads / 32;
constexpr int kEntries = 2;                          // of a thread
constexpr int kStrip = kGradientThreads * kEntries;  // entries that a block takes at a time
constexpr int kBiasStrip = 8192;                     // kept outputs that a block sums up

struct Backward {
  SiteMap map;  // of the cotangents
  DenseFilters filters;
  const int32_t* keys;
  const int32_t* out_keys;
  const int32_t* kernel_keys;
  float* weights_bar;
  float* bias_bar;
  int batch, slots, capacity, weights, groups;
  bool shared;
  int64_t input_sites, output_sites;

  int first_item, items;         // the chunk of the batch
  int64_t slab_begin, slab_end;  // input sites
  int slab, slabs;
  int span, parts;  // items that share a block's sums, or parts of one item
  bool sums_in_shared;

  float* sums;       // [slab][part of the batch][ic][copy][tap][channel]
  float* bias_sums;  // [item][channel][strip]

  ILAJAX_HOST_DEVICE int copies() const { return sums_in_shared ? 1 : kGradientWarps; }
  // Of a tap's sums: the channels of whole blocks, of a size that the compiler knows.
  ILAJAX_HOST_DEVICE int width() const {
    return (filters.out_channels + kBlock - 1) / kBlock * kBlock;
  }
  ILAJAX_HOST_DEVICE int64_t all_parts() const { return int64_t{batch / span} * parts; }
  ILAJAX_HOST_DEVICE int bias_strips() const { return (capacity + kBiasStrip - 1) / kBiasStrip; }
  ILAJAX_HOST_DEVICE int64_t gradient_blocks() const {
    return int64_t{items / span} * parts * filters.in_channels;
  }
  ILAJAX_HOST_DEVICE int64_t bias_blocks() const {
    return slab > 0 ? 0 : int64_t{items} * filters.out_channels * bias_strips();
  }
};

// Adds up 8 values over the warp; lane 4 * j of it gets value j's sum, of the order given by this
// code.
__device__ float WarpSum8(float (&v)[8]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & (half * 4);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? v[i + half] : v[i], give = upper ? v[i] : v[i + half];
      v[i] = keep + __shfl_xor_sync(kWarp, give, half * 4);
    }
  }
  v[0] += __shfl_xor_sync(kWarp, v[0], 2);
  return v[0] + __shfl_xor_sync(kWarp, v[0], 1);
}

// The sum of a strip of a channel's kept cotangents.
template <typename T>
__device__ void SumBias(const Backward& b, const T* cotangent, uint32_t task) {
  __shared__ float warp_sums[kGradientWarps];
  const int64_t segment = int64_t{b.first_item} * b.filters.out_channels + task / b.bias_strips();
  const int begin = static_cast<int>(task % b.bias_strips()) * kBiasStrip;
  const int end = min(begin + kBiasStrip, b.capacity);
  float sum = 0.0f;
#pragma unroll 4
  for (int i = begin + threadIdx.x; i < end; i += kGradientThreads) {
    const int32_t key = b.out_keys[segment * b.capacity + i];
    const float g = static_cast<float>(cotangent[segment * b.capacity + i]);
    if (key >= 0 && key < b.output_sites) sum += g;
  }
  sum = WarpSum(sum);
  if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kGradientWarps; ++w) sum += warp_sums[w];
    b.bias_sums[segment * b.bias_strips() + task % b.bias_strips()] = sum;
  }
}

// What a block of threads works on: an input channel of a part of the batch's entries.
struct GradientTask {
  int ic;
  int part;                     // of the chunk
  int first_item;               // of the span that shares the block's sums
  int first_strip, last_strip;  // of each item

  __device__ __forceinline__ GradientTask(const Backward& b, uint32_t task) {
    ic = static_cast<int>(task % b.filters.in_channels);
    part = static_cast<int>(task / b.filters.in_channels);
    const int strips = (b.slots + kStrip - 1) / kStrip;
    const int piece = part % b.parts, share = strips / b.parts, rest = strips % b.parts;
    first_strip = share * piece + min(piece, rest);
    last_strip = first_strip + share + (piece < rest ? 1 : 0);
    first_item = part / b.parts * b.span;
  }
};

// A thread's entries of a strip: the positions and the sites, counted from the map's first, that a tap
// at offset 0 takes them to, before strides; values and their gradients.
template <int R>
struct StripEntries {
  int32_t p[kEntries][R];
  uint32_t flat[kEntries];
  float x[kEntries], x_bar[kEntries];
  bool stored[kEntries];
  bool interior;  // all taps take the warp's entries to a site of their own

  __device__ static int Slot(int strip, int e) {
    return strip * kStrip + e * kGradientThreads + threadIdx.x;
  }

  // Reads a segment's entries; returns whether the warp has any. The first slab clears the padding.
  template <typename T>
  __device__ __forceinline__ bool Load(const Backward& b, const Axes<R>& axes, int strip,
                                       const int32_t* keys, const T* values, T* values_bar) {
    bool any = false, inside = true;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const int i = Slot(strip, e);
      const int32_t key = i < b.slots ? keys[i] : -1;
      stored[e] = key >= b.slab_begin && key < b.slab_end;
      x[e] = stored[e] ? static_cast<float>(values[i]) : 0.0f;
      x_bar[e] = 0.0f;
      Axes<R>::Unravel(stored[e] ? key : 0, axes.input_size, p[e]);
      flat[e] = -static_cast<uint32_t>(b.map.begin);
      bool all_taps = true;
#pragma unroll
      for (int a = 0; a < R; ++a) {
        p[e][a] += axes.low[a];
        flat[e] += static_cast<uint32_t>(p[e][a]) * axes.output_step[a];
        all_taps &= axes.stride[a] == 1 && p[e][a] < axes.output[a] &&
                    p[e][a] >= (axes.window[a] - 1) * axes.dilation[a];
      }
      inside &= all_taps || !stored[e];
      if (i < b.slots && b.slab == 0 && (key < 0 || key >= b.input_sites)) values_bar[i] = T(0.0f);
      any |= stored[e];
    }
    interior = __all_sync(kWarp, inside);
    return __any_sync(kWarp, any);
  }

  template <typename T>
  __device__ __forceinline__ void Store(int strip, T* values_bar) const {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (stored[e]) values_bar[Slot(strip, e)] = T(x_bar[e]);
    }
  }

  // The output site that entry e reaches through a tap, counted from the map's first; one beyond
  // all sites if there is none.
  __device__ __forceinline__ uint32_t OutputSite(const Axes<R>& axes, const SiteMap& map, int e,
                                                 const typename TapList<R>::Entry& tap) const {
    constexpr uint32_t kNowhere = 0xffffffffu;
    if (interior) return stored[e] ? flat[e] - tap.flat : kNowhere;
    bool inside = stored[e];
    uint32_t key = 0;
#pragma unroll
    for (int a = 0; a < R; ++a) {
      int32_t o = p[e][a] - tap.offset[a];
      if (axes.stride[a] != 1) {
        inside &= o % axes.stride[a] == 0;
        o /= axes.stride[a];
      }
      inside &= o >= 0 && o < axes.output[a];
      key += static_cast<uint32_t>(o) * axes.output_step[a];
    }
    return inside ? key - static_cast<uint32_t>(map.begin) : kNowhere;
  }
};

// Adds the products of an entry with the cotangents of a block of channels, of which `mask` tells
// those that are stored, in `values` from `first` on. A zero factor adds nothing, not even if
// the other is inf or NaN. kPlain: x is not 0, and all cotangents are finite.
template <bool kPlain>
__device__ __forceinline__ void AddCotangents(const float* values, uint32_t first, uint32_t mask,
                                              float x, const float (&w)[kBlock], float& x_bar,
                                              float (&w_bar)[kBlock]) {
#pragma unroll
  for (int c = 0; c < kBlock; ++c) {
    if (mask >> c & 1) {
      const float g = values[first];
      if (kPlain || w[c] != 0.0f) x_bar += g * w[c];
      if (kPlain || x != 0.0f) w_bar[c] += g * x;
    }
    first += mask >> c & 1;
  }
}

// Adds what a strip's entries reach of block j of a group of channels: to their own gradients, and
// over the warp to those of the weights.
template <int R>
__device__ __forceinline__ void AddBlock(const SiteMapView& map, const uint2 (&records)[kEntries],
                                         int j, const float* weights, StripEntries<R>& entries,
                                         float* sums) {
  const float4* weight = reinterpret_cast<const float4*>(weights);
  const float4 low = weight[0], high = weight[1];
  const float w[kBlock] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  float w_bar[kBlock] = {};
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const uint2 record = records[e];
    const uint32_t mask = record.x >> (kBlock * j) & 0xff;
    if (mask == 0) continue;
    const uint32_t first = (record.y & ~kNotFinite) + __popc(record.x & ((1u << (kBlock * j)) - 1));
    const float x = entries.x[e];
    float& x_bar = entries.x_bar[e];
    if (x != 0.0f && !(record.y & kNotFinite)) {
      AddCotangents<true>(map.values, first, mask, x, w, x_bar, w_bar);
    } else {
      AddCotangents<false>(map.values, first, mask, x, w, x_bar, w_bar);
    }
  }
  const float sum = WarpSum8(w_bar);
  const int lane = threadIdx.x & 31;
  if (lane % 4 == 0) sums[lane / 4] += sum;
}

// Adds what a strip's entries reach of a group of output channels. Every thread of the warp calls it.
template <int R>
__device__ __forceinline__ void AddGroup(const Backward& b, const Axes<R>& axes,
                                         const TapList<R>& taps, int g, int item, int ic,
                                         StripEntries<R>& entries, float* sums) {
  constexpr int kBlocks = kMapGroup / kBlock;
  const SiteMapView map(b.map, item, g);
  const int first = g * kBlocks, blocks = (b.map.group_channels(g) + kBlock - 1) / kBlock;
  const float* const weights = Kept(b.filters.weights + b.filters.Vectors(first, ic) * kBlock);
  const int64_t block_step = b.filters.Vectors(1, 0) * kBlock;
  for (int k = 0; k < taps.count; ++k) {
    const auto tap = taps.entries[k];
    uint2 records[kEntries];
    uint32_t reached = 0;  // channels
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      records[e] = map.Find(entries.OutputSite(axes, b.map, e, tap));
      reached |= records[e].x;
    }
    if (!__any_sync(kWarp, reached != 0)) continue;
    const uint32_t live = taps.Live(first / 32, tap.tap) >> (first % 32);
    const float* block_weights = weights + tap.tap * kBlock;
    for (int j = 0; j < blocks; ++j, block_weights += block_step) {
      if (!(live >> j & 1)) continue;
      if (!__any_sync(kWarp, (reached >> (kBlock * j) & 0xff) != 0)) continue;
      AddBlock(map, records, j, block_weights, entries,
               sums + tap.tap * b.width() + (first + j) * kBlock);
    }
  }
}

// The sums of the weights' gradients: a copy for each warp, in shared memory where they fit.
struct WeightSums {
  int count;    // of a copy
  float* out;   // the block's in the workspace
  float* sums;  // the first copy

  __device__ __forceinline__ WeightSums(const Backward& b, const GradientTask& task, void* shared)
      : count(b.filters.taps * b.width()) {
    const int64_t part = int64_t{b.first_item / b.span} * b.parts + task.part;  // of all
    out = b.sums + ((b.slab * b.all_parts() + part) * b.filters.in_channels + task.ic) *
                       b.copies() * int64_t{count};
    sums = b.sums_in_shared ? static_cast<float*>(shared) : out;
  }

  __device__ __forceinline__ void Clear() const {
    for (int i = threadIdx.x; i < count * kGradientWarps; i += kGradientThreads) sums[i] = 0.0f;
    __syncthreads();
  }

  __device__ float* OfWarp() const { return sums + int64_t{threadIdx.x >> 5} * count; }

  // Adds up the copies; in the workspace they stay apart.
  __device__ __forceinline__ void Store() const {
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kGradientThreads) {
      float sum = sums[i];
      for (int w = 1; w < kGradientWarps; ++w) sum += sums[w * count + i];
      out[i] = sum;
    }
  }
};

template <typename T, int R>
__global__ void __launch_bounds__(kGradientThreads, 5)
    GradientKernel(Backward b, Axes<R> axes, const T* values, const T* cotangent, T* values_bar) {
  if (blockIdx.x >= b.gradient_blocks()) {
    return SumBias(b, cotangent, blockIdx.x - static_cast<uint32_t>(b.gradient_blocks()));
  }
  uint4* shared = DynamicShared();
  const GradientTask task(b, blockIdx.x);
  TapList<R> taps;
  taps.Fill(axes, axes.output_step, b.filters.live + b.filters.Vectors(0, task.ic),
            b.filters.blocks(), b.filters.Vectors(1, 0), b.filters.taps, shared);
  const int64_t tap_bytes = TapList<R>::SharedBytes(b.filters.taps, (b.filters.blocks() + 31) / 32);
  const WeightSums sums(b, task, shared + tap_bytes / sizeof(uint4));
  sums.Clear();
  float* const own = sums.OfWarp();
  for (int item = task.first_item; item < task.first_item + b.span; ++item) {
    const int64_t batch_item = int64_t{b.first_item} + item;
    const int64_t segment = (batch_item * b.filters.in_channels + task.ic) * b.slots;
    const int32_t* keys = b.keys + (b.shared ? batch_item * b.slots : segment);
    for (int strip = task.first_strip; strip < task.last_strip; ++strip) {
      StripEntries<R> entries;
      if (!entries.Load(b, axes, strip, keys, values + segment, values_bar + segment)) continue;
      for (int g = 0; g < b.map.groups(); ++g) {
        AddGroup(b, axes, taps, g, item, task.ic, entries, own);
      }
      entries.Store(strip, values_bar + segment);
    }
  }
  if (b.sums_in_shared) sums.Store();
}

// Adds up the parts: a warp for each weight and each bias.
__global__ void __launch_bounds__(kGradientThreads) FinishKernel(Backward b) {
  const int lane = threadIdx.x & 31;
  const int channels = b.filters.out_channels, inputs = b.filters.in_channels,
            taps = b.filters.taps;
  const int64_t group_items = b.batch / b.groups;
  const int64_t weight_tasks = int64_t{b.groups} * b.weights;
  const int64_t tasks = weight_tasks + int64_t{b.groups} * channels;
  for (int64_t task = int64_t{blockIdx.x} * kGradientWarps + (threadIdx.x >> 5); task < tasks;
       task += int64_t{gridDim.x} * kGradientWarps) {
    float sum = 0.0f;
    if (task < weight_tasks) {
      const int64_t group = task / b.weights;
      const int64_t key = b.kernel_keys[task % b.weights];
      if (key >= 0 && key < int64_t{channels} * inputs * taps) {
        const int tap = static_cast<int>(key % taps), ic = static_cast<int>(key / taps % inputs);
        const int oc = static_cast<int>(key / taps / inputs);
        const int64_t parts = b.all_parts() / b.groups, copies = b.copies();
        for (int64_t i = lane; i < b.slabs * parts * copies; i += 32) {
          const int64_t slab = i / (parts * copies), part = group * parts + i / copies % parts;
          const int64_t copy = ((slab * b.all_parts() + part) * inputs + ic) * copies + i % copies;
          sum += b.sums[(copy * taps + tap) * b.width() + oc];
        }
      }
    } else {
      const int64_t group = (task - weight_tasks) / channels, oc = (task - weight_tasks) % channels;
      for (int64_t i = lane; i < group_items * b.bias_strips(); i += 32) {
        const int64_t item = group * group_items + i / b.bias_strips();
        sum += b.bias_sums[(item * channels + oc) * b.bias_strips() + i % b.bias_strips()];
      }
    }
    sum = WarpSum(sum);
    if (lane != 0) continue;
    if (task < weight_tasks) {
      b.weights_bar[task] = sum;
    } else {
      b.bias_bar[task - weight_tasks] = sum;
    }
  }
}

}  // namespace
}  // namespace ilajax
