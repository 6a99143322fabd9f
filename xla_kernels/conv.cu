// Direct sparse convolution with k-selection on the GPU, and its gradient.
//
// Forward, five launches where float32 responses may have to be cut to the capacity, four with
// 16-bit values, three where nothing can be cut (and these once a chunk of the batch, where the
// workspace is short):
//
//   1 PrepareKernel   the input as a site map (site_map.cuh), the filters as dense rows, zeroed
//   counters 2 TileKernel      kRespond: a block takes a tile of consecutive output sites of one
//   item and up to 8
//                     output channels. It dilates the map's bitmap, a word at a time, into a bitmap
//                     of the sites in reach. Then a thread has a site and sums its responses in
//                     registers, tap by tap and channel by channel, all threads of a warp at the
//                     same weights. Ranks go to a histogram of their 11 highest bits in shared
//                     memory, then to that of the segment; the last block of a segment finds the
//                     digit at which the capacity cuts.
//   3 TileKernel      kRefine, once or twice: the next digits, among candidates that share the
//   first. 4 TileKernel      kEmit: counts what a tile keeps, adds up the tiles before it, writes
//   in key order.
//
// The responses of 2 are kept in a pool where it has room (a row of channels for each site in
// reach) and computed again by 3 and 4 where it has not, with the same bits. So memory is bounded
// by the workspace, and traffic is the input, the output, and the pool: written once, read twice or
// more. No grid is ever allocated but the map: two bits a site.
//
// Backward, three launches: PrepareKernel makes the site map of the kept outputs' cotangents; then
// GradientKernel has a thread for each stored input, which looks up the cotangents that it reaches
// tap by tap, sums its own gradient in a register and those of the weights over the warp;
// FinishKernel adds the partial sums of weights and bias in their order.
//
// All sums have a fixed order, and what integer atomics count does not depend on theirs. Results
// repeat; but of entries or weights that share a key, which breaks their contract, any one wins.

#include <algorithm>
#include <cstdint>

#include "xla_kernels/common/axes.cuh"
#include "xla_kernels/common/block.cuh"
#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/site_map.cuh"
#include "xla_kernels/common/workspace.h"
#include "xla_kernels/conv.h"

namespace ilajax {
namespace {

// Reads what other blocks of this launch have written.
__device__ uint32_t LoadFresh(const uint32_t* p) {
  return *static_cast<const volatile uint32_t*>(p);
}

// --- Launch 1: site map, filters, zeros
// ---------------------------------------------------------------

template <typename T>
struct Prepare {
  SiteMap map;
  SiteMapInput<T> input;
  int items;
  DenseFilters filters;
  const int32_t* kernel_keys;
  const float* weights;
  int weight_count;
  bool fill_filters;
  uint32_t* zeros;
  int64_t zero_count;

  ILAJAX_HOST_DEVICE int64_t map_blocks() const {
    return items * map.groups() * ((map.sites + kMapChunk - 1) / kMapChunk);
  }
  ILAJAX_HOST_DEVICE int64_t filter_blocks() const {
    return fill_filters ? filters.blocks() * filters.in_channels : 0;
  }
  static constexpr int64_t kZerosOfBlock = 16 * kMapThreads;
  ILAJAX_HOST_DEVICE int64_t zero_blocks() const {
    return (zero_count + kZerosOfBlock - 1) / kZerosOfBlock;
  }
};

template <typename T>
__global__ void __launch_bounds__(kMapThreads, 5) PrepareKernel(Prepare<T> p) {
  uint4* shared = DynamicShared();
  uint32_t task = blockIdx.x;
  if (task < p.map_blocks()) {
    const uint32_t chunks = static_cast<uint32_t>((p.map.sites + kMapChunk - 1) / kMapChunk);
    const int segment = static_cast<int>(task / chunks);
    BuildSiteMap(p.map, p.input, segment / p.map.groups(), segment % p.map.groups(), task % chunks,
                 reinterpret_cast<uint32_t*>(shared));
    return;
  }
  task -= static_cast<uint32_t>(p.map_blocks());
  if (task < p.filter_blocks()) {
    p.filters.Fill(static_cast<int>(task / p.filters.in_channels),
                   static_cast<int>(task % p.filters.in_channels), p.kernel_keys, p.weights,
                   p.weight_count);
    return;
  }
  task -= static_cast<uint32_t>(p.filter_blocks());
  const int64_t begin = int64_t{task} * p.kZerosOfBlock;
  const int64_t end = min(begin + p.kZerosOfBlock, p.zero_count);
  for (int64_t i = begin + threadIdx.x; i < end; i += kMapThreads) p.zeros[i] = 0;
}

template <typename T>
ffi::Error LaunchPrepare(cudaStream_t stream, const Prepare<T>& p) {
  const int64_t blocks = p.map_blocks() + p.filter_blocks() + p.zero_blocks();
  return LaunchEach<PrepareKernel<T>>(blocks, kMapThreads, SiteMap::SharedBytes(), stream, p);
}

// --- Launches 2 and on: tiles of output sites
// ---------------------------------------------------------

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / 32;
constexpr int kMaxTile = 8192;  // sites; as in ilajax/ops/_plans_cuda.py
constexpr int kTilesOfRun = 64;
constexpr int kBins = 2048;
constexpr int kBinWords =
    kBins / 2 + 4;          // two counters a word; the rest spreads channels over banks
constexpr int kBlock = 8;   // output channels of a block
constexpr int kSums = 3;    // of a tile: candidates, kept above the threshold, ties
constexpr int kLevels = 3;  // digits of a rank: 11, 11 and 10 bits
constexpr uint32_t kNone =
    0xffffffffu;  // in the pool: no candidate. A NaN's bits, which no NaN has there
constexpr uint32_t kUncached = 0xffffffffu;

ILAJAX_HOST_DEVICE constexpr int LevelShift(int level) {
  return level == 0 ? 21 : level == 1 ? 10 : 0;
}
ILAJAX_HOST_DEVICE constexpr int LevelBits(int level) { return level == 2 ? 10 : 11; }

enum class Pass { kRespond, kRefine, kEmit };

// Where a segment is cut: candidates whose rank exceeds `threshold` are kept, and the `ties` lowest
// keys of that rank. Zeros before the first pass.
struct Cut {
  uint32_t threshold;
  int32_t ties;
  int32_t candidates;
  int32_t cuts;
};

struct Forward {
  SiteMap map;
  DenseFilters filters;
  const float* bias;
  int32_t* out_keys;
  void* out_values;
  int32_t* responses;
  ffi::DataType dtype;
  Select select;
  int out_channels, capacity;
  int64_t output_sites;

  int first_item, items;              // the chunk of the batch
  int64_t slab_begin, slab_end;       // its output sites
  int tile;                           // sites of a tile
  int tiles, first_tile, slab_tiles;  // of an item; of the slab
  int ticket_base;                    // blocks of launches before this one that drew tickets
  int level, low_shift;               // the digit of this pass; bits of a rank that carry nothing
  int levels;
  bool weights_in_shared;
  int64_t table_bytes;  // of shared memory: taps, and the weights

  // Zeroed by launch 1.
  uint32_t* histograms;  // [item][channel][bin]
  Cut* cuts;             // [item][channel]
  uint32_t* finished;    // [item][block of channels]
  uint32_t* tickets;     // [1]
  uint32_t* pool_used;   // [1]
  uint32_t* run_sums;    // [item][channel][run of tiles][kSums]
  uint32_t* run_done;    // [item][block of channels][run]
  uint32_t* tile_done;   // [item][block][tile]

  uint32_t* tile_sums;  // [item][channel][tile][kSums]
  uint16_t* warp_sums;  // [item][block][tile][warp][channel of the block]: candidates
  uint2* tile_rows;     // [item][block][tile]: offset in the pool or kUncached, and rows
  uint32_t pool_rows;
  uint32_t* pool_keys;    // [row]
  uint32_t* pool_values;  // [row][channel of the block]: bits of the rounded value, or kNone

