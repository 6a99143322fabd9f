// The stored entries of a sample in site-major form, for look-ups by key.
//
//   words    {bits, first}    for each 32 sites: which of them any channel stores, and the number
//                             of the first one's record
//   records  {mask, offset}   for each stored site: which channels store it, and where their values
//                             begin; the highest bit of the offset tells that one is inf or NaN
//   values   f32              for each record its channels' values, one behind the other
//
// So a look-up costs one load where nothing is stored, whatever the number of channels, and a hit
// finds the values of all channels side by side. Channels go in groups of 32, the width of a mask.
// Entries whose value is 0 are left out: a zero factor adds nothing.
//
// The map covers the sites [begin, begin + sites) of the grid, a slab of it where memory is short.
// Built in one pass: a block takes kMapChunk sites, finds each channel's entries by search, and
// knows where its records and values begin from the searches alone: before them stand at most as
// many as the channels have entries below. Whatever the keys, everything stays inside its buffers.
// Of a channel's entries with one key, which breaks its contract, any one wins, by the order of
// threads.

#pragma once

#include <algorithm>

#include "xla_kernels/common/block.cuh"
#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {

constexpr int kMapGroup = 32;    // channels of a mask
constexpr int kMapChunk = 8192;  // sites of a block
constexpr int kMapThreads = 256;
constexpr uint32_t kNotFinite = 0x80000000u;
constexpr int kMapWords = kMapChunk / 32;
static_assert(kMapWords == kMapThreads, "a thread counts the sites of one word");

struct SiteMap {
  int channels = 0;
  int slots = 0;      // entries of a channel that the map can hold
  int64_t begin = 0;  // the first site covered
  int64_t sites = 0;  // covered: at most as many as when Carve was called
  int64_t words_each = 0;
  uint2* words = nullptr;
  uint2* records = nullptr;
  float* values = nullptr;

  ILAJAX_HOST_DEVICE int groups() const { return (channels + kMapGroup - 1) / kMapGroup; }
  ILAJAX_HOST_DEVICE int group_channels(int group) const {
    return min(kMapGroup, channels - group * kMapGroup);
  }
  // The entries of a group that the map can hold.
  ILAJAX_HOST_DEVICE int64_t capacity(int group) const {
    return int64_t{slots} * group_channels(group);
  }
  // Where an (item, group) begins in `words`, and in `records` and `values`.
  ILAJAX_HOST_DEVICE int64_t Words(int item, int group) const {
    return (int64_t{item} * groups() + group) * words_each;
  }
  ILAJAX_HOST_DEVICE int64_t Records(int item, int group) const {
    return (int64_t{item} * channels + group * kMapGroup) * slots;
  }

  // Whether a chunk of an item, of those that BuildSiteMap takes, has any entry.
  __device__ bool StoresAny(int item, int64_t chunk) const {
    const int64_t first = chunk * kMapWords;
    const int64_t last = min(first + kMapWords, (sites + 31) / 32) - 1;
    for (int g = 0; g < groups(); ++g) {
      const uint2* each = words + Words(item, g);
      if (each[last].y + __popc(each[last].x) != each[first].y) return true;
    }
    return false;
  }

  void Carve(Carver& carver, int64_t items) {
    words_each = CeilDiv(sites, 32);
    words = carver.Take<uint2>(items, groups(), words_each);
    records = carver.Take<uint2>(items, channels, slots);
    values = carver.Take<float>(items, channels, slots);
  }

  static int64_t Chunks(int64_t sites) { return CeilDiv(sites, kMapChunk); }
  static size_t SharedBytes() { return (kMapChunk + kMapWords) * sizeof(uint32_t); }
};

// One (item, group) of a map.
struct SiteMapView {
  const uint2* words;
  const uint2* records;
  const float* values;
  uint32_t sites, capacity;

  SiteMapView() = default;
  __device__ SiteMapView(const SiteMap& map, int item, int group)
      : words(Kept(map.words + map.Words(item, group))),
        records(Kept(map.records + map.Records(item, group))),
        values(Kept(map.values + map.Records(item, group))),
        sites(static_cast<uint32_t>(map.sites)),
        capacity(Kept(static_cast<uint32_t>(min(map.capacity(group), int64_t{0xffffffff})))) {}

