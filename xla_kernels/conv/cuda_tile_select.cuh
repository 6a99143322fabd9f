// Counts the ranks of a tile's candidates, and finds the digits of the rank at which the capacity
// cuts; see cuda.cu.

#ifndef ILAJAX_XLA_KERNELS_CONV_CUDA_TILE_SELECT_CUH_
#define ILAJAX_XLA_KERNELS_CONV_CUDA_TILE_SELECT_CUH_

#include <cstdint>

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
      if (of[threadIdx.x].cuts) any = true;
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
}

// kRespond: counts the candidates, of each warp and of the tile, and their ranks' first digits.
template <typename Reached>
__device__ __forceinline__ void CountCandidates(const Forward& f, const Tile& tile,
                                                const Reached& reached, uint32_t* histogram,
                                                uint32_t* totals) {
  __shared__ uint32_t sums[kTileWarps][kBlock];
  uint32_t counts[kBlock] = {};
  const int shift = LevelShift(f.level);
  reached.ForEach([&](uint32_t, const uint32_t (&bits)[kBlock]) {
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (bits[j] == kNone) continue;
      ++counts[j];
      const uint32_t bin = Rank(bits[j], f) >> shift;
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

}  // namespace
}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_CUDA_TILE_SELECT_CUH_