  ILAJAX_HOST_DEVICE int runs() const { return (tiles + kTilesOfRun - 1) / kTilesOfRun; }
};

__device__ float Round(float value, ffi::DataType dtype) {
  if (dtype == ffi::DataType::BF16) return static_cast<float>(BFloat16(value));
  if (dtype == ffi::DataType::F16) return static_cast<float>(Float16(value));
  return value;
}

__device__ void Store(void* out, int64_t i, float value, ffi::DataType dtype) {
  if (dtype == ffi::DataType::BF16) {
    static_cast<BFloat16*>(out)[i] = BFloat16(value);
  } else if (dtype == ffi::DataType::F16) {
    static_cast<Float16*>(out)[i] = Float16(value);
  } else {
    static_cast<float*>(out)[i] = value;
  }
}

// The rank in 32 bits that all carry information: the highest bit of positive ranks is always set.
__device__ uint32_t Rank(uint32_t bits, const Forward& f) {
  return RankBits(BitsFloat(bits), f.select) << (f.select == Select::kValue ? 0 : 1) >>
         f.low_shift << f.low_shift;
}

// Marks the sites of the tile [begin, end) that any stored entry reaches through a live tap. A warp
// takes 32 words of the rows within reach; for each with an entry its lanes take a tap each.
template <int R>
__device__ void MarkTile(const Forward& f, const Axes<R>& axes, const TapList<R>& taps, int item,
                         int64_t begin, int64_t end, uint32_t* bitmap) {
  __shared__ int32_t box_low[R], box_size[R];
  const int lane = threadIdx.x & 31;
  const int sites = static_cast<int>(end - begin);
  for (int i = threadIdx.x; i < f.tile / 32; i += kTileThreads) bitmap[i] = 0;
  if (threadIdx.x == 0) {
    int32_t first[R], last[R];
    Axes<R>::Unravel(static_cast<uint32_t>(begin), axes.output, first);
    Axes<R>::Unravel(static_cast<uint32_t>(end - 1), axes.output, last);
    bool same = true;
    for (int a = 0; a < R; ++a) {
      const int64_t from = same ? first[a] : 0, to = same ? last[a] : axes.output[a] - 1;
      const int64_t reach = int64_t{axes.window[a] - 1} * axes.dilation[a];
      const int64_t low = max(from * axes.stride[a] - axes.low[a], int64_t{0});
      const int64_t high =
          min(to * axes.stride[a] - axes.low[a] + reach, int64_t{axes.input[a]} - 1);
      box_low[a] = static_cast<int32_t>(low);
      box_size[a] = static_cast<int32_t>(max(high - low + 1, int64_t{0}));
      same &= first[a] == last[a];
    }
  }
  __syncthreads();
  uint32_t words = (box_size[R - 1] + 31) / 32;
  const uint32_t row_words = max(words, 1u);
  for (int a = 0; a < R - 1; ++a) words *= box_size[a];
  for (uint32_t base = (threadIdx.x >> 5) * 32; base < words; base += kTileThreads) {
    // 32 sites of a row from its x on, wherever the map's words begin.
    int32_t p[R];
    uint32_t bits = 0;
    const uint32_t t = base + lane;
    if (t < words) {
      uint32_t row = t / row_words;
      const int x = static_cast<int>(t - row * row_words) * 32;
      p[R - 1] = box_low[R - 1] + x;
      uint32_t key = p[R - 1];
#pragma unroll
      for (int a = R - 2; a >= 0; --a) {
        const uint32_t size = box_size[a], above = row / size;
        p[a] = box_low[a] + static_cast<int32_t>(row - above * size);
        row = above;
        key += static_cast<uint32_t>(p[a]) * axes.input_step[a];
      }
      const int64_t site = int64_t{key} - f.map.begin;
      const int count = min(32, box_size[R - 1] - x);
      for (int g = 0; g < f.map.groups(); ++g) {
        const uint2* word = f.map.words + f.map.Words(item, g);
        const int64_t w = site >> 5;
        const int shift = static_cast<int>(site & 31);
        if (w >= 0 && w < f.map.words_each) bits |= word[w].x >> shift;
        if (shift != 0 && w >= -1 && w + 1 < f.map.words_each)
          bits |= word[w + 1].x << (32 - shift);
      }
      if (count < 32) bits &= (1u << count) - 1;
    }
    for (unsigned pending = __ballot_sync(kWarp, bits != 0); pending; pending &= pending - 1) {
      const int source = __ffs(pending) - 1;
      const uint32_t entry = __shfl_sync(kWarp, bits, source);
      int32_t q[R];
#pragma unroll
      for (int a = 0; a < R; ++a) q[a] = __shfl_sync(kWarp, p[a], source) + axes.low[a];
      for (int k = lane; k < taps.count; k += 32) {
        const auto tap = taps.entries[k];
        int64_t key = 0;
        bool inside = true;
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
        if (!inside) continue;
        const int x = q[R - 1] - tap.offset[R - 1];
        const int width = axes.output[R - 1], stride = axes.stride[R - 1];
        const int64_t row_site = key - begin;  // of x = 0, counted from the tile's first
        if (stride == 1) {
          // The part of the word that lies in the row and in the tile.
          const int64_t low = max(-row_site, int64_t{0}),
                        high = min(sites - row_site, int64_t{width});
          uint32_t m = entry;
          if (x >= high || x + 32 <= low) continue;
          if (x < low) m &= ~uint32_t{0} << (low - x);
          if (x + 32 > high) m &= ~uint32_t{0} >> (x + 32 - high);
          if (m == 0) continue;
          const int64_t at = row_site + x;  // may be negative, by less than 32
          const int shift = static_cast<int>(at & 31);
          const int64_t w = at >> 5;
          const uint32_t lower = m << shift, upper = shift == 0 ? 0 : m >> (32 - shift);
          if (lower != 0) atomicOr(&bitmap[w], lower);
          if (upper != 0) atomicOr(&bitmap[w + 1], upper);
        } else {
          for (uint32_t m = entry; m != 0; m &= m - 1) {
            const int at = x + __ffs(m) - 1;
            if (at < 0 || at % stride != 0 || at / stride >= width) continue;
            const int64_t site = row_site + at / stride;
            if (site >= 0 && site < sites) atomicOr(&bitmap[site >> 5], 1u << (site & 31));
          }
        }
      }
    }
  }
  __syncthreads();
}

// sums += x * weights, where a zero weight adds nothing: not even against inf or NaN.
__device__ void AddProducts(float (&sums)[kBlock], float x, const float4* weights, bool finite) {
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

// The responses of a thread's output site in the channels of the block. Every thread of the warp
// calls it. Summed in the order of input groups, taps, channels.
//
// With one or two input channels most of the time goes to look-ups: a thread first collects which
// taps find anything, then goes through its own. With more, products count: all threads of the warp
// are at the same tap and channel, and read its weights at once.
template <int R>
__device__ void Respond(const Forward& f, const Axes<R>& axes, const TapList<R>& taps,
                        const float* weights, int item, bool active, uint32_t key,
                        float (&sums)[kBlock]) {
  int32_t p[R];
  uint32_t flat = 0;
  Axes<R>::Unravel(key, axes.output, p);
#pragma unroll
  for (int a = 0; a < R; ++a) {
    p[a] = p[a] * axes.stride[a] - axes.low[a];
    flat += static_cast<uint32_t>(p[a]) * axes.input_step[a];
  }
  flat -= static_cast<uint32_t>(f.map.begin);
#pragma unroll
  for (int j = 0; j < kBlock; ++j) sums[j] = 0.0f;
  for (int g = 0; g < f.map.groups(); ++g) {
    const SiteMapView map(f.map, item, g);
    const float* group_weights = weights + int64_t{g} * kMapGroup * taps.taps * kBlock;
    const auto is_inside = [&](const typename TapList<R>::Entry& tap) {
      bool inside = active;
#pragma unroll
      for (int a = 0; a < R; ++a) {
        inside &=
            static_cast<uint32_t>(p[a] + tap.offset[a]) < static_cast<uint32_t>(axes.input[a]);
      }
      return inside;
    };
    if (f.map.channels <= 2) {
      for (int base = 0; base < taps.count; base += 32) {
        uint32_t hits = 0;
#pragma unroll 4
        for (int k = 0; k < min(32, taps.count - base); ++k) {
          const auto tap = taps.entries[base + k];
          const uint32_t site = flat + tap.flat;
          if (is_inside(tap) && site < map.sites) {
            hits |= (map.words[site >> 5].x >> (site & 31) & 1) << k;
          }
        }
        for (; hits != 0; hits &= hits - 1) {
          const auto tap = taps.entries[base + __ffs(hits) - 1];
          const uint2 row = map.Find(flat + tap.flat);
          const float* values = map.values + (row.y & ~kNotFinite);
          const float4* tap_weights =
              reinterpret_cast<const float4*>(group_weights + tap.tap * kBlock);
          for (uint32_t rest = row.x & taps.Live(g, tap.tap); rest != 0; rest &= rest - 1) {
            const int c = __ffs(rest) - 1;
            AddProducts(sums, values[__popc(row.x & ((1u << c) - 1))],
                        tap_weights + c * taps.taps * 2, !(row.y & kNotFinite));
          }
        }
      }
      continue;
    }
    for (int k = 0; k < taps.count; ++k) {
      const auto tap = taps.entries[k];
      uint2 row = make_uint2(0, 0);
      if (is_inside(tap)) row = map.Find(flat + tap.flat);
      const uint32_t live = taps.Live(g, tap.tap);
      if (!__any_sync(kWarp, (row.x & live) != 0)) continue;
      const float* values = map.values + (row.y & ~kNotFinite);
      const float4* tap_weights = reinterpret_cast<const float4*>(group_weights + tap.tap * kBlock);
      for (uint32_t rest = live; rest != 0; rest &= rest - 1) {
        const int c = __ffs(rest) - 1;
        if (!(row.x >> c & 1)) continue;
        AddProducts(sums, values[__popc(row.x & ((1u << c) - 1))], tap_weights + c * taps.taps * 2,
                    !(row.y & kNotFinite));
      }
    }
  }
}

// Finds the next digit of a segment's threshold in its histogram, which it clears. A warp calls it.
__device__ void FindDigit(const Forward& f, int level, uint32_t* histogram, Cut* cut,
                          int32_t* responses) {
  constexpr int kEach = kBins / 32;
  const int lane = threadIdx.x & 31;
  const int top = kBins - 1 - lane * kEach;  // a lane's bins go down from here
  int sum = 0;
#pragma unroll 8
  for (int i = 0; i < kEach; ++i) sum += static_cast<int>(LoadFresh(&histogram[top - i]));
  const int above = WarpExclusiveScan(sum);
  const int total = __shfl_sync(kWarp, above + sum, 31);
  int ties = level == 0 ? f.capacity : cut->ties;
  __syncwarp();  // before one lane writes what all have read
  if (level == 0 && lane == 0) {
    *responses = total;
    cut->candidates = total;
    cut->cuts = total > ties;
  }
  if (total > ties || level > 0) {
    if (above < ties && above + sum >= ties) {
      ties -= above;
      int bin = top;
      for (; static_cast<int>(LoadFresh(&histogram[bin])) < ties; --bin) {
        ties -= static_cast<int>(LoadFresh(&histogram[bin]));
      }
      cut->ties = ties;
      cut->threshold |= static_cast<uint32_t>(bin) << LevelShift(level);
    }
    __syncwarp();
    for (int i = lane; i < kBins; i += 32) histogram[i] = 0;
  }
}

// Blocks of a multiprocessor. With three, nothing is spilled below four axes but by the last pass,
// whose registers hold where the channels of its rows go, too.
constexpr int TileBlocks(int rank, Pass pass) { return rank <= 3 && pass != Pass::kEmit ? 3 : 2; }

template <int R, Pass P>
__global__ void __launch_bounds__(kTileThreads, TileBlocks(R, P))
    TileKernel(Forward f, Axes<R> axes) {
  uint4* shared = DynamicShared();
  __shared__ int scratch[kTileWarps];
  __shared__ uint32_t draw, pool_offset;
  __shared__ Cut cuts[kBlock];
  __shared__ bool any_cut;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

  // Tickets order the blocks of the last pass, which wait for those before them.
  uint32_t task = blockIdx.x;
  if (P == Pass::kEmit) {
    if (threadIdx.x == 0) draw = atomicAdd(f.tickets, 1u);
    __syncthreads();
    task = draw - f.ticket_base;
  }
  const int blocks = f.filters.blocks();
  const int slab_tile = static_cast<int>(task % f.slab_tiles), tile = f.first_tile + slab_tile;
  const int segment = static_cast<int>(task / f.slab_tiles);  // of items and blocks of channels
  const int item = segment / blocks, block = segment % blocks;
  const int channels = min(kBlock, f.out_channels - block * kBlock);
  const int first_channel = item * f.out_channels + block * kBlock;
  const int64_t begin = f.slab_begin + int64_t{slab_tile} * f.tile;
  const int64_t end = min(begin + f.tile, f.slab_end);
  if (P != Pass::kRespond) {
    if (threadIdx.x == 0) any_cut = false;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < channels) {
      cuts[threadIdx.x] = f.cuts[first_channel + threadIdx.x];
      if (cuts[threadIdx.x].cuts) any_cut = true;
    } else if (threadIdx.x < kBlock) {
      cuts[threadIdx.x] = Cut{};
    }
    __syncthreads();
    if (P == Pass::kRefine && !any_cut) return;
  }

  uint4* tables = shared;
  uint32_t* histogram = reinterpret_cast<uint32_t*>(tables + f.table_bytes / sizeof(uint4));
  uint32_t* bitmap = histogram + (P == Pass::kRespond ? kBlock * kBinWords : 0);
  uint32_t* word_rows = bitmap + f.tile / 32;
  uint16_t* row_sites = reinterpret_cast<uint16_t*>(word_rows + f.tile / 32);

  // The rows: sites in reach, from the pool or found again.
  uint2 stored = make_uint2(kUncached, 0);
  uint2* tile_rows = f.tile_rows + int64_t{segment} * f.tiles + tile;
  if (P != Pass::kRespond) stored = *tile_rows;
  const bool cached = P != Pass::kRespond && stored.x != kUncached;
  TapList<R> taps;
  const float* weights = f.filters.weights + f.filters.Row(block, 0) * kBlock;
  int rows = static_cast<int>(stored.y);
  if (!cached) {
    if (P == Pass::kRespond) {
      uint4* bins = reinterpret_cast<uint4*>(histogram);
      for (int i = threadIdx.x; i < kBlock * kBinWords / 4; i += kTileThreads) {
        bins[i] = make_uint4(0, 0, 0, 0);
      }
    }
    taps.Fill(axes, f.filters.live + f.filters.Row(block, 0), f.filters.in_channels, f.filters.taps,
              f.filters.taps, tables);
    if (f.weights_in_shared) {
      const int count = f.filters.in_channels * f.filters.taps * kBlock / 4;
      float4* copy = reinterpret_cast<float4*>(
          tables + TapList<R>::SharedBytes(f.filters.taps, f.map.groups()) / sizeof(uint4));
      for (int i = threadIdx.x; i < count; i += kTileThreads) {
        copy[i] = reinterpret_cast<const float4*>(weights)[i];
      }
      weights = reinterpret_cast<const float*>(copy);
    }
    MarkTile(f, axes, taps, item, begin, end, bitmap);
    const int words = f.tile / 32;
    static_assert(kMaxTile / 32 <= kTileThreads, "a thread counts the sites of one word");
    uint32_t word = static_cast<int>(threadIdx.x) < words ? bitmap[threadIdx.x] : 0;
    int row = BlockExclusiveScan(__popc(word), scratch, rows);
    for (; word != 0; word &= word - 1) {
      row_sites[row++] = static_cast<uint16_t>(threadIdx.x * 32 + __ffs(word) - 1);
    }
  }
  if (P == Pass::kRespond && threadIdx.x == 0) {
    pool_offset = kUncached;
    if (LoadFresh(f.pool_used) < f.pool_rows || rows == 0) {
      const uint32_t offset = rows == 0 ? 0 : atomicAdd(f.pool_used, static_cast<uint32_t>(rows));
      if (rows == 0 || offset + rows <= f.pool_rows) pool_offset = offset;
    }
    *tile_rows = make_uint2(pool_offset, rows);
  }
  __syncthreads();
  const uint32_t at = P == Pass::kRespond ? pool_offset : stored.x;

  // Calls visit(key, bits) for each row; a warp's rows lie together, and its lanes have one each.
  // Lanes without a row, and channels beyond the last, get kNone.
  const int each = ((rows + kTileWarps - 1) / kTileWarps + 31) / 32 * 32;
  const int warp_end = min((warp + 1) * each, rows);
  const auto for_each_row = [&](auto&& visit) {
    for (int r = warp * each; r < warp_end; r += 32) {
      const int row = r + lane;
      const bool active = row < warp_end;
      uint32_t key = 0, bits[kBlock];
      uint4* pool = reinterpret_cast<uint4*>(f.pool_values + int64_t{at + row} * kBlock);
      if (cached) {
        uint4 low = make_uint4(kNone, kNone, kNone, kNone), high = low;
        if (active) {
          key = f.pool_keys[at + row];
          low = pool[0];
          high = pool[1];
        }
        bits[0] = low.x, bits[1] = low.y, bits[2] = low.z, bits[3] = low.w;
        bits[4] = high.x, bits[5] = high.y, bits[6] = high.z, bits[7] = high.w;
      } else {
        if (active) key = static_cast<uint32_t>(begin) + row_sites[row];
        float sums[kBlock];
        Respond<R>(f, axes, taps, weights, item, active, key, sums);
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          bits[j] = kNone;
          if (active && j < channels && sums[j] != 0.0f) {
            const float value = Round(sums[j] + f.bias[block * kBlock + j], f.dtype);
            if (IsCandidate(value, f.select)) {
              bits[j] = value != value ? 0x7fc00000u : FloatBits(value);
            }
          }
        }
        if (P == Pass::kRespond && active && at != kUncached) {
          f.pool_keys[at + row] = key;
          pool[0] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
          pool[1] = make_uint4(bits[4], bits[5], bits[6], bits[7]);
        }
      }
      visit(key, bits);
    }
  };
  // What a tile has of a channel goes to the sums of the tile, and of its run.
  const int run = tile / kTilesOfRun;
  const auto publish = [&](int c, int which, uint32_t sum) {
    f.tile_sums[(int64_t{first_channel + c} * f.tiles + tile) * kSums + which] = sum;
    uint32_t* total = &f.run_sums[(int64_t{first_channel + c} * f.runs() + run) * kSums + which];
    if (sum != 0) atomicAdd(total, sum);
  };

