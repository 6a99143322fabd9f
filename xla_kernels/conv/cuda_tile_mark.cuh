// Marks the sites of a tile that stored entries reach, 32 of a row at a time; see cuda.cu.

#pragma once

#include "xla_kernels/conv/cuda_tile.cuh"

namespace ilajax {
namespace {

// Where an output site reads the input: the position and the site, counted from the map's first, of
// a tap at offset 0.
template <int R>
struct ReadSite {
  int32_t p[R];
  uint32_t flat;

  __device__ __forceinline__ ReadSite(const Axes<R>& axes, const SiteMap& map, uint32_t key) {
    Axes<R>::Unravel(key, axes.output, p);
#pragma unroll
    for (int a = 0; a < R; ++a) p[a] = p[a] * axes.stride[a] - axes.low[a];
    flat = axes.InputKey(p) - static_cast<uint32_t>(map.begin);
  }

  // Whether a tap reads inside the grid, along the first `kAxes` axes.
  template <int kAxes = R>
  __device__ __forceinline__ bool Inside(const Axes<R>& axes,
                                         const typename TapList<R>::Entry& tap) const {
    bool inside = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      inside &= static_cast<uint32_t>(p[a] + tap.offset[a]) < static_cast<uint32_t>(axes.input[a]);
    }
    return inside;
  }

  // Whether all taps do.
  __device__ __forceinline__ bool Interior(const Axes<R>& axes) const {
    bool inside = true;
#pragma unroll
    for (int a = 0; a < R; ++a) {
      inside &= p[a] >= 0 && p[a] + (axes.window[a] - 1) * axes.dilation[a] < axes.input[a];
    }
    return inside;
  }
};

// Which sites of an item any channel stores.
struct StoredSites {
  const uint2* words;
  int64_t step;  // from one group of channels to the next
  int groups;

  __device__ __forceinline__ StoredSites(const SiteMap& map, int item)
      : words(Kept(map.words + map.Words(item, 0))), step(map.words_each), groups(map.groups()) {}

  // A bit for each of 64 positions of a row from x on, where `site` is. Beyond the row is nothing.
  __device__ __forceinline__ uint64_t Line(uint32_t site, int x, int width) const {
    const int skipped = max(-x, 0), inside = min(64, width - x) - skipped;
    if (inside <= 0) return 0;
    const uint2* word = words + ((site + skipped) >> 5);
    const uint32_t shift = (site + skipped) & 31;
    uint64_t line = 0;
#pragma unroll 1
    for (int g = 0; g < groups; ++g, word += step) {
      uint64_t both = word[0].x;
      if (shift + inside > 32) both |= uint64_t{word[1].x} << 32;
      line |= both >> shift;
      if (shift + inside > 64) line |= uint64_t{word[2].x} << (64 - shift);
    }
    return (line & ~uint64_t{0} >> (64 - inside)) << skipped;
  }
};

// Which of `count` output sites of a row, 32 at most, find an entry through any tap.
template <int R>
__device__ __forceinline__ uint32_t ReachedBits(const StoredSites& stored, const Axes<R>& axes,
                                                const TapList<R>& taps, const ReadSite<R>& first,
                                                int count) {
  const int width = axes.input[R - 1], stride = axes.stride[R - 1];
  uint32_t bits = 0, row = 0;
  uint64_t line = 0;
  int begin = 0;  // of the line, as an offset
  for (int k = 0; k < taps.count; ++k) {
    const auto tap = taps.entries[k];
    const int offset = tap.offset[R - 1], x = first.p[R - 1] + offset;
    const uint32_t site = first.flat + tap.flat;
    if (stride == 1) {
      // One line for the taps of a row.
      if (k == 0 || row != tap.flat - offset || offset - begin > 32) {
        row = tap.flat - offset, begin = offset;
        line = first.template Inside<R - 1>(axes, tap) ? stored.Line(site, x, width) : 0;
      }
      bits |= static_cast<uint32_t>(line >> (offset - begin));
    } else if (first.template Inside<R - 1>(axes, tap)) {
      for (int i = 0; i < count;) {
        line = stored.Line(site + i * stride, x + i * stride, width);
        for (int at = 0; at < 64 && i < count; at += stride, ++i) bits |= (line >> at & 1) << i;
      }
    }
  }
  return bits & ~uint32_t{0} >> (32 - count);
}

// Whether a chunk of the map that the tile reads has any entry, by the taps of this thread.
template <int R>
__device__ __forceinline__ bool ReadsAny(const Forward& f, const Axes<R>& axes,
                                         const TapList<R>& taps, const Tile& tile) {
  for (int k = threadIdx.x; k < taps.count; k += kTileThreads) {
    const ReadSite<R> first(axes, f.map, tile.begin), last(axes, f.map, tile.end - 1);
    // All that it reads through a tap lies between the ends of two rows of the grid.
    int32_t low[R], high[R];
#pragma unroll
    for (int a = 0; a < R; ++a) {
      const int offset = taps.entries[k].offset[a], most = axes.input[a] - 1;
      low[a] = a == R - 1 ? 0 : max(0, min(first.p[a] + offset, most));
      high[a] = a == R - 1 ? most : max(0, min(last.p[a] + offset, most));
    }
    const int64_t from = max(axes.InputKey(low) - f.map.begin, int64_t{0});
    const int64_t to = min(axes.InputKey(high) - f.map.begin, f.map.sites - 1);
    for (int64_t c = from / kMapChunk; c <= to / kMapChunk && from <= to; ++c) {
      if (f.map.StoresAny(tile.item, c)) return true;
    }
  }
  return false;
}

// Marks the sites of a tile that any stored entry reaches through a live tap. A thread takes up to
// 32 sites of a row.
template <int R>
__device__ __forceinline__ void MarkTile(const Forward& f, const Axes<R>& axes,
                                         const TapList<R>& taps, const Tile& tile,
                                         uint32_t* bitmap) {
  for (int i = threadIdx.x; i < f.tile / 32; i += kTileThreads) bitmap[i] = 0;
  if (!__syncthreads_or(ReadsAny(f, axes, taps, tile))) return;
  const StoredSites stored(f.map, tile.item);
  const uint32_t begin = static_cast<uint32_t>(tile.begin), end = static_cast<uint32_t>(tile.end);
  const uint32_t width = axes.output[R - 1], pieces = (width + 31) / 32;  // of a row
  const uint32_t first_row = begin / width, rows = (end - 1) / width + 1 - first_row;
  for (uint32_t t = threadIdx.x; t < rows * pieces; t += kTileThreads) {
    const uint32_t row = t / pieces, row_begin = (first_row + row) * width;
    const uint32_t piece = row_begin + (t - row * pieces) * 32;
    const uint32_t from = max(piece, begin), to = min(min(piece + 32, row_begin + width), end);
    if (from >= to) continue;
    const ReadSite<R> first(axes, f.map, from);
    const uint32_t bits = ReachedBits(stored, axes, taps, first, static_cast<int>(to - from));
    const uint32_t at = from - begin, shift = at & 31;
    if (bits << shift) atomicOr(&bitmap[at >> 5], bits << shift);
    if (shift > 0 && bits >> (32 - shift)) atomicOr(&bitmap[(at >> 5) + 1], bits >> (32 - shift));
  }
  __syncthreads();
}

}  // namespace
}  // namespace ilajax
