// Marks the sites of a tile that stored entries reach: the input's bitmap, dilated; see cuda.cu.

#pragma once

#include "xla_kernels/conv/cuda_tile.cuh"

namespace ilajax {
namespace {

// The input sites that a tile reads: a box, whose rows are taken in words of 32 sites.
template <int R>
struct InputBox {
  int32_t low[R], size[R];

  __device__ void Cover(const Axes<R>& axes, int64_t begin, int64_t end) {
    int32_t first[R], last[R];
    Axes<R>::Unravel(static_cast<uint32_t>(begin), axes.output, first);
    Axes<R>::Unravel(static_cast<uint32_t>(end - 1), axes.output, last);
    bool same = true;
    for (int a = 0; a < R; ++a) {
      const int64_t from = same ? first[a] : 0, to = same ? last[a] : axes.output[a] - 1;
      const int64_t reach = int64_t{axes.window[a] - 1} * axes.dilation[a];
      const int64_t lowest = max(from * axes.stride[a] - axes.low[a], int64_t{0});
      const int64_t highest =
          min(to * axes.stride[a] - axes.low[a] + reach, int64_t{axes.input[a]} - 1);
      low[a] = static_cast<int32_t>(lowest);
      size[a] = static_cast<int32_t>(max(highest - lowest + 1, int64_t{0}));
      same &= first[a] == last[a];
    }
  }

