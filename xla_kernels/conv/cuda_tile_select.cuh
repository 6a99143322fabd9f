// What a tile keeps: counts the ranks of its candidates, finds the digits of the rank at which the
// capacity cuts, and writes what is left behind what the tiles before it keep; see cuda.cu.

#pragma once

#include "xla_kernels/conv/cuda_tile.cuh"

namespace ilajax {
namespace {

// In shared memory: the cuts of the block's channels, as far as they have been found.
struct TileCuts {
  Cut of[kBlock];
  bool any;

  __device__ __forceinline__ void Read(const Forward& f, const Tile& tile) {
    if (threadIdx.x == 0) any = false;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < tile.channels) {
      of[threadIdx.x] = f.cuts[tile.first_channel + threadIdx.x];
      if (of[threadIdx.x].cuts) StoreRelaxed(&any, true);
    } else if (threadIdx.x < kBlock) {
      of[threadIdx.x] = Cut{};
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool IsAbove(uint32_t bits, int j, const Forward& f) const {
    return bits != kNone && (!of[j].cuts || Rank(bits, f) > of[j].threshold);
  }
  __device__ __forceinline__ bool IsTie(uint32_t bits, int j, const Forward& f) const {
    return bits != kNone && of[j].cuts && Rank(bits, f) == of[j].threshold;
  }
};

__device__ __forceinline__ void ClearHistogram(uint32_t* histogram) {
  uint4* bins = reinterpret_cast<uint4*>(histogram);
  for (int i = threadIdx.x; i < kBlock * kBinWords / 4; i += kTileThreads) {
    bins[i] = make_uint4(0, 0, 0, 0);
  }
}

// Adds the tile's histogram to that of the segment.
__device__ __forceinline__ void AddHistogram(const uint32_t* histogram, int channels,
                                             uint32_t* totals) {
  static_assert(kBins == 8 * kTileThreads, "a thread has eight bins of each channel");
  const uint4* bins = reinterpret_cast<const uint4*>(histogram) + threadIdx.x;
  for (int c = 0; c < channels; ++c, bins += kBinWords / 4) {
    const uint4 eight = *bins;
    if ((eight.x | eight.y | eight.z | eight.w) == 0) continue;  // as in most warps
    const uint32_t two[4] = {eight.x, eight.y, eight.z, eight.w};
    uint32_t* total = &totals[c * kBins + 8 * threadIdx.x];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (two[j] & 0xffff) atomicAdd(&total[2 * j], two[j] & 0xffff);
      if (two[j] >> 16) atomicAdd(&total[2 * j + 1], two[j] >> 16);
    }
  }
}

// kRespond: counts the candidates, of each warp and of the tile, and their ranks' first digits.
template <typename Reached>
__device__ __forceinline__ void CountCandidates(const Forward& f, const Tile& tile,
                                                const Reached& reached, uint32_t* histogram,
                                                uint32_t* totals) {
  __shared__ uint32_t sums[kTileWarps][kBlock];
  uint32_t counts[kBlock] = {};
  reached.ForEach([&](uint32_t, const uint32_t (&bits)[kBlock]) {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (bits[j] == kNone) continue;
      ++counts[j];
      const uint32_t bin = Rank(bits[j], f) >> LevelShift(0);
      atomicAdd(&histogram[j * kBinWords + (bin >> 1)], 1u << (16 * (bin & 1)));
    }
  });
  SumOverWarp(counts, [&](int j, uint32_t sum) { sums[threadIdx.x >> 5][j] = sum; });
  __syncthreads();
  if (threadIdx.x < kTileWarps * kBlock) {
    tile.WarpSums(f)[threadIdx.x] =
        static_cast<uint16_t>(sums[threadIdx.x / kBlock][threadIdx.x % kBlock]);
  }
  if (static_cast<int>(threadIdx.x) < tile.channels) {
    uint32_t sum = 0;
    for (int w = 0; w < kTileWarps; ++w) sum += sums[w][threadIdx.x];
    tile.Publish(f, threadIdx.x, kCandidates, sum);
  }
  AddHistogram(histogram, tile.channels, totals);
}

// kRefine: counts the next digit of the candidates that share all higher digits of the threshold.
// They are few, or many that are equal: then one of them adds for all.
template <typename Reached>
__device__ __forceinline__ void CountNextDigit(const Forward& f, const Reached& reached,
                                               const TileCuts& cuts, uint32_t* totals) {
  const int lane = threadIdx.x & 31;
  const int shift = LevelShift(f.level), upper = shift + LevelBits(f.level);
  const uint32_t bin_mask = (1u << LevelBits(f.level)) - 1;
  reached.ForEach([&](uint32_t, const uint32_t (&bits)[kBlock]) {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      const uint32_t rank = Rank(bits[j], f);
      const bool in =
          bits[j] != kNone && cuts.of[j].cuts && (rank ^ cuts.of[j].threshold) >> upper == 0;
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

// Whether this block is the segment's last to get here: then it sees what all have counted. One
// thread's fences, between the barriers and its atomic, order what all threads of the block do.
__device__ __forceinline__ bool IsLastOfSegment(const Forward& f, int segment) {
  __shared__ uint32_t before;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    before = atomicAdd(&f.finished[segment], 1u);
    __threadfence();
  }
  __syncthreads();
  const bool last = before == static_cast<uint32_t>(f.tiles) - 1;
  if (last && threadIdx.x == 0) f.finished[segment] = 0;
  return last;
}

// Finds the next digit of a segment's threshold in its histogram, which it clears. A warp calls it.
__device__ __forceinline__ void FindDigit(const Forward& f, int level, uint32_t* histogram,
                                          Cut* cut, int32_t* responses) {
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
    if (total > ties) StoreRelaxed(f.any_cuts, 1u);
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

// In shared memory, by channel: [0] what lies above the threshold, or all candidates where nothing
// is cut; [1] ties.
struct KeptCounts {
  uint32_t warps[2][kTileWarps][kBlock];  // of each warp, then of the warps before it
  uint32_t tiles[2][kBlock];              // of the tiles before this one
};

// Where the first channel of a block writes; the others write behind it. T: float, or the bits of
// either type of 16.
template <typename T>
struct Output {
  int32_t* keys;
  T* values;
  bool bfloat16;

  __device__ __forceinline__ Output(const Forward& f, const Tile& tile)
      : bfloat16(f.dtype == ffi::DataType::BF16) {
    const int64_t segment =
        int64_t{f.first_item + tile.item} * f.out_channels + tile.block * kBlock;
    keys = f.out_keys + segment * f.capacity;
    values = static_cast<T*>(f.out_values) + segment * f.capacity;
  }

  __device__ __forceinline__ void Store(uint32_t slot, uint32_t key, float value) const {
    keys[slot] = static_cast<int32_t>(key);
    if constexpr (sizeof(T) == sizeof(float)) {
      values[slot] = value;
    } else {
      values[slot] = bfloat16 ? BFloat16(value).bits : Float16(value).bits;
    }
  }
};

// Tickets order the blocks of the last pass, which wait for those before them.
__device__ __forceinline__ uint32_t DrawTicket(const Forward& f) {
  __shared__ uint32_t ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(f.tickets, 1u);
  __syncthreads();
  return ticket - f.ticket_base;
}

// What each warp keeps. Where nothing is cut the first pass has counted.
template <typename Reached>
__device__ __forceinline__ void CountKept(const Forward& f, const Tile& tile,
                                          const Reached& reached, const TileCuts& cuts,
                                          KeptCounts& kept) {
  if (cuts.any) {
    uint32_t counts[kBlock] = {};  // two numbers in one: at most 32 * 8192 / 256 sites
    reached.ForEach([&](uint32_t, const uint32_t (&bits)[kBlock]) {
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        counts[j] +=
            (cuts.IsAbove(bits[j], j, f) ? 1u : 0u) + (cuts.IsTie(bits[j], j, f) ? 0x10000u : 0u);
      }
    });
    SumOverWarp(counts, [&](int j, uint32_t sum) {
      kept.warps[0][threadIdx.x >> 5][j] = sum & 0xffff;
      kept.warps[1][threadIdx.x >> 5][j] = sum >> 16;
    });
  } else if (threadIdx.x < kTileWarps * kBlock) {
    kept.warps[0][threadIdx.x / kBlock][threadIdx.x % kBlock] = tile.WarpSums(f)[threadIdx.x];
    kept.warps[1][threadIdx.x / kBlock][threadIdx.x % kBlock] = 0;
  }
  __syncthreads();
}

// Adds up the warps, and tells the tiles behind this one what it keeps.
__device__ __forceinline__ void PublishKept(const Forward& f, const Tile& tile,
                                            const TileCuts& cuts, KeptCounts& kept) {
  if (threadIdx.x < 2 * kBlock) {
    const int which = threadIdx.x / kBlock, c = threadIdx.x % kBlock;
    uint32_t sum = 0;
    for (int w = 0; w < kTileWarps; ++w) {
      const uint32_t own = kept.warps[which][w][c];
      kept.warps[which][w][c] = sum;
      sum += own;
    }
    kept.tiles[which][c] = 0;
    if (cuts.any && c < tile.channels) tile.Publish(f, c, kAbove + which, sum);
  }
  __syncthreads();
  if (cuts.any && threadIdx.x == 0) {
    __threadfence();  // behind the barrier: for what all threads have published
    atomicExch(&f.tile_done[int64_t{tile.segment} * f.tiles + tile.index], 1u);
    atomicAdd(&f.run_done[int64_t{tile.segment} * f.runs() + tile.run()], 1u);
  }
}

// Adds up what lies before the tile: whole runs, then the tiles of its own run.
__device__ __forceinline__ void AddTilesBefore(const Forward& f, const Tile& tile,
                                               const TileCuts& cuts, KeptCounts& kept) {
  const uint32_t* tile_done = f.tile_done + int64_t{tile.segment} * f.tiles;
  const uint32_t* run_done = f.run_done + int64_t{tile.segment} * f.runs();
  const int run = tile.run();
  for (int i = threadIdx.x; i < (run + tile.index % kTilesOfRun) * kBlock; i += kTileThreads) {
    const int c = i % kBlock, n = i / kBlock;
    if (c >= tile.channels) continue;
    const bool whole = n < run;
    const int t = run * kTilesOfRun + n - run;
    const uint32_t* sums =
        whole ? f.RunSums(tile.first_channel + c, n) : f.TileSums(tile.first_channel + c, t);
    if (cuts.any) {
      const uint32_t* flag = whole ? &run_done[n] : &tile_done[t];
      while (LoadFresh(flag) < (whole ? kTilesOfRun : 1u)) {
      }
      __threadfence();  // this thread's own: it reads what the flag stands for itself
      const uint32_t above = LoadFresh(sums + kAbove), ties = LoadFresh(sums + kTies);
      if (above) atomicAdd(&kept.tiles[0][c], above);
      if (ties) atomicAdd(&kept.tiles[1][c], ties);
    } else if (sums[kCandidates] != 0) {
      atomicAdd(&kept.tiles[0][c], sums[kCandidates]);
    }
  }
  __syncthreads();
}

// Writes the kept candidates: where nothing is cut, all.
template <bool kCut, typename T, typename Reached>
__device__ __forceinline__ void EmitKept(const Forward& f, const Reached& reached,
                                         const TileCuts& cuts, KeptCounts& kept,
                                         const Output<T>& out) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t lower_lanes = (1u << lane) - 1;
  uint32_t above[kBlock];
#pragma unroll
  for (int j = 0; j < kBlock; ++j) above[j] = kept.tiles[0][j] + kept.warps[0][warp][j];
  // Ties are few, so their count stays in shared memory.
  if (kCut && lane < kBlock) kept.warps[1][warp][lane] += kept.tiles[1][lane];
  __syncwarp();
  reached.ForEach([&](uint32_t key, const uint32_t (&bits)[kBlock]) {
    uint32_t first_slot = 0;  // of the channel
#pragma unroll
    for (int j = 0; j < kBlock; ++j, first_slot += f.capacity) {
      const bool is_above = kCut ? cuts.IsAbove(bits[j], j, f) : bits[j] != kNone;
      const uint32_t all_above = __ballot_sync(kWarp, is_above);
      uint32_t slot = above[j] + __popc(all_above & lower_lanes);
      bool emits = is_above;
      above[j] += __popc(all_above);
      if (kCut) {
        const bool is_tie = cuts.IsTie(bits[j], j, f);
        const uint32_t all_ties = __ballot_sync(kWarp, is_tie), most = cuts.of[j].ties;
        const uint32_t ties = kept.warps[1][warp][j];
        const uint32_t my_ties = ties + __popc(all_ties & lower_lanes);
        slot += min(my_ties, most);
        emits |= is_tie && my_ties < most;
        if (all_ties != 0) {
          __syncwarp();
          if (lane == 0) kept.warps[1][warp][j] = ties + __popc(all_ties);
          __syncwarp();
        }
      }
      if (emits && slot < static_cast<uint32_t>(f.capacity)) {
        out.Store(first_slot + slot, key, BitsFloat(bits[j]));
      }
    }
  });
}

// Padding: each tile fills its share of the slots behind the kept ones.
template <typename T>
__device__ __forceinline__ void Pad(const Forward& f, const Tile& tile, const TileCuts& cuts,
                                    const Output<T>& out) {
  const int share_begin = f.share * tile.index + min(tile.index, f.larger_shares);
  const int share_end = share_begin + f.share + (tile.index < f.larger_shares ? 1 : 0);
  for (int c = 0; c < tile.channels; ++c) {
    const int from = max(share_begin, cuts.of[c].candidates);
    for (int i = from + threadIdx.x; i < share_end; i += kTileThreads) {
      out.Store(c * f.capacity + i, static_cast<uint32_t>(f.output_sites), 0.0f);
    }
  }
}

template <typename T, typename Reached>
__device__ __forceinline__ void Emit(const Forward& f, const Tile& tile, const Reached& reached,
                                     const TileCuts& cuts, KeptCounts& kept, const Output<T>& out) {
  if (cuts.any) {
    EmitKept<true>(f, reached, cuts, kept, out);
  } else {
    EmitKept<false>(f, reached, cuts, kept, out);
  }
  Pad(f, tile, cuts, out);
}

}  // namespace
}  // namespace ilajax