  if constexpr (P != Pass::kEmit) {
    const int shift = LevelShift(f.level), upper = shift + LevelBits(f.level);
    const uint32_t bin_mask = (1u << LevelBits(f.level)) - 1;
    uint32_t* totals = f.histograms + int64_t{first_channel} * kBins;
    if constexpr (P == Pass::kRespond) {
      __shared__ uint32_t sums[kTileWarps][kBlock];
      uint32_t counts[kBlock] = {};
      for_each_row([&](uint32_t, const uint32_t (&bits)[kBlock]) {
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          if (bits[j] == kNone) continue;
          ++counts[j];
          const uint32_t bin = Rank(bits[j], f) >> shift;
          atomicAdd(&histogram[j * kBinWords + (bin >> 1)], 1u << (16 * (bin & 1)));
        }
      });
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        for (int step = 16; step > 0; step /= 2)
          counts[j] += __shfl_xor_sync(kWarp, counts[j], step);
        if (lane == j) sums[warp][j] = counts[j];
      }
      __syncthreads();
      if (threadIdx.x < kTileWarps * kBlock) {
        f.warp_sums[(int64_t{segment} * f.tiles + tile) * kTileWarps * kBlock + threadIdx.x] =
            static_cast<uint16_t>(sums[threadIdx.x / kBlock][threadIdx.x % kBlock]);
      }
      if (static_cast<int>(threadIdx.x) < channels) {
        uint32_t sum = 0;
        for (int w = 0; w < kTileWarps; ++w) sum += sums[w][threadIdx.x];
        publish(threadIdx.x, 0, sum);
      }
      for (int i = threadIdx.x; i < channels * (kBins / 8); i += kTileThreads) {
        const int c = i / (kBins / 8), w = i % (kBins / 8) * 4;
        const uint4 eight = *reinterpret_cast<const uint4*>(&histogram[c * kBinWords + w]);
        const uint32_t two[4] = {eight.x, eight.y, eight.z, eight.w};
        uint32_t* total = &totals[c * kBins + 2 * w];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (two[j] & 0xffff) atomicAdd(&total[2 * j], two[j] & 0xffff);
          if (two[j] >> 16) atomicAdd(&total[2 * j + 1], two[j] >> 16);
        }
      }
    } else {
      // Few candidates share all higher digits, or many that are equal: then one of them adds for
      // all.
      for_each_row([&](uint32_t, const uint32_t (&bits)[kBlock]) {
#pragma unroll
        for (int j = 0; j < kBlock; ++j) {
          const uint32_t rank = Rank(bits[j], f);
          const bool in =
              bits[j] != kNone && cuts[j].cuts && (rank ^ cuts[j].threshold) >> upper == 0;
          const uint32_t all = __ballot_sync(kWarp, in);
          if (all == 0) continue;
          const uint32_t bin = rank >> shift & bin_mask;
          const int leader = __ffs(all) - 1;
          const uint32_t common = __shfl_sync(kWarp, bin, leader);
          const uint32_t same = __ballot_sync(kWarp, in && bin == common);
          if (lane == leader) {
            atomicAdd(&totals[j * kBins + bin], static_cast<uint32_t>(__popc(same)));
          } else if (in && !(same >> lane & 1)) {
            atomicAdd(&totals[j * kBins + bin], 1u);
          }
        }
      });
    }
    // The last block of the segment to get here finds the digits. One thread's fences, between the
    // barriers and its atomic, order what all threads of the block do.
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      draw = atomicAdd(&f.finished[segment], 1u);
      __threadfence();
    }
    __syncthreads();
    if (draw != static_cast<uint32_t>(f.tiles) - 1) return;
    if (threadIdx.x == 0) f.finished[segment] = 0;
    if (warp < channels && (P == Pass::kRespond || cuts[warp].cuts)) {
      const int s = first_channel + warp;
      FindDigit(f, f.level, totals + warp * kBins, &f.cuts[s],
                &f.responses[int64_t{f.first_item} * f.out_channels + s]);
    }
    return;
  }

  // kEmit. What each warp keeps, by channel: above the threshold, and ties. Where nothing is cut
  // the first pass has counted.
  __shared__ uint32_t warp_sums[2][kTileWarps][kBlock];  // then the sums before the warp
  __shared__ uint32_t before[2][kBlock];
  const uint32_t lower_lanes = (1u << lane) - 1;
  const auto is_above = [&](uint32_t bits, int j) {
    return bits != kNone && (!cuts[j].cuts || Rank(bits, f) > cuts[j].threshold);
  };
  const auto is_tie = [&](uint32_t bits, int j) {
    return bits != kNone && cuts[j].cuts && Rank(bits, f) == cuts[j].threshold;
  };
  if (any_cut) {
    uint32_t counts[kBlock] = {};  // two numbers in one: at most 32 * 8192 / 256 rows
    for_each_row([&](uint32_t, const uint32_t (&bits)[kBlock]) {
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        counts[j] += (is_above(bits[j], j) ? 1u : 0u) + (is_tie(bits[j], j) ? 0x10000u : 0u);
      }
    });
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      for (int step = 16; step > 0; step /= 2) counts[j] += __shfl_xor_sync(kWarp, counts[j], step);
      if (lane == j) {
        warp_sums[0][warp][j] = counts[j] & 0xffff;
        warp_sums[1][warp][j] = counts[j] >> 16;
      }
    }
  } else if (threadIdx.x < kTileWarps * kBlock) {
    warp_sums[0][threadIdx.x / kBlock][threadIdx.x % kBlock] =
        f.warp_sums[(int64_t{segment} * f.tiles + tile) * kTileWarps * kBlock + threadIdx.x];
    warp_sums[1][threadIdx.x / kBlock][threadIdx.x % kBlock] = 0;
  }
  __syncthreads();
  if (threadIdx.x < 2 * kBlock) {
    const int which = threadIdx.x / kBlock, c = threadIdx.x % kBlock;
    uint32_t sum = 0;
    for (int w = 0; w < kTileWarps; ++w) {
      const uint32_t own = warp_sums[which][w][c];
      warp_sums[which][w][c] = sum;
      sum += own;
    }
    before[which][c] = 0;
    if (any_cut && c < channels) publish(c, 1 + which, sum);
  }
  __syncthreads();
  uint32_t* tile_done = f.tile_done + int64_t{segment} * f.tiles;
  uint32_t* run_done = f.run_done + int64_t{segment} * f.runs();
  if (any_cut && threadIdx.x == 0) {
    __threadfence();  // behind the barrier: for what all threads have published
    atomicExch(&tile_done[tile], 1u);
    atomicAdd(&run_done[run], 1u);
  }
  // Add up what lies before: whole runs, then the tiles of this one.
  for (int i = threadIdx.x; i < (run + tile % kTilesOfRun) * kBlock; i += kTileThreads) {
    const int c = i % kBlock, n = i / kBlock;
    if (c >= channels) continue;
    const bool whole = n < run;
    const int t = run * kTilesOfRun + n - run;
    const uint32_t* sums = whole ? f.run_sums + (int64_t{first_channel + c} * f.runs() + n) * kSums
                                 : f.tile_sums + (int64_t{first_channel + c} * f.tiles + t) * kSums;
    if (any_cut) {
      const uint32_t* flag = whole ? &run_done[n] : &tile_done[t];
      while (LoadFresh(flag) < (whole ? kTilesOfRun : 1u)) {
      }
      __threadfence();  // this thread's own: it reads what the flag stands for itself
      const uint32_t above = LoadFresh(sums + 1), ties = LoadFresh(sums + 2);
      if (above) atomicAdd(&before[0][c], above);
      if (ties) atomicAdd(&before[1][c], ties);
    } else if (sums[0] != 0) {
      atomicAdd(&before[0][c], sums[0]);
    }
  }
  __syncthreads();

  const int64_t out_segment = int64_t{f.first_item + item} * f.out_channels + block * kBlock;
  uint32_t above[kBlock];