  // Finds the position of the first site of word t; returns how many of the word's sites lie in the
  // row.
  __device__ __forceinline__ int Locate(uint32_t t, uint32_t row_words, int32_t (&p)[R]) const {
    uint32_t row = t / row_words;
    const int x = static_cast<int>(t - row * row_words) * 32;
    p[R - 1] = low[R - 1] + x;
#pragma unroll
    for (int a = R - 2; a >= 0; --a) {
      const uint32_t extent = size[a], above = row / extent;
      p[a] = low[a] + static_cast<int32_t>(row - above * extent);
      row = above;
    }
    return min(32, size[R - 1] - x);
  }
};

// Which of the `count` sites from `key` on any channel stores, wherever the map's words begin.
__device__ __forceinline__ uint32_t StoredBits(const SiteMap& map, int item, uint32_t key,
                                               int count) {
  uint32_t bits = 0;
  const int64_t site = int64_t{key} - map.begin;
  for (int g = 0; g < map.groups(); ++g) {
    const uint2* word = map.words + map.Words(item, g);
    const int64_t w = site >> 5;
    const int shift = static_cast<int>(site & 31);
    if (w >= 0 && w < map.words_each) bits |= word[w].x >> shift;
    if (shift != 0 && w >= -1 && w + 1 < map.words_each) bits |= word[w + 1].x << (32 - shift);
  }
  return count < 32 ? bits & ((1u << count) - 1) : bits;
}

// Finds the row of the output that entries at q reach through a tap, and its first key; false if it
// lies outside.
template <int R>
__device__ __forceinline__ bool ReachedRow(const Axes<R>& axes, const int32_t (&q)[R],
                                           const typename TapList<R>::Entry& tap, int64_t& key) {
  bool inside = true;
  key = 0;
#pragma unroll
  for (int a = 0; a < R - 1; ++a) {
    int32_t o = q[a] - tap.offset[a];
    if (axes.stride[a] != 1) {
      inside &= o % axes.stride[a] == 0;
      o /= axes.stride[a];
    }
    inside &= o >= 0 && o < axes.output[a];
    key += int64_t{o} * axes.output_step[a];
  }
  return inside;
}

// Marks the sites of a word, of which the first is site x of a row, as far as they lie in the row
// and in the tile. The row's first site is site `row` of the tile.
__device__ __forceinline__ void MarkWord(uint32_t word, int x, int width, int64_t row, int sites,
                                         uint32_t* bitmap) {
  const int64_t low = max(-row, int64_t{0}), high = min(sites - row, int64_t{width});
  if (x >= high || x + 32 <= low) return;
  if (x < low) word &= ~uint32_t{0} << (low - x);
  if (x + 32 > high) word &= ~uint32_t{0} >> (x + 32 - high);
  if (word == 0) return;
  const int64_t at = row + x;  // may be negative, by less than 32
  const int shift = static_cast<int>(at & 31);
  const int64_t w = at >> 5;
  const uint32_t lower = word << shift, upper = shift == 0 ? 0 : word >> (32 - shift);
  if (lower != 0) atomicOr(&bitmap[w], lower);
  if (upper != 0) atomicOr(&bitmap[w + 1], upper);
}

// The same where the output has one site for each `stride` positions.
__device__ __forceinline__ void MarkStrided(uint32_t word, int x, int stride, int width,
                                            int64_t row, int sites, uint32_t* bitmap) {
  for (; word != 0; word &= word - 1) {
    const int at = x + __ffs(word) - 1;
    if (at < 0 || at % stride != 0 || at / stride >= width) continue;
    const int64_t site = row + at / stride;
    if (site >= 0 && site < sites) atomicOr(&bitmap[site >> 5], 1u << (site & 31));
  }
}

// Marks what a word of entries reaches; q is the position of its first site plus the padding. Each
// lane of the warp takes a tap.
template <int R>
__device__ __forceinline__ void DilateWord(const Axes<R>& axes, const TapList<R>& taps,
                                           uint32_t word, const int32_t (&q)[R], int64_t begin,
                                           int sites, uint32_t* bitmap) {
  const int width = axes.output[R - 1], stride = axes.stride[R - 1];
  for (int k = threadIdx.x & 31; k < taps.count; k += 32) {
    const auto tap = taps.entries[k];
    int64_t key;
    if (!ReachedRow(axes, q, tap, key)) continue;
    const int x = q[R - 1] - tap.offset[R - 1];
    if (stride == 1) {
      MarkWord(word, x, width, key - begin, sites, bitmap);
    } else {
      MarkStrided(word, x, stride, width, key - begin, sites, bitmap);
    }
  }
}

// Marks the sites of a tile that any stored entry reaches through a live tap. A warp takes 32 words
// of the input at a time, and goes through those that have an entry.
template <int R>
__device__ __forceinline__ void MarkTile(const Forward& f, const Axes<R>& axes,
                                         const TapList<R>& taps, const Tile& tile,
                                         uint32_t* bitmap) {
  __shared__ InputBox<R> box;
  const int lane = threadIdx.x & 31, sites = static_cast<int>(tile.end - tile.begin);
  for (int i = threadIdx.x; i < f.tile / 32; i += kTileThreads) bitmap[i] = 0;
  if (threadIdx.x == 0) box.Cover(axes, tile.begin, tile.end);
  __syncthreads();
  uint32_t words = (box.size[R - 1] + 31) / 32;
  const uint32_t row_words = max(words, 1u);
  for (int a = 0; a < R - 1; ++a) words *= box.size[a];
  for (uint32_t base = (threadIdx.x >> 5) * 32; base < words; base += kTileThreads) {
    int32_t p[R];
    uint32_t bits = 0;
    if (base + lane < words) {
      const int count = box.Locate(base + lane, row_words, p);
      bits = StoredBits(f.map, tile.item, axes.InputKey(p), count);
    }
    for (unsigned pending = __ballot_sync(kWarp, bits != 0); pending; pending &= pending - 1) {
      const int source = __ffs(pending) - 1;
      const uint32_t word = __shfl_sync(kWarp, bits, source);
      int32_t q[R];
#pragma unroll
      for (int a = 0; a < R; ++a) q[a] = __shfl_sync(kWarp, p[a], source) + axes.low[a];
      DilateWord(axes, taps, word, q, tile.begin, sites, bitmap);
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace ilajax
