// The sites of a tile that are within reach of an entry, and their responses; see cuda.cu.

#pragma once

#include "xla_kernels/conv/cuda_tile_mark.cuh"

namespace ilajax {
namespace {

// sums += x * weights, where a zero weight adds nothing: not even against inf or NaN.
__device__ __forceinline__ void AddProducts(float (&sums)[kBlock], float x, const float4* weights,
                                            bool finite) {
  const float4 low = weights[0], high = weights[1];
  const float w[kBlock] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (finite) {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) sums[j] += x * w[j];
  } else {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (w[j] != 0.0f) sums[j] += x * w[j];
    }
  }
}

// Adds one or two input channels, where most of the time goes to look-ups: a thread first collects
// which taps find anything, then goes through its own.
template <int R>
__device__ __forceinline__ void AddFewChannels(const SiteMapView& map, const Axes<R>& axes,
                                               const TapList<R>& taps, const float* weights,
                                               const ReadSite<R>& read, bool interior,
                                               float (&sums)[kBlock]) {
  for (int base = 0; base < taps.count; base += 32) {
    uint32_t hits = 0;
#pragma unroll 4
    for (int k = 0; k < min(32, taps.count - base); ++k) {
      const auto tap = taps.entries[base + k];
      const uint32_t site = read.flat + tap.flat;
      if (interior || read.Inside(axes, tap)) {
        hits |= (map.words[site >> 5].x >> (site & 31) & 1) << k;
      }
    }
    for (; hits != 0; hits &= hits - 1) {
      const auto tap = taps.entries[base + __ffs(hits) - 1];
      const uint2 record = map.Find(read.flat + tap.flat);
      const float* values = map.values + (record.y & ~kNotFinite);
      const float4* tap_weights = reinterpret_cast<const float4*>(weights + tap.tap * kBlock);
      for (uint32_t rest = record.x & taps.Live(0, tap.tap); rest != 0; rest &= rest - 1) {
        const int c = __ffs(rest) - 1;
        AddProducts(sums, values[__popc(record.x & ((1u << c) - 1))],
                    tap_weights + c * taps.taps * 2, !(record.y & kNotFinite));
      }
    }
  }
}

// Adds a group of channels where there are more, so that products count: all threads of the warp
// are at the same tap and channel, and read its weights at once.
template <int R>
__device__ __forceinline__ void AddChannels(const SiteMapView& map, const Axes<R>& axes,
                                            const TapList<R>& taps, int g, const float* weights,
                                            const ReadSite<R>& read, bool interior,
                                            float (&sums)[kBlock]) {
  for (int k = 0; k < taps.count; ++k) {
    const auto tap = taps.entries[k];
    uint2 record = make_uint2(0, 0);
    if (interior || read.Inside(axes, tap)) record = map.Find(read.flat + tap.flat);
    const uint32_t live = taps.Live(g, tap.tap);
    if (!__any_sync(kWarp, (record.x & live) != 0)) continue;
    // Eight channels at a time, so that all but the weights' place is known to the compiler.
    const float4* channel_weights = reinterpret_cast<const float4*>(weights + tap.tap * kBlock);
    const bool finite = !(record.y & kNotFinite);
    uint32_t value = record.y & ~kNotFinite;
    for (uint32_t rest = live, stored = record.x; rest != 0; rest >>= 8, stored >>= 8) {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (stored & rest & 1u << c) AddProducts(sums, map.values[value], channel_weights, finite);
        value += stored >> c & 1;
        channel_weights += taps.taps * 2;
      }
    }
  }
}

