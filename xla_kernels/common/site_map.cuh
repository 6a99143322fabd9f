// The stored entries of a sample in site-major form, for look-ups by key.
//
//   words   {bits, first}    for each 32 sites: which of them any channel stores, and the first
//   one's row rows    {mask, offset}   for each such site: which channels store it, and where their
//   values begin;
//                            the highest bit tells that one of them is inf or NaN
//   values  f32              for each row its channels' values, one behind the other
//
// So a look-up costs one load where nothing is stored, whatever the number of channels, and a hit
// finds the values of all channels side by side. Channels go in groups of 32, the width of a mask.
// Entries whose value is 0 are left out: a zero factor adds nothing.
//
// The map covers the sites [begin, begin + sites) of the grid, a slab of it where memory is short.
// Built in one pass: a block takes kMapChunk sites, finds each channel's entries by search, and
// knows where its rows and values begin from the searches alone: before them stand at most as many
// as the channels have entries below. Whatever the keys, everything stays inside its buffers. Of a
// channel's entries with one key, which breaks its contract, any one wins, by the order of threads.

#ifndef ILAJAX_XLA_KERNELS_COMMON_SITE_MAP_CUH_
#define ILAJAX_XLA_KERNELS_COMMON_SITE_MAP_CUH_

#include <algorithm>
#include <cstdint>

#include "xla_kernels/common/block.cuh"
#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {

constexpr int kMapGroup = 32;    // channels of a mask
constexpr int kMapChunk = 8192;  // sites of a block, as in ilajax/ops/_plans_cuda.py
constexpr int kMapThreads = 256;
constexpr uint32_t kNotFinite = 0x80000000u;
constexpr int kMapWords = kMapChunk / 32;
static_assert(kMapWords == kMapThreads, "a thread counts the sites of one word");

struct SiteMap {
  int channels = 0;
  int slots = 0;      // entries of a channel that the map has room for
  int64_t begin = 0;  // the first site covered
  int64_t sites =
      0;  // the sites covered; the arrays have room for as many as Carve was called with
  int64_t words_each = 0;
  uint2* words = nullptr;
  uint2* rows = nullptr;
  float* values = nullptr;

  ILAJAX_HOST_DEVICE int groups() const { return (channels + kMapGroup - 1) / kMapGroup; }
  ILAJAX_HOST_DEVICE int group_channels(int group) const {
    return min(kMapGroup, channels - group * kMapGroup);
  }
  ILAJAX_HOST_DEVICE int64_t room(int group) const {
    return int64_t{slots} * group_channels(group);
  }
  // Where an (item, group) begins in `words`, and in `rows` and `values`.
  ILAJAX_HOST_DEVICE int64_t Words(int item, int group) const {
    return (int64_t{item} * groups() + group) * words_each;
  }
  ILAJAX_HOST_DEVICE int64_t Rows(int item, int group) const {
    return (int64_t{item} * channels + group * kMapGroup) * slots;
  }

  void Carve(Carver& carver, int64_t items) {
    words_each = CeilDiv(sites, 32);
    words = carver.Take<uint2>(items * groups() * words_each);
    rows = carver.Take<uint2>(items * channels * slots);
    values = carver.Take<float>(items * channels * slots);
  }

  static int64_t Chunks(int64_t sites) { return CeilDiv(sites, kMapChunk); }
  static size_t SharedBytes() { return (kMapChunk + kMapWords) * sizeof(uint32_t); }
};

// One (item, group) of a map.
struct SiteMapView {
  const uint2* words;
  const uint2* rows;
  const float* values;
  uint32_t sites, room;

  __device__ SiteMapView(const SiteMap& map, int item, int group)
      : words(map.words + map.Words(item, group)),
        rows(map.rows + map.Rows(item, group)),
        values(map.values + map.Rows(item, group)),
        sites(static_cast<uint32_t>(map.sites)),
        room(static_cast<uint32_t>(min(map.room(group), int64_t{0xffffffff}))) {}

  // The row {mask, offset} of a site counted from the map's first; mask 0 where nothing is stored.
  __device__ uint2 Find(uint32_t site) const {
    if (site >= sites) return make_uint2(0, 0);
    const uint2 word = words[site >> 5];
    const uint32_t bit = 1u << (site & 31);
    if (!(word.x & bit)) return make_uint2(0, 0);
    const uint32_t row = word.y + __popc(word.x & (bit - 1));
    return row < room ? rows[row] : make_uint2(0, 0);
  }
};

// What a map is built from: keys s32[B, C or 1, K] and values T[B, C, K], the item at `item` first.
template <typename T>
struct SiteMapInput {
  const int32_t* keys;
  const T* values;
  int slots;
  bool shared;
};