#pragma unroll
  for (int j = 0; j < kBlock; ++j) above[j] = before[0][j] + warp_sums[0][warp][j];
  // Ties are few, so their count stays in shared memory.
  if (lane < kBlock) warp_sums[1][warp][lane] += before[1][lane];
  __syncwarp();
  for_each_row([&](uint32_t key, const uint32_t (&bits)[kBlock]) {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      const bool is_kept = is_above(bits[j], j);
      const uint32_t kept = __ballot_sync(kWarp, is_kept);
      uint32_t slot = above[j] + __popc(kept & lower_lanes);
      bool emits = is_kept;
      above[j] += __popc(kept);
      if (any_cut) {
        const bool is_tied = is_tie(bits[j], j);
        const uint32_t tied = __ballot_sync(kWarp, is_tied), most = cuts[j].ties;
        const uint32_t ties = warp_sums[1][warp][j], my_ties = ties + __popc(tied & lower_lanes);
        slot += min(my_ties, most);
        emits |= is_tied && my_ties < most;
        if (tied != 0) {
          __syncwarp();
          if (lane == 0) warp_sums[1][warp][j] = ties + __popc(tied);
          __syncwarp();
        }
      }
      if (emits && slot < static_cast<uint32_t>(f.capacity)) {
        const int64_t i = (out_segment + j) * f.capacity + slot;
        f.out_keys[i] = static_cast<int32_t>(key);
        Store(f.out_values, i, BitsFloat(bits[j]), f.dtype);
      }
    }
  });

  // Padding: each tile fills its share of the slots behind the kept ones.
  const int share = f.capacity / f.tiles, rest = f.capacity % f.tiles;
  const int share_begin = share * tile + min(tile, rest);
  const int share_end = share_begin + share + (tile < rest ? 1 : 0);
  for (int c = 0; c < channels; ++c) {
    const int from = max(share_begin, cuts[c].candidates);
    for (int i = from + threadIdx.x; i < share_end; i += kTileThreads) {
      f.out_keys[(out_segment + c) * f.capacity + i] = static_cast<int32_t>(f.output_sites);
      Store(f.out_values, (out_segment + c) * f.capacity + i, 0.0f, f.dtype);
    }
  }
}