// The responses of a thread's output site in the channels of the block. Every thread of the warp
// calls it. Summed in the order of input groups, taps, channels.
template <int R>
__device__ __forceinline__ void Respond(const Forward& f, const Axes<R>& axes,
                                        const TapList<R>& taps, const float* weights, int item,
                                        const SiteMapView& first_group, uint32_t key,
                                        float (&sums)[kBlock]) {
  const ReadSite<R> read(axes, f.map, key);
  const bool interior = __all_sync(kWarp, read.Interior(axes));
#pragma unroll
  for (int j = 0; j < kBlock; ++j) sums[j] = 0.0f;
  if (f.map.channels <= 2) {
    AddFewChannels(first_group, axes, taps, weights, read, interior, sums);
    return;
  }
  for (int g = 0; g < f.map.groups(); ++g) {
    const float* group_weights = weights + int64_t{g} * kMapGroup * taps.taps * kBlock;
    const SiteMapView map = g == 0 ? first_group : SiteMapView(f.map, item, g);
    AddChannels(map, axes, taps, g, group_weights, read, interior, sums);
  }
}

__device__ __forceinline__ float Round(float value, ffi::DataType dtype) {
  if (dtype == ffi::DataType::BF16) return static_cast<float>(BFloat16(value));
  if (dtype == ffi::DataType::F16) return static_cast<float>(Float16(value));
  return value;
}

// The bits of a response with its bias, or kNone. kPlain: float32, selected if positive.
template <bool kPlain>
__device__ __forceinline__ uint32_t CandidateBits(const Forward& f, float sum, float bias) {
  const float value = kPlain ? sum + bias : Round(sum + bias, f.dtype);
  const bool chosen = kPlain ? !(value <= 0.0f) : IsCandidate(value, f.select);
  const uint32_t bits = value != value ? 0x7fc00000u : FloatBits(value);
  return sum != 0.0f && chosen ? bits : kNone;
}

// The reached sites of a tile. Their responses lie in the pool, or are computed, each time with the
// same bits.
template <int R, Pass P>
struct ReachedSites {
  const Forward& f;
  const Axes<R>& axes;
  const Tile& tile;
  TapList<R> taps;
  const float* weights;
  SiteMapView first_group;
  uint16_t* sites;  // counted from the tile's first
  int count = 0;
  uint32_t pool_begin = kUncached;  // their place in the pool
  bool pooled = false;              // by an earlier pass

  __device__ __forceinline__ ReachedSites(const Forward& f, const Axes<R>& axes, const Tile& tile,
                                          uint16_t* sites)
      : f(f),
        axes(axes),
        tile(tile),
        weights(f.filters.weights + f.filters.Vectors(tile.block, 0) * kBlock),
        sites(sites) {
    if (P == Pass::kRespond) return;
    const uint2 stored = *Stored();
    pool_begin = stored.x;
    count = static_cast<int>(stored.y);
    pooled = stored.x != kUncached;
  }

  __device__ uint2* Stored() const {
    return f.tile_reached + int64_t{tile.segment} * f.tiles + tile.index;
  }

  // What responses are computed from: the live taps, and the weights, in shared memory if they fit;
  // and where the map of the first channels is, which all sites look up.
  __device__ __forceinline__ void ReadFilters(uint4* tables) {
    first_group = SiteMapView(f.map, tile.item, 0);
    const DenseFilters& filters = f.filters;
    taps.Fill(axes, axes.input_step, filters.live + filters.Vectors(tile.block, 0),
              filters.in_channels, filters.taps, filters.taps, tables);
    if (!f.weights_in_shared) return;
    const int quads = filters.in_channels * filters.taps * kBlock / 4;
    float4* copy = reinterpret_cast<float4*>(
        tables + TapList<R>::SharedBytes(filters.taps, f.map.groups()) / sizeof(uint4));
    for (int i = threadIdx.x; i < quads; i += kTileThreads) {
      copy[i] = reinterpret_cast<const float4*>(weights)[i];
    }
    weights = reinterpret_cast<const float*>(copy);
  }

