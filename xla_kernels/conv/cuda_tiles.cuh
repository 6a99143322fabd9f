// The kernel of the passes over tiles of output sites, which respond and select; see cuda.cu.

#ifndef ILAJAX_XLA_KERNELS_CONV_CUDA_TILES_CUH_
#define ILAJAX_XLA_KERNELS_CONV_CUDA_TILES_CUH_

#include <cstdint>

#include "xla_kernels/conv/cuda_tile.cuh"
#include "xla_kernels/conv/cuda_tile_emit.cuh"
#include "xla_kernels/conv/cuda_tile_mark.cuh"
#include "xla_kernels/conv/cuda_tile_respond.cuh"
#include "xla_kernels/conv/cuda_tile_select.cuh"

namespace ilajax {
namespace {

// Blocks of a multiprocessor. With three, nothing is spilled below four axes but by the last pass,
// whose registers hold where the channels of its sites go, too.
constexpr int TileBlocks(int rank, Pass pass) { return rank <= 3 && pass != Pass::kEmit ? 3 : 2; }

template <int R, Pass P>
__global__ void __launch_bounds__(kTileThreads, TileBlocks(R, P))
    TileKernel(Forward f, Axes<R> axes) {
  const TileMemory memory(f, P);
  const Tile tile(f, P == Pass::kEmit ? DrawTicket(f) : blockIdx.x);
  __shared__ TileCuts cuts;
  if (P != Pass::kRespond) {
    cuts.Read(f, tile);
    if (P == Pass::kRefine && !cuts.any) return;
  }

  ReachedSites<R, P> reached(f, axes, tile, memory.sites);
  if (!reached.pooled) {
    if (P == Pass::kRespond) ClearHistogram(memory.histogram);
    reached.ReadFilters(memory.tables);
    MarkTile(f, axes, reached.taps, tile, memory.bitmap);
    reached.List(memory.bitmap);
  }
  reached.FindPlace();

  if constexpr (P == Pass::kEmit) {
    __shared__ KeptCounts kept;
    CountKept(f, tile, reached, cuts, kept);
    PublishKept(f, tile, cuts, kept);
    AddTilesBefore(f, tile, cuts, kept);
    const int64_t out_segment =
        int64_t{f.first_item + tile.item} * f.out_channels + tile.block * kBlock;
    EmitKept(f, reached, cuts, kept, out_segment);
    Pad(f, tile, cuts, out_segment);
  } else {
    uint32_t* totals = f.histograms + int64_t{tile.first_channel} * kBins;
    if constexpr (P == Pass::kRespond) {
      CountCandidates(f, tile, reached, memory.histogram, totals);
    } else {
      CountNextDigit(f, reached, cuts, totals);
    }
    if (!IsLastOfSegment(f, tile.segment)) return;
    const int warp = threadIdx.x >> 5;
    if (warp < tile.channels && (P == Pass::kRespond || cuts.of[warp].cuts)) {
      const int s = tile.first_channel + warp;
      FindDigit(f, f.level, totals + warp * kBins, &f.cuts[s],
                &f.responses[int64_t{f.first_item} * f.out_channels + s]);
    }
  }
}

}  // namespace
}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_CUDA_TILES_CUH_
