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
    Axes<R>::Unravel(key, axes.output_size, p);
    Read(axes, map);
  }
  // Of a row of the output the site at `x`.
  __device__ __forceinline__ ReadSite(const Axes<R>& axes, const SiteMap& map, uint32_t row,
                                      uint32_t x) {
    Axes<R>::template Unravel<R - 1>(row, axes.output_size, p);
    p[R - 1] = static_cast<int32_t>(x);
    Read(axes, map);
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

 private:
  __device__ __forceinline__ void Read(const Axes<R>& axes, const SiteMap& map) {
#pragma unroll
    for (int a = 0; a < R; ++a) p[a] = p[a] * axes.stride[a] - axes.low[a];
    flat = axes.InputKey(p) - static_cast<uint32_t>(map.begin);
  }
};

// The positions from x on of a row of the input, 64 at most: those that are inside, and how many
// there are up to the row's end.
struct LineEnds {
  uint64_t inside = 0;
  int end;

  __device__ __forceinline__ LineEnds(int x, int width) : end(min(64, width - x)) {
    if (x > -64 && end > 0) inside = ~uint64_t{0} << max(-x, 0) & ~uint64_t{0} >> (64 - end);
  }
};

// Which sites of an item any channel stores.
struct StoredSites {
  const uint2* words;
  int64_t step;  // from one group of channels to the next
  int groups;

  __device__ __forceinline__ StoredSites(const SiteMap& map, int item)
      : words(Kept(map.words + map.Words(item, 0))), step(map.words_each), groups(map.groups()) {}

  // A bit for each position of a line that begins at `site`, which may lie ahead of the row. There
  // is at least one group.
  __device__ __forceinline__ uint64_t Line(uint32_t site, const LineEnds& ends) const {
    const int first = static_cast<int>(site) >> 5, last_bit = (site & 31) + ends.end - 1;
    const bool reads = first >= 0 && ends.end > 0;
    const uint2* word = words + first;
    uint32_t low = 0, high = 0;
    int rest = groups;
    do {
      const uint32_t a = reads ? word[0].x : 0;
      const uint32_t b = last_bit >= 32 ? word[1].x : 0;
      const uint32_t c = last_bit >= 64 ? word[2].x : 0;
      low |= __funnelshift_r(a, b, site);
      high |= __funnelshift_r(b, c, site);
      word += step;
    } while (--rest > 0);
    return (uint64_t{high} << 32 | low) & ends.inside;
  }
};

// Which of `count` output sites of a row, 32 at most, find an entry through any tap.
template <int R>
__device__ __forceinline__ uint32_t ReachedBits(const StoredSites& stored, const Axes<R>& axes,
                                                const TapList<R>& taps, const ReadSite<R>& first,
                                                int count) {
  const int width = axes.input[R - 1], stride = axes.stride[R - 1], x = first.p[R - 1];
  uint32_t bits = 0;
  if (stride == 1) {
    LineEnds ends(x, width);
    int begin = 0;  // of the ends, as an offset
    for (int k = 0; k < taps.count;) {
      const auto tap = taps.entries[k];
      k += __popc(tap.run);
      if (tap.run_begin() != begin) {
        begin = tap.run_begin();
        ends = LineEnds(x + begin, width);
      }
      if (!first.template Inside<R - 1>(axes, tap)) continue;
      const uint32_t site = first.flat + tap.flat - (tap.offset[R - 1] - begin);
      const uint64_t line = stored.Line(site, ends);
      for (uint32_t rest = tap.run; rest != 0; rest &= rest - 1) {
        bits |= static_cast<uint32_t>(line >> (__ffs(rest) - 1));
      }
    }
  } else {
    for (int k = 0; k < taps.count; ++k) {
      const auto tap = taps.entries[k];
      if (!first.template Inside<R - 1>(axes, tap)) continue;
      for (int i = 0; i < count;) {
        const int ahead = i * stride;
        const LineEnds ends(x + tap.offset[R - 1] + ahead, width);
        const uint64_t line = stored.Line(first.flat + tap.flat + ahead, ends);
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
  const Divisor width = axes.output_size[R - 1], pieces = f.pieces;
  const uint32_t first_row = width.Quotient(begin);
  const uint32_t rows = width.Quotient(end - 1) + 1 - first_row;
  for (uint32_t t = threadIdx.x; t < rows * pieces.value; t += kTileThreads) {
    const uint32_t below = pieces.Quotient(t), row = first_row + below;
    const uint32_t row_begin = row * width.value;
    const uint32_t piece = row_begin + (t - below * pieces.value) * 32;
    const uint32_t from = max(piece, begin);
    const uint32_t to = min(min(piece + 32, row_begin + width.value), end);
    if (from >= to) continue;
    const ReadSite<R> first(axes, f.map, row, from - row_begin);
    const uint32_t bits = ReachedBits(stored, axes, taps, first, static_cast<int>(to - from));
    const uint32_t at = from - begin, shift = at & 31;
    if (bits << shift) atomicOr(&bitmap[at >> 5], bits << shift);
    if (shift > 0 && bits >> (32 - shift)) atomicOr(&bitmap[(at >> 5) + 1], bits >> (32 - shift));
  }
  __syncthreads();
}

}  // namespace
}  // namespace ilajax