// Refuses a launch that needs more shared memory than the device has; conv_forward_limit and
// conv_backward_limit in ilajax/ops/_plans_cuda.py know beforehand.
ffi::Error CheckShared(const Window& w, int64_t bytes) {
  const int64_t most = MaxDynamicShared();
  if (bytes <= most) return ffi::Error::Success();
  return InvalidArgument("conv: a window of ", w.taps, " taps needs ", bytes,
                         " bytes of shared memory, the device has ", most);
}

struct ForwardPlan {
  int64_t items, slab_rows, tile, pool_rows;
};

// Sums up the workspace, in the order of ilajax/ops/_plans_cuda.py; returns the words to zero.
int64_t CarveForward(Carver& carver, const ForwardPlan& plan, Forward& f) {
  const int64_t items = plan.items, channels = f.out_channels, blocks = f.filters.blocks();
  f.filters.Carve(carver);
  f.map.Carve(carver, items);
  const int64_t zeros = carver.used();
  f.histograms = carver.Take<uint32_t>(items * channels * kBins);
  f.cuts = carver.Take<Cut>(items * channels);
  f.finished = carver.Take<uint32_t>(items * blocks);
  f.tickets = carver.Take<uint32_t>(1);
  f.pool_used = carver.Take<uint32_t>(1);
  f.run_sums = carver.Take<uint32_t>(items * channels * f.runs() * kSums);
  f.run_done = carver.Take<uint32_t>(items * blocks * f.runs());
  f.tile_done = carver.Take<uint32_t>(items * blocks * f.tiles);
  const int64_t zero_words = (carver.used() - zeros) / sizeof(uint32_t);
  f.tile_sums = carver.Take<uint32_t>(items * channels * f.tiles * kSums);
  f.warp_sums = carver.Take<uint16_t>(items * blocks * f.tiles * kTileWarps * kBlock);
  f.tile_rows = carver.Take<uint2>(items * blocks * f.tiles);
  f.pool_keys = carver.Take<uint32_t>(plan.pool_rows);
  f.pool_values = carver.Take<uint32_t>(plan.pool_rows * f.filters.block);
  return zero_words;
}

template <int R, Pass P>
ffi::Error LaunchTiles(cudaStream_t stream, Forward f, const Window& w) {
  f.table_bytes = TapList<R>::SharedBytes(w.taps, f.map.groups());
  int64_t bytes = f.table_bytes + (P == Pass::kRespond ? kBlock * kBinWords * 4 : 0) +
                  f.tile / 32 * 8 + f.tile * 2;
  ILAJAX_RETURN_IF_ERROR(CheckShared(w, bytes));
  const int64_t weight_bytes = f.filters.Row(1, 0) * kBlock * sizeof(float);
  f.weights_in_shared = weight_bytes <= 32 * 1024 && bytes + weight_bytes <= MaxDynamicShared();
  if (f.weights_in_shared) {
    f.table_bytes += weight_bytes;
    bytes += weight_bytes;
  }
  const int64_t blocks = int64_t{f.items} * f.filters.blocks() * f.slab_tiles;
  return LaunchEach<TileKernel<R, P>>(blocks, kTileThreads, bytes, stream, f, Axes<R>(w));
}