// Builds one chunk of one (item, group); all of a block's kMapThreads threads call it.
template <typename T>
__device__ void BuildSiteMap(const SiteMap& map, const SiteMapInput<T>& in, int item, int group,
                             int64_t chunk, uint32_t* shared) {
  uint32_t* masks = shared;             // [row]
  uint32_t* bits = shared + kMapChunk;  // [word], then the first row of the word
  __shared__ int first[kMapGroup], count[kMapGroup + 1], scratch[kMapThreads / 32];
  __shared__ int before[2];
  __shared__ uint32_t word_bits[kMapWords];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int channels = map.group_channels(group);
  const int64_t begin = map.begin + chunk * kMapChunk;
  const int64_t end = min(begin + kMapChunk, map.begin + map.sites);
  const int64_t head = int64_t{item} * map.channels + group * kMapGroup;
  const int32_t* keys = in.keys + (in.shared ? int64_t{item} : head) * in.slots;
  const T* values = in.values + head * in.slots;
  const int64_t key_step = in.shared ? 0 : in.slots;

  // The range of each channel's entries; how many of the map's entries lie before it.
  if (threadIdx.x == 0) before[0] = 0;
  bits[threadIdx.x] = 0;
  __syncthreads();
  for (int c = warp; c < channels; c += kMapThreads / 32) {
    const int32_t* key = keys + c * key_step;
    const int low = map.begin > 0 ? WarpLowerBound(key, in.slots, map.begin) : 0;
    const int a = WarpLowerBound(key, in.slots, begin);
    const int b = WarpLowerBound(key, in.slots, end);
    if (lane == 0) {
      first[c] = a;
      count[c + 1] = max(b - a, 0);
      atomicAdd(&before[0], max(a - low, 0));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    count[0] = 0;
    for (int c = 0; c < channels; ++c) count[c + 1] += count[c];
  }
  __syncthreads();
  const int base = before[0];

  // Calls f(channel, site of the chunk, value) for each entry in range.
  const auto for_each = [&](auto&& f) {
    int c = 0;
    for (int t = threadIdx.x; t < count[channels]; t += kMapThreads) {
      while (t >= count[c + 1]) ++c;
      const int64_t i = first[c] + (t - count[c]);
      const int32_t key = keys[c * key_step + i];
      const float value = static_cast<float>(values[int64_t{c} * in.slots + i]);
      if (key >= begin && key < end && value != 0.0f) f(c, static_cast<int>(key - begin), value);
    }
  };
  for_each([&](int, int site, float) { atomicOr(&bits[site >> 5], 1u << (site & 31)); });
  __syncthreads();
  const uint32_t mine = bits[threadIdx.x];
  int rows;
  const int row = BlockExclusiveScan(__popc(mine), scratch, rows);
  word_bits[threadIdx.x] = mine;
  bits[threadIdx.x] = row;
  if (begin + threadIdx.x * 32 < end) {
    map.words[map.Words(item, group) + chunk * kMapWords + threadIdx.x] =
        make_uint2(mine, base + row);
  }
  for (int r = threadIdx.x; r < rows; r += kMapThreads) masks[r] = 0;
  __syncthreads();
  const auto row_of = [&](int site) {
    return bits[site >> 5] + __popc(word_bits[site >> 5] & ((1u << (site & 31)) - 1));
  };
  for_each([&](int c, int site, float) { atomicOr(&masks[row_of(site)], 1u << c); });
  __syncthreads();

  // Where the values of a row begin: a thread counts a run of rows.
  const int run = (rows + kMapThreads - 1) / kMapThreads;
  const int run_begin = min(static_cast<int>(threadIdx.x) * run, rows);
  const int run_end = min(run_begin + run, rows);
  int stored = 0, all;
  for (int r = run_begin; r < run_end; ++r) stored += __popc(masks[r]);
  int offset = base + BlockExclusiveScan(stored, scratch, all);
  const int64_t room = map.room(group);
  const bool fits = base + rows <= room && base + all <= room;  // always, unless keys are broken
  uint2* out_rows = map.rows + map.Rows(item, group) + base;
  float* out_values = map.values + map.Rows(item, group);
  for (int r = run_begin; r < run_end; ++r) {
    const int values_of_row = __popc(masks[r]);
    if (base + r < room) out_rows[r] = fits ? make_uint2(masks[r], offset) : make_uint2(0, 0);
    offset += values_of_row;
  }
  __syncthreads();
  if (fits) {
    for_each([&](int c, int site, float value) {
      uint2& place = out_rows[row_of(site)];
      out_values[(place.y & ~kNotFinite) + __popc(place.x & ((1u << c) - 1))] = value;
      if (!isfinite(value)) atomicOr(&place.y, kNotFinite);
    });
  }
}

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_SITE_MAP_CUH_
