// What the passes over tiles share: their numbers and buffers, a block's tile, ranks; see cuda.cu.

#pragma once

#include "xla_kernels/common/selection.h"
#include "xla_kernels/conv/cuda_common.cuh"

namespace ilajax {
namespace {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / 32;
constexpr int kMaxTile = 8192;  // sites
constexpr int kTilesOfRun = 64;
constexpr int kBins = 2048;
constexpr int kBinWords = kBins / 2 + 4;  // two counters each; the rest spreads channels over banks
constexpr int kLevels = 3;                // digits of a rank: 11, 11 and 10 bits
constexpr uint32_t kNone = 0xffffffffu;   // no candidate: bits of a NaN that no response has
constexpr uint32_t kUncached = 0xffffffffu;

// What is counted of a tile, and of a run of tiles, by channel.
enum Sum { kCandidates, kAbove, kTies, kSums };  // kept above the threshold; equal to it

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
  Divisor channel_blocks;
  Divisor pieces;  // of 32 sites, of a row of the output
  int64_t output_sites;

  int first_item, items;         // the chunk of the batch
  int64_t slab_begin, slab_end;  // its output sites
  int tile;                      // sites of a tile
  int tiles, first_tile;         // of an item; of the slab
  Divisor slab_tiles;
  int ticket_base;           // blocks of launches before this one that drew tickets
  int share, larger_shares;  // slots that a tile pads; how many tiles have one more
  int level;                 // the digit of this pass
  uint32_t rank_mask;        // bits of a rank that carry anything
  int levels;
  bool weights_in_shared;
  int64_t table_bytes;  // of shared memory: taps, and the weights

  // Zeroed by launch 1.
  uint32_t* histograms;  // [item][channel][bin]
  Cut* cuts;             // [item][channel]
  uint32_t* finished;    // [item][block of channels]
  uint32_t* any_cuts;    // [1]: whether there are any
  uint32_t* tickets;     // [1]
  uint32_t* pool_used;   // [1]
  uint32_t* run_sums;    // [item][channel][run of tiles][kSums]
  uint32_t* run_done;    // [item][block of channels][run]
  uint32_t* tile_done;   // [item][block][tile]

  uint32_t* tile_sums;  // [item][channel][tile][kSums]
  uint16_t* warp_sums;  // [item][block][tile][warp][channel of the block]: candidates
  uint2* tile_reached;  // [item][block][tile]: offset in the pool or kUncached, and reached sites
  uint32_t pool_sites;
  uint32_t* pool_keys;    // [site]
  uint32_t* pool_values;  // [site][channel of the block]: bits of the rounded value, or kNone

  ILAJAX_HOST_DEVICE int runs() const { return (tiles + kTilesOfRun - 1) / kTilesOfRun; }
  __device__ uint32_t* TileSums(int channel, int t) const {
    return tile_sums + (int64_t{channel} * tiles + t) * kSums;
  }
  __device__ uint32_t* RunSums(int channel, int run) const {
    return run_sums + (int64_t{channel} * runs() + run) * kSums;
  }
};

// The tile, and the block of channels, that a block of threads works on.
struct Tile {
  int index;    // in the item
  int segment;  // of items and blocks of channels
  int item;
  int block;           // of channels
  int channels;        // of the block
  int first_channel;   // of items and channels
  int64_t begin, end;  // its output sites

  __device__ __forceinline__ Tile(const Forward& f, uint32_t task) {
    segment = static_cast<int>(f.slab_tiles.Quotient(task));
    const uint32_t slab_tile = task - segment * f.slab_tiles.value;
    index = f.first_tile + static_cast<int>(slab_tile);
    item = static_cast<int>(f.channel_blocks.Quotient(segment));
    block = segment - item * static_cast<int>(f.channel_blocks.value);
    channels = min(kBlock, f.out_channels - block * kBlock);
    first_channel = item * f.out_channels + block * kBlock;
    begin = f.slab_begin + int64_t{slab_tile} * f.tile;
    end = min(begin + f.tile, f.slab_end);
  }

  __device__ int run() const { return index / kTilesOfRun; }

  // The block's counts of candidates, [warp][channel of the block].
  __device__ uint16_t* WarpSums(const Forward& f) const {
    return f.warp_sums + (int64_t{segment} * f.tiles + index) * kTileWarps * kBlock;
  }

  // Writes a sum of channel c to those of the tile and of its run, for the tiles behind.
  __device__ __forceinline__ void Publish(const Forward& f, int c, int which, uint32_t sum) const {
    f.TileSums(first_channel + c, index)[which] = sum;
    if (sum != 0) atomicAdd(f.RunSums(first_channel + c, run()) + which, sum);
  }
};

// A block's dynamic shared memory.
struct TileMemory {
  uint4* tables;        // taps, and the weights if they fit
  uint32_t* histogram;  // kRespond only: [channel][kBinWords]
  uint32_t* bitmap;     // of the reached sites
  uint16_t* sites;      // a list of them

  __device__ __forceinline__ TileMemory(const Forward& f, Pass pass) {
    tables = DynamicShared();
    histogram = reinterpret_cast<uint32_t*>(tables + f.table_bytes / sizeof(uint4));
    bitmap = histogram + (pass == Pass::kRespond ? kBlock * kBinWords : 0);
    sites = reinterpret_cast<uint16_t*>(bitmap + f.tile / 32);
  }
};

// The rank of a candidate in 32 bits: as RankBits', but that those of positive values and magnitudes
// leave out the highest bit, which is always set. NaN has one form here, and is above infinity.
__device__ __forceinline__ uint32_t Rank(uint32_t bits, const Forward& f) {
  if (f.select != Select::kValue) return bits << 1 & f.rank_mask;
  const bool negative = bits > 0x80000000u;  // -0 equals 0
  return (negative ? ~bits : bits | 0x80000000u) & f.rank_mask;
}

// Adds up the counts of each channel over the warp; lane j takes those of channel j.
template <typename Take>
__device__ __forceinline__ void SumOverWarp(const uint32_t (&counts)[kBlock], Take&& take) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    const uint32_t sum = __reduce_add_sync(kWarp, counts[j]);
    if (lane == j) take(j, sum);
  }
}

}  // namespace
}  // namespace ilajax