template <Pass P>
ffi::Error LaunchTiles(cudaStream_t stream, const Forward& f, const Window& w) {
  return w.rank <= 3 ? LaunchTiles<3, P>(stream, f, w) : LaunchTiles<kMaxRank, P>(stream, f, w);
}

// The slab of input sites that output rows [begin, end) read.
void CoverInput(const Window& w, int64_t begin, int64_t end, SiteMap& map) {
  const int64_t low = begin * w.strides[0] - w.low[0];
  const int64_t high = (end - 1) * w.strides[0] - w.low[0] + w.extent();
  const int64_t first = std::clamp<int64_t>(low, 0, w.input_shape[0]);
  const int64_t last = std::clamp<int64_t>(high, first, w.input_shape[0]);
  map.begin = first * w.input_row();
  map.sites = (last - first) * w.input_row();
}

ffi::Error CheckCounts(const Window& w, const ConvShape& s) {
  constexpr int64_t kMost = 0x7fffffff;
  if (s.slots * kMapGroup > kMost || s.capacity * kMapGroup > kMost || s.weights > kMost ||
      s.batch * std::max(s.in_channels, s.out_channels) > kMost || w.taps > (1 << 24)) {
    return InvalidArgument("conv: 2^26 slots or more, or 2^31 segments, on the GPU");
  }
  return ffi::Error::Success();
}

ffi::Error ConvFwdImpl(cudaStream_t stream, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::Buffer<ffi::S32>> out_keys,
                       ffi::Result<ffi::AnyBuffer> out_values,
                       ffi::Result<ffi::Buffer<ffi::S32>> responses,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, std::string_view select_name,
                       Span input_shape, Span window_shape, Span strides, Span dilation, Span low,
                       Span output_shape, int64_t chunk_items, int64_t slab_rows, int64_t tile,
                       int64_t pool_rows) {
  Window w;
  ConvShape s;
  Select select = Select::kValue;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(ConvShape::Read(keys, values, kernel_keys, weights, *out_keys, w, s));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: bias", bias, {s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: out_values", *out_values, {s.batch, s.out_channels, s.capacity}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: responses", *responses, {s.batch, s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(ReadSelect(select_name, select));
  ILAJAX_RETURN_IF_ERROR(CheckCounts(w, s));
  if (s.capacity < 1) return InvalidArgument("conv: the capacity is ", s.capacity);
  if (out_values->element_type() != values.element_type()) {
    return InvalidArgument("conv: values and out_values have different dtypes");
  }
  if (chunk_items < 1 || slab_rows < 1 || tile < 32 || tile % 32 != 0 || tile > kMaxTile ||
      pool_rows < 0 || pool_rows > 0x7fffffff) {
    return InvalidArgument("conv: the plan is out of range");
  }
  const ForwardPlan plan = {std::min(chunk_items, s.batch), std::min(slab_rows, w.output_shape[0]),
                            tile, pool_rows};
  const int64_t slabs = CeilDiv(w.output_shape[0], plan.slab_rows);

  Forward f = {};
  f.filters.block = kBlock;
  f.filters.in_channels = static_cast<int>(s.in_channels);
  f.filters.out_channels = static_cast<int>(s.out_channels);
  f.filters.taps = static_cast<int>(w.taps);
  f.bias = bias.typed_data();
  f.out_keys = out_keys->typed_data();
  f.out_values = out_values->untyped_data();
  f.responses = responses->typed_data();
  f.dtype = values.element_type();
  f.select = select;
  f.out_channels = static_cast<int>(s.out_channels);
  f.capacity = static_cast<int>(s.capacity);
  f.output_sites = w.output_sites;
  f.tile = static_cast<int>(tile);
  f.low_shift = f.dtype == ffi::DataType::F32 ? 0 : LevelShift(1);
  f.levels = f.dtype == ffi::DataType::F32 ? kLevels : 2;
  f.pool_rows = static_cast<uint32_t>(pool_rows);
  for (int64_t slab = 0; slab < slabs; ++slab) {
    const int64_t rows = std::min(plan.slab_rows, w.output_shape[0] - slab * plan.slab_rows);
    f.tiles += static_cast<int>(CeilDiv(rows * w.output_row(), tile));
  }
  f.map.channels = static_cast<int>(s.in_channels);
  // The most that any slab covers.
  f.map.sites = std::min(((plan.slab_rows - 1) * w.strides[0] + w.extent()), w.input_shape[0]) *
                w.input_row();
  f.map.slots = static_cast<int>(std::min(s.slots, f.map.sites));
  Carver carver(workspace->untyped_data());
  const int64_t zero_words = CarveForward(carver, plan, f);
  ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, carver.used()));
  // Candidates of a channel: at most the sites, and the products.
  const bool may_cut = s.capacity < w.output_sites &&
                       s.capacity < static_cast<double>(s.in_channels) * s.slots * w.taps;

  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    for (int64_t item = 0; item < s.batch; item += plan.items) {
      f.first_item = static_cast<int>(item);
      f.items = static_cast<int>(std::min(plan.items, s.batch - item));
      f.ticket_base = 0;
      // The passes go over all slabs; a single slab's map is built once.
      int built = -1;
      const auto pass = [&](auto launch) -> ffi::Error {
        f.first_tile = 0;
        for (int64_t slab = 0; slab < slabs; ++slab) {
          const int64_t begin = slab * plan.slab_rows;
          const int64_t end = std::min(begin + plan.slab_rows, w.output_shape[0]);
          f.slab_begin = begin * w.output_row();
          f.slab_end = end * w.output_row();
          f.slab_tiles = static_cast<int>(CeilDiv(f.slab_end - f.slab_begin, tile));
          if (built != slab) {
            CoverInput(w, begin, end, f.map);
            const bool first = built < 0;
            const Prepare<T> prepare = {f.map,
                                        {keys.typed_data() + s.KeyOffset(item, 0),
                                         Data<T>(values) + item * s.in_channels * s.slots,
                                         static_cast<int>(s.slots), s.shared},
                                        f.items,
                                        f.filters,
                                        kernel_keys.typed_data(),
                                        weights.typed_data(),
                                        static_cast<int>(s.weights),
                                        first && item == 0,
                                        f.histograms,
                                        first ? zero_words : 0};
            ILAJAX_RETURN_IF_ERROR(LaunchPrepare(stream, prepare));
            built = static_cast<int>(slab);
          }
          ILAJAX_RETURN_IF_ERROR(launch());
          f.first_tile += f.slab_tiles;
        }
        return ffi::Error::Success();
      };
      f.level = 0;
      ILAJAX_RETURN_IF_ERROR(pass([&] { return LaunchTiles<Pass::kRespond>(stream, f, w); }));
      for (f.level = 1; may_cut && f.level < f.levels; ++f.level) {
        ILAJAX_RETURN_IF_ERROR(pass([&] { return LaunchTiles<Pass::kRefine>(stream, f, w); }));
      }
      ILAJAX_RETURN_IF_ERROR(pass([&] {
        const ffi::Error error = LaunchTiles<Pass::kEmit>(stream, f, w);
        f.ticket_base += f.items * f.filters.blocks() * f.slab_tiles;
        return error;
      }));
    }
    return ffi::Error::Success();
  });
}

// --- The gradient
// -------------------------------------------------------------------------------------