  // Lists the marked sites in ascending order.
  __device__ __forceinline__ void List(const uint32_t* bitmap) {
    __shared__ int scratch[kTileWarps];
    static_assert(kMaxTile / 32 <= kTileThreads, "a thread counts the sites of one word");
    uint32_t word = static_cast<int>(threadIdx.x) < f.tile / 32 ? bitmap[threadIdx.x] : 0;
    int place = BlockExclusiveScan(__popc(word), scratch, count);
    for (; word != 0; word &= word - 1) {
      sites[place++] = static_cast<uint16_t>(threadIdx.x * 32 + __ffs(word) - 1);
    }
  }

  // The first pass finds them a place in the pool, while there is one. The barrier is for the list
  // and the weights, too.
  __device__ __forceinline__ void FindPlace() {
    __shared__ uint32_t place;
    if (P == Pass::kRespond && threadIdx.x == 0) {
      place = kUncached;
      if (LoadFresh(f.pool_used) < f.pool_sites || count == 0) {
        const uint32_t offset =
            count == 0 ? 0 : atomicAdd(f.pool_used, static_cast<uint32_t>(count));
        if (count == 0 || offset + count <= f.pool_sites) place = offset;
      }
      *Stored() = make_uint2(place, count);
    }
    __syncthreads();
    if (P == Pass::kRespond) pool_begin = place;
  }

  // Calls visit(key, bits) for each site; a warp's sites lie together, and its lanes have one each.
  // Lanes without a site, and channels beyond the last, get kNone.
  template <typename Visit>
  __device__ __forceinline__ void ForEach(Visit&& visit) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int each = ((count + kTileWarps - 1) / kTileWarps + 31) / 32 * 32;
    const int warp_end = min((warp + 1) * each, count);
    for (int first = warp * each; first < warp_end; first += 32) {
      const int i = first + lane;
      const bool active = i < warp_end;
      uint32_t key = 0, bits[kBlock];
      if (pooled) {
        LoadPool(i, active, key, bits);
      } else {
        // A lane without a site does what the last one does, so that the warp stays together.
        key = static_cast<uint32_t>(tile.begin) + sites[min(i, warp_end - 1)];
        FindBits(active, key, bits);
        if (P == Pass::kRespond && active && pool_begin != kUncached) StorePool(i, key, bits);
      }
      visit(key, bits);
    }
  }

 private:
  __device__ uint4* PoolValues(int i) const {
    return reinterpret_cast<uint4*>(f.pool_values + int64_t{pool_begin + i} * kBlock);
  }

  __device__ __forceinline__ void LoadPool(int i, bool active, uint32_t& key,
                                           uint32_t (&bits)[kBlock]) const {
    uint4 low = make_uint4(kNone, kNone, kNone, kNone), high = low;
    if (active) {
      key = f.pool_keys[pool_begin + i];
      low = PoolValues(i)[0];
      high = PoolValues(i)[1];
    }
    bits[0] = low.x, bits[1] = low.y, bits[2] = low.z, bits[3] = low.w;
    bits[4] = high.x, bits[5] = high.y, bits[6] = high.z, bits[7] = high.w;
  }

  __device__ __forceinline__ void StorePool(int i, uint32_t key,
                                            const uint32_t (&bits)[kBlock]) const {
    f.pool_keys[pool_begin + i] = key;
    PoolValues(i)[0] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    PoolValues(i)[1] = make_uint4(bits[4], bits[5], bits[6], bits[7]);
  }

  __device__ __forceinline__ void FindBits(bool active, uint32_t key,
                                           uint32_t (&bits)[kBlock]) const {
    float sums[kBlock];
    Respond(f, axes, taps, weights, tile.item, first_group, key, sums);
    const bool plain = f.dtype == ffi::DataType::F32 && f.select == Select::kPositive;
    const float* bias = f.bias + tile.block * kBlock;
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      bits[j] = kNone;
      if (!active || j >= tile.channels) continue;
      bits[j] = plain ? CandidateBits<true>(f, sums[j], bias[j])
                      : CandidateBits<false>(f, sums[j], bias[j]);
    }
  }
};

}  // namespace
}  // namespace ilajax