  // The record {mask, offset} of a site, counted from the map's first; mask 0 where none is stored.
  __device__ uint2 Find(uint32_t site) const {
    if (site >= sites) return make_uint2(0, 0);
    const uint2 word = words[site >> 5];
    const uint32_t bit = 1u << (site & 31);
    if (!(word.x & bit)) return make_uint2(0, 0);
    const uint32_t record = word.y + __popc(word.x & (bit - 1));
    return record < capacity ? records[record] : make_uint2(0, 0);
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

// The entries of one chunk of one (item, group), found by a block; all of its kMapThreads threads
// call FindRanges and ForEach.
template <typename T>
struct ChunkEntries {
  // In shared memory.
  struct Ranges {
    int first[kMapGroup];      // of a channel's keys
    int begin[kMapGroup + 1];  // of a channel, among the chunk's entries
    int before;                // entries in front of the chunk's, as far as the map covers them
  };

  Ranges& ranges;
  int channels, slots;
  int64_t begin, end;  // sites
  const int32_t* keys;
  const T* values;
  int64_t key_step;  // from one channel to the next

  __device__ __forceinline__ ChunkEntries(const SiteMap& map, const SiteMapInput<T>& in, int item,
                                          int group, int64_t chunk, Ranges& ranges)
      : ranges(ranges), channels(map.group_channels(group)), slots(in.slots) {
    begin = map.begin + chunk * kMapChunk;
    end = min(begin + kMapChunk, map.begin + map.sites);
    const int64_t head = int64_t{item} * map.channels + group * kMapGroup;
    keys = in.keys + (in.shared ? int64_t{item} : head) * in.slots;
    values = in.values + head * in.slots;
    key_step = in.shared ? 0 : in.slots;
  }

  __device__ __forceinline__ void FindRanges(int64_t map_begin) const {
    if (threadIdx.x == 0) ranges.before = 0;
    __syncthreads();
    for (int c = threadIdx.x >> 5; c < channels; c += kMapThreads / 32) {
      const int32_t* key = keys + c * key_step;
      const int low = map_begin > 0 ? WarpLowerBound(key, slots, map_begin) : 0;
      const int first = WarpLowerBound(key, slots, begin);
      const int last = WarpLowerBound(key, slots, end);
      if ((threadIdx.x & 31) == 0) {
        ranges.first[c] = first;
        ranges.begin[c + 1] = max(last - first, 0);
        atomicAdd(&ranges.before, max(first - low, 0));
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      ranges.begin[0] = 0;
      for (int c = 0; c < channels; ++c) ranges.begin[c + 1] += ranges.begin[c];
    }
    __syncthreads();
  }

  // Calls f(channel, site of the chunk, value) for each entry.
  template <typename F>
  __device__ __forceinline__ void ForEach(F&& f) const {
    int c = 0;
    for (int t = threadIdx.x; t < ranges.begin[channels]; t += kMapThreads) {
      while (t >= ranges.begin[c + 1]) ++c;
      const int64_t i = ranges.first[c] + (t - ranges.begin[c]);
      const int32_t key = keys[c * key_step + i];
      const float value = static_cast<float>(values[int64_t{c} * slots + i]);
      if (key >= begin && key < end && value != 0.0f) f(c, static_cast<int>(key - begin), value);
    }
  }
};

// Writes the records of a chunk, from number `base`: a thread takes a run of them, and counts where
// their values begin. Returns whether they fit: always, unless keys are broken.
__device__ __forceinline__ bool WriteRecords(const uint32_t* masks, int count, int base,
                                             int64_t capacity, int (&scratch)[kMapThreads / 32],
                                             uint2* records) {
  const int run = (count + kMapThreads - 1) / kMapThreads;
  const int run_begin = min(static_cast<int>(threadIdx.x) * run, count);
  const int run_end = min(run_begin + run, count);
  int stored = 0, all;
  for (int r = run_begin; r < run_end; ++r) stored += __popc(masks[r]);
  int offset = base + BlockExclusiveScan(stored, scratch, all);
  const bool fits = base + count <= capacity && base + all <= capacity;
  for (int r = run_begin; r < run_end; ++r) {
    const int values = __popc(masks[r]);
    if (base + r < capacity) records[r] = fits ? make_uint2(masks[r], offset) : make_uint2(0, 0);
    offset += values;
  }
  return fits;
}

// Builds one chunk of one (item, group); all of a block's kMapThreads threads call it.
template <typename T>
__device__ void BuildSiteMap(const SiteMap& map, const SiteMapInput<T>& in, int item, int group,
                             int64_t chunk, uint32_t* shared) {
  __shared__ typename ChunkEntries<T>::Ranges ranges;
  __shared__ int scratch[kMapThreads / 32];
  __shared__ uint32_t bits[kMapWords];    // [word]: its sites that any channel stores
  uint32_t* masks = shared;               // [record]
  uint32_t* firsts = shared + kMapChunk;  // [word]: its first record
  const ChunkEntries<T> entries(map, in, item, group, chunk, ranges);
  bits[threadIdx.x] = 0;
  entries.FindRanges(map.begin);
  const int base = ranges.before;

  entries.ForEach([&](int, int site, float) { atomicOr(&bits[site >> 5], 1u << (site & 31)); });
  __syncthreads();
  int count;
  const int first = BlockExclusiveScan(__popc(bits[threadIdx.x]), scratch, count);
  firsts[threadIdx.x] = first;
  if (entries.begin + threadIdx.x * 32 < entries.end) {
    map.words[map.Words(item, group) + chunk * kMapWords + threadIdx.x] =
        make_uint2(bits[threadIdx.x], base + first);
  }

  for (int r = threadIdx.x; r < count; r += kMapThreads) masks[r] = 0;
  __syncthreads();
  const auto record_of = [&](int site) {
    return firsts[site >> 5] + __popc(bits[site >> 5] & ((1u << (site & 31)) - 1));
  };
  entries.ForEach([&](int c, int site, float) { atomicOr(&masks[record_of(site)], 1u << c); });
  __syncthreads();
  uint2* records = map.records + map.Records(item, group) + base;
  const bool fits = WriteRecords(masks, count, base, map.capacity(group), scratch, records);
  __syncthreads();

  float* values = map.values + map.Records(item, group);
  if (fits) {
    entries.ForEach([&](int c, int site, float value) {
      uint2& record = records[record_of(site)];
      const uint32_t offset = LoadRelaxed(&record.y) & ~kNotFinite;
      values[offset + __popc(record.x & ((1u << c) - 1))] = value;
      if (!isfinite(value)) atomicOr(&record.y, kNotFinite);
    });
  }
}

}  // namespace ilajax