constexpr int kGradientThreads = 128;
constexpr int kGradientWarps = kGradientThreads / 32;
constexpr int kEntries = 2;                          // of a thread
constexpr int kStrip = kGradientThreads * kEntries;  // entries that a block takes at a time
constexpr int kBiasStrip = 8192;                     // as in ilajax/ops/_plans_cuda.py

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
  ILAJAX_HOST_DEVICE int width() const { return filters.blocks() * kBlock; }
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

template <typename T, int R>
__global__ void __launch_bounds__(kGradientThreads, 5)
    GradientKernel(Backward b, Axes<R> axes, const T* values, const T* cotangent, T* values_bar) {
  uint4* shared = DynamicShared();
  const uint32_t task = blockIdx.x;
  if (task >= b.gradient_blocks()) {
    return SumBias(b, cotangent, task - static_cast<uint32_t>(b.gradient_blocks()));
  }
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int ic = static_cast<int>(task % b.filters.in_channels);
  const int part = static_cast<int>(task / b.filters.in_channels);  // of the chunk
  const int blocks = b.filters.blocks(), width = b.width();
  TapList<R> taps;
  taps.Fill(axes, b.filters.live + b.filters.Row(0, ic), blocks, b.filters.Row(1, 0),
            b.filters.taps, shared);

  // The sums of the weights, a copy for each warp.
  const int sum_count = b.filters.taps * width;
  const int64_t all_part = int64_t{b.first_item / b.span} * b.parts + part;
  float* out = b.sums + ((b.slab * b.all_parts() + all_part) * b.filters.in_channels + ic) *
                            b.copies() * int64_t{sum_count};
  float* sums = b.sums_in_shared
                    ? reinterpret_cast<float*>(
                          shared + TapList<R>::SharedBytes(b.filters.taps, (blocks + 31) / 32) /
                                       sizeof(uint4))
                    : out;
  for (int i = threadIdx.x; i < sum_count * kGradientWarps; i += kGradientThreads) sums[i] = 0.0f;
  __syncthreads();
  float* own = sums + int64_t{warp} * sum_count;

  const int strips = (b.slots + kStrip - 1) / kStrip;
  const int piece = part % b.parts, share = strips / b.parts, rest = strips % b.parts;
  const int first_strip = share * piece + min(piece, rest);
  const int last_strip = first_strip + share + (piece < rest ? 1 : 0);
  const int first_item = part / b.parts * b.span;
  for (int item = first_item; item < first_item + b.span; ++item) {
    const int64_t batch_item = int64_t{b.first_item} + item;
    const int64_t segment = (batch_item * b.filters.in_channels + ic) * b.slots;
    const int32_t* keys = b.keys + (b.shared ? batch_item * b.slots : segment);
    for (int strip = first_strip; strip < last_strip; ++strip) {
      int32_t p[kEntries][R];
      float x[kEntries], x_bar[kEntries];
      bool stored[kEntries];
      bool any = false;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        const int i = strip * kStrip + e * kGradientThreads + threadIdx.x;
        const int32_t key = i < b.slots ? keys[i] : -1;
        stored[e] = key >= b.slab_begin && key < b.slab_end;
        x[e] = stored[e] ? static_cast<float>(values[segment + i]) : 0.0f;
        x_bar[e] = 0.0f;
        Axes<R>::Unravel(stored[e] ? key : 0, axes.input, p[e]);
        if (i < b.slots && b.slab == 0 && (key < 0 || key >= b.input_sites)) {
          values_bar[segment + i] = T(0.0f);
        }
        any |= stored[e];
      }
      if (!__any_sync(kWarp, any)) continue;
      for (int k = 0; k < taps.count; ++k) {
        const auto entry = taps.entries[k];
        uint32_t site[kEntries];
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
          bool inside = stored[e];
          uint32_t key = 0;
#pragma unroll
          for (int a = 0; a < R; ++a) {
            int32_t o = p[e][a] + axes.low[a] - entry.offset[a];
            if (axes.stride[a] != 1) {
              inside &= o % axes.stride[a] == 0;
              o /= axes.stride[a];
            }
            inside &= o >= 0 && o < axes.output[a];
            key += static_cast<uint32_t>(o) * axes.output_step[a];
          }
          site[e] = inside ? key - static_cast<uint32_t>(b.map.begin) : 0xffffffffu;
        }
        const int tap = entry.tap;
        for (int g = 0; g < b.map.groups(); ++g) {
          const SiteMapView map(b.map, item, g);
          uint2 row[kEntries];
          uint32_t reached = 0;
#pragma unroll
          for (int e = 0; e < kEntries; ++e) {
            row[e] = map.Find(site[e]);
            reached |= row[e].x;
          }
          if (!__any_sync(kWarp, reached != 0)) continue;
          const int group_blocks = (b.map.group_channels(g) + 7) / kBlock;
          for (int j = 0; j < group_blocks; ++j) {
            const int block = g * (kMapGroup / kBlock) + j;
            if (!(taps.Live(block / 32, tap) >> (block % 32) & 1)) continue;
            if (!__any_sync(kWarp, (reached >> (8 * j) & 0xff) != 0)) continue;
            const float4* weight = reinterpret_cast<const float4*>(
                b.filters.weights + (b.filters.Row(block, ic) + tap) * kBlock);
            const float4 low = weight[0], high = weight[1];
            const float w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            float w_bar[8] = {};
#pragma unroll
            for (int e = 0; e < kEntries; ++e) {
              const uint32_t mask = row[e].x >> (8 * j) & 0xff;
              if (mask == 0) continue;
              const float* cotangents =
                  map.values + (row[e].y & ~kNotFinite) + __popc(row[e].x & ((1u << (8 * j)) - 1));
              const bool plain = x[e] != 0.0f && !(row[e].y & kNotFinite);
              if (plain) {
#pragma unroll
                for (int c = 0; c < kBlock; ++c) {
                  if (!(mask >> c & 1)) continue;
                  const float g_out = *cotangents++;
                  x_bar[e] += g_out * w[c];
                  w_bar[c] += g_out * x[e];
                }
              } else {  // a zero factor adds nothing
#pragma unroll
                for (int c = 0; c < kBlock; ++c) {
                  if (!(mask >> c & 1)) continue;
                  const float g_out = *cotangents++;
                  if (w[c] != 0.0f) x_bar[e] += g_out * w[c];
                  if (x[e] != 0.0f) w_bar[c] += g_out * x[e];
                }
              }
            }
            const float sum = WarpSum8(w_bar);
            if (lane % 4 == 0) {
              const int c = lane / 4;
              own[tap * width + block * kBlock + c] += sum;
            }
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        const int i = strip * kStrip + e * kGradientThreads + threadIdx.x;
        if (stored[e]) values_bar[segment + i] = T(x_bar[e]);
      }
    }
  }
  if (!b.sums_in_shared) return;
  __syncthreads();
  for (int i = threadIdx.x; i < sum_count; i += kGradientThreads) {
    float sum = sums[i];
    for (int w = 1; w < kGradientWarps; ++w) sum += sums[w * sum_count + i];
    out[i] = sum;
  }
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
          const int64_t row = ((slab * b.all_parts() + part) * inputs + ic) * copies + i % copies;
          sum += b.sums[(row * taps + tap) * b.width() + oc];
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

template <typename T, int R>
ffi::Error LaunchGradient(cudaStream_t stream, Backward b, const Window& w, const T* values,
                          const T* cotangent, T* values_bar) {
  int64_t bytes = TapList<R>::SharedBytes(w.taps, CeilDiv(b.filters.blocks(), 32));
  if (b.sums_in_shared) bytes += w.taps * b.width() * kGradientWarps * 4;
  ILAJAX_RETURN_IF_ERROR(CheckShared(w, bytes));
  return LaunchEach<GradientKernel<T, R>>(b.gradient_blocks() + b.bias_blocks(), kGradientThreads,
                                          bytes, stream, b, Axes<R>(w), values, cotangent,
                                          values_bar);
}

ffi::Error ConvBwdImpl(cudaStream_t stream, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::S32> out_keys, ffi::AnyBuffer cotangent,
                       ffi::Result<ffi::AnyBuffer> values_bar,
                       ffi::Result<ffi::Buffer<ffi::F32>> weights_bar,
                       ffi::Result<ffi::Buffer<ffi::F32>> bias_bar,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, Span input_shape,
                       Span window_shape, Span strides, Span dilation, Span low, Span output_shape,
                       int64_t chunk_items, int64_t slab_rows, int64_t span, int64_t parts) {
  Window w;
  ConvShape s;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(ConvShape::Read(keys, values, kernel_keys, weights, out_keys, w, s));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: cotangent", cotangent, {s.batch, s.out_channels, s.capacity}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: values_bar", *values_bar, {s.batch, s.in_channels, s.slots}));
  ILAJAX_RETURN_IF_ERROR(CheckCounts(w, s));
  if (w.taps * CeilDiv(s.out_channels, kBlock) * kBlock * kGradientWarps > 0x7fffffff) {
    return InvalidArgument("conv: ", w.taps, " taps of ", s.out_channels, " channels, on the GPU");
  }
  if (cotangent.element_type() != values.element_type() ||
      values_bar->element_type() != values.element_type()) {
    return InvalidArgument("conv: values, cotangent and values_bar have different dtypes");
  }
  const int64_t groups = weights_bar->dimensions().size() == 2 ? weights_bar->dimensions()[0] : 0;
  if (groups < 1 || s.batch % groups != 0) {
    return InvalidArgument("conv: a batch of ", s.batch, " does not hold ", groups, " groups");
  }
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: weights_bar", *weights_bar, {groups, s.weights}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: bias_bar", *bias_bar, {groups, s.out_channels}));
  if (span < 1 || parts < 1 || (span > 1 && parts > 1) || s.batch / groups % span != 0 ||
      chunk_items < 1 || chunk_items % span != 0 || slab_rows < 1) {
    return InvalidArgument("conv: the plan is out of range");
  }
  slab_rows = std::min(slab_rows, w.input_shape[0]);
  chunk_items = std::min(chunk_items, std::max<int64_t>(s.batch, span));

  Backward b = {};
  b.filters.block = kBlock;
  b.filters.in_channels = static_cast<int>(s.in_channels);
  b.filters.out_channels = static_cast<int>(s.out_channels);
  b.filters.taps = static_cast<int>(w.taps);
  b.keys = keys.typed_data();
  b.out_keys = out_keys.typed_data();
  b.kernel_keys = kernel_keys.typed_data();
  b.weights_bar = weights_bar->typed_data();
  b.bias_bar = bias_bar->typed_data();
  b.batch = static_cast<int>(s.batch);
  b.slots = static_cast<int>(s.slots);
  b.capacity = static_cast<int>(s.capacity);
  b.weights = static_cast<int>(s.weights);
  b.groups = static_cast<int>(groups);
  b.shared = s.shared;
  b.input_sites = w.input_sites;
  b.output_sites = w.output_sites;
  b.slabs = static_cast<int>(CeilDiv(w.input_shape[0], slab_rows));
  b.span = static_cast<int>(span);
  b.parts = static_cast<int>(parts);
  // Where they fit on every device: the plan, which knows none, makes room for them elsewhere.
  const auto shared_bytes = w.rank <= 3 ? TapList<3>::SharedBytes : TapList<kMaxRank>::SharedBytes;
  b.sums_in_shared = shared_bytes(w.taps, CeilDiv(b.filters.blocks(), 32)) +
                         w.taps * b.width() * kGradientWarps * 4 <=
                     kSharedAnywhere - kStaticShared;
  b.map.channels = static_cast<int>(s.out_channels);
  const int64_t reach =
      b.slabs == 1 ? w.output_shape[0] : (slab_rows + w.extent() - 2) / w.strides[0] + 1;
  b.map.sites = std::min(reach, w.output_shape[0]) * w.output_row();
  b.map.slots = static_cast<int>(std::min(s.capacity, b.map.sites));
  Carver carver(workspace->untyped_data());
  b.filters.Carve(carver);
  b.map.Carve(carver, chunk_items);
  b.sums =
      carver.Take<float>(b.slabs * b.all_parts() * s.in_channels * b.copies() * w.taps * b.width());
  b.bias_sums = carver.Take<float>(s.batch * s.out_channels * b.bias_strips());
  ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, carver.used()));

  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    for (int64_t item = 0; item < s.batch; item += chunk_items) {
      b.first_item = static_cast<int>(item);
      b.items = static_cast<int>(std::min(chunk_items, s.batch - item));
      for (b.slab = 0; b.slab < b.slabs; ++b.slab) {
        const int64_t begin = b.slab * slab_rows;
        const int64_t end = std::min(begin + slab_rows, w.input_shape[0]);
        b.slab_begin = begin * w.input_row();
        b.slab_end = end * w.input_row();
        // The output rows within reach.
        const int64_t lowest = begin + w.low[0] - w.extent() + 1, highest = end - 1 + w.low[0];
        const int64_t row_begin = std::clamp<int64_t>(
            lowest <= 0 ? 0 : CeilDiv(lowest, w.strides[0]), 0, w.output_shape[0]);
        const int64_t row_end = std::clamp<int64_t>(highest < 0 ? 0 : highest / w.strides[0] + 1,
                                                    row_begin, w.output_shape[0]);
        b.map.begin = row_begin * w.output_row();
        b.map.sites = (row_end - row_begin) * w.output_row();
        const Prepare<T> prepare = {
            b.map,
            {b.out_keys + item * s.out_channels * s.capacity,
             Data<T>(cotangent) + item * s.out_channels * s.capacity, b.capacity, false},
            b.items,
            b.filters,
            b.kernel_keys,
            weights.typed_data(),
            b.weights,
            item == 0 && b.slab == 0,
            nullptr,
            0};
        ILAJAX_RETURN_IF_ERROR(LaunchPrepare(stream, prepare));
        const auto launch = w.rank <= 3 ? LaunchGradient<T, 3> : LaunchGradient<T, kMaxRank>;
        ILAJAX_RETURN_IF_ERROR(
            launch(stream, b, w, Data<T>(values), Data<T>(cotangent), Data<T>(*values_bar)));
      }
    }
    const int64_t tasks = groups * (s.weights + s.out_channels);
    return Launch<FinishKernel>(GridFor(CeilDiv(tasks, kGradientWarps)), kGradientThreads, 0,
                                stream, b);
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(ConvFwd, ilajax::ConvFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<ilajax::Stream>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kernel_keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // bias
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // out_keys
                                  .Ret<xla::ffi::AnyBuffer>()              // out_values
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // responses
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<std::string_view>("select")
                                  .Attr<ilajax::Span>("input_shape")
                                  .Attr<ilajax::Span>("window_shape")
                                  .Attr<ilajax::Span>("strides")
                                  .Attr<ilajax::Span>("dilation")
                                  .Attr<ilajax::Span>("low")
                                  .Attr<ilajax::Span>("output_shape")
                                  .Attr<int64_t>("chunk_items")
                                  .Attr<int64_t>("slab_rows")
                                  .Attr<int64_t>("tile")
                                  .Attr<int64_t>("pool_rows"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(ConvBwd, ilajax::ConvBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<ilajax::Stream>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kernel_keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // out_keys
                                  .Arg<xla::ffi::AnyBuffer>()  // cotangent of out_values
                                  .Ret<xla::ffi::AnyBuffer>()  // values_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // weights_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // bias_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<ilajax::Span>("input_shape")
                                  .Attr<ilajax::Span>("window_shape")
                                  .Attr<ilajax::Span>("strides")
                                  .Attr<ilajax::Span>("dilation")
                                  .Attr<ilajax::Span>("low")
                                  .Attr<ilajax::Span>("output_shape")
                                  .Attr<int64_t>("chunk_items")
                                  .Attr<int64_t>("slab_rows")
                                  .Attr<int64_t>("span")
                                  .Attr<int64_t>("parts"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
