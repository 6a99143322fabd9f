// The kernels of convolution at given sites, which its gradient uses as well; see cuda_calls.cuh.

#pragma once

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/cuda.h"
#include "xla_kernels/products/cuda_sites.cuh"

namespace ilajax {
namespace {

constexpr int kSites = 128;     // sites of a block
constexpr int kThreads = 256;   // of the kernels that go over other things
constexpr int kTile = 32;       // channels in the registers of a thread,
constexpr int kNarrowTile = 8;  // and where no more are needed

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

}  // namespace
}  // namespace ilajax
