// The forward pass: its kernel, how it is cut, its workspace, its launches; see cuda.cu.

#pragma once

#include <algorithm>

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
  if (P == Pass::kRefine && *f.any_cuts == 0) return;
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
    if (f.dtype == ffi::DataType::F32) {
      Emit(f, tile, reached, cuts, kept, Output<float>(f, tile));
    } else {
      Emit(f, tile, reached, cuts, kept, Output<uint16_t>(f, tile));
    }
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

struct ForwardPlan {
  int64_t chunk_items;  // of the batch, at a time
  int64_t slab_planes;  // of the output, at a time
  int64_t tile;         // output sites of a block
  int64_t pool_sites;   // whose responses are kept from pass to pass
};

// Input planes that `planes` output planes read, at most.
int64_t PlanesRead(const Window& w, int64_t planes) {
  return std::min((planes - 1) * w.strides[0] + w.extent(), w.input_shape[0]);
}

// The numbers and the workspace of all launches.
struct ForwardLayout {
  Forward f = {};
  int64_t zero_words;

  ForwardLayout(Carver& carver, const ConvShape& s, const ForwardPlan& plan) {
    f.filters = FiltersOf(s);
    f.out_channels = static_cast<int>(s.out_channels);
    f.channel_blocks = Divisor(f.filters.blocks());
    f.pieces = Divisor(CeilDiv(s.w.output_shape[s.w.rank - 1], 32));
    f.capacity = static_cast<int>(s.capacity);
    f.output_sites = s.w.output_sites;
    f.tile = static_cast<int>(plan.tile);
    f.pool_sites = static_cast<uint32_t>(plan.pool_sites);
    for (int64_t plane = 0; plane < s.w.output_shape[0]; plane += plan.slab_planes) {
      const int64_t planes = std::min(plan.slab_planes, s.w.output_shape[0] - plane);
      f.tiles += static_cast<int>(CeilDiv(planes * s.w.output_plane(), plan.tile));
    }
    f.share = f.tiles == 0 ? 0 : f.capacity / f.tiles;
    f.larger_shares = f.capacity - f.share * f.tiles;
    f.map.channels = static_cast<int>(s.in_channels);
    f.map.sites = PlanesRead(s.w, plan.slab_planes) * s.w.input_plane();
    f.map.slots = static_cast<int>(std::min(s.slots, f.map.sites));

    const int64_t items = plan.chunk_items, channels = s.out_channels, blocks = f.filters.blocks();
    f.filters.Carve(carver);
    f.map.Carve(carver, items);
    const int64_t zeros = carver.used();
    f.histograms = carver.Take<uint32_t>(items, channels, kBins);
    f.cuts = carver.Take<Cut>(items, channels);
    f.finished = carver.Take<uint32_t>(items, blocks);
    f.any_cuts = carver.Take<uint32_t>(1);
    f.tickets = carver.Take<uint32_t>(1);
    f.pool_used = carver.Take<uint32_t>(1);
    f.run_sums = carver.Take<uint32_t>(items, channels, f.runs(), kSums);
    f.run_done = carver.Take<uint32_t>(items, blocks, f.runs());
    f.tile_done = carver.Take<uint32_t>(items, blocks, f.tiles);
    zero_words = (carver.used() - zeros) / static_cast<int64_t>(sizeof(uint32_t));
    f.tile_sums = carver.Take<uint32_t>(items, channels, f.tiles, kSums);
    f.warp_sums = carver.Take<uint16_t>(items, blocks, f.tiles, kTileWarps, kBlock);
    f.tile_reached = carver.Take<uint2>(items, blocks, f.tiles);
    f.pool_keys = carver.Take<uint32_t>(plan.pool_sites);
    f.pool_values = carver.Take<uint32_t>(plan.pool_sites, kBlock);
  }
};

// Shared memory of a block, without the weights that may fit as well.
int64_t TileBytes(const Window& w, int64_t groups, int64_t tile, bool responds) {
  return TapBytes(w, groups) + (responds ? kBlock * kBinWords * 4 : 0) + tile / 32 * 4 + tile * 2;
}

template <int R, Pass P>
ffi::Error LaunchTiles(cudaStream_t stream, Forward f, const Window& w) {
  f.table_bytes = TapList<R>::SharedBytes(w.taps, f.map.groups());
  int64_t bytes = TileBytes(w, f.map.groups(), f.tile, P == Pass::kRespond);
  ILAJAX_RETURN_IF_ERROR(CheckShared(w, bytes));
  const int64_t weight_bytes = f.filters.Vectors(1, 0) * kBlock * sizeof(float);
  f.weights_in_shared = weight_bytes <= 32 * 1024 && bytes + weight_bytes <= MaxDynamicShared();
  if (f.weights_in_shared) {
    f.table_bytes += weight_bytes;
    bytes += weight_bytes;
  }
  const int64_t blocks = int64_t{f.items} * f.filters.blocks() * f.slab_tiles.value;
  return LaunchEach<TileKernel<R, P>>(blocks, kTileThreads, bytes, stream, f, Axes<R>(w));
}

template <Pass P>
ffi::Error LaunchTiles(cudaStream_t stream, const Forward& f, const Window& w) {
  return w.rank <= 3 ? LaunchTiles<3, P>(stream, f, w) : LaunchTiles<kMaxRank, P>(stream, f, w);
}

// The slab of input sites that output planes [begin, end) read.
void CoverInput(const Window& w, int64_t begin, int64_t end, SiteMap& map) {
  const int64_t low = begin * w.strides[0] - w.low[0];
  const int64_t high = (end - 1) * w.strides[0] - w.low[0] + w.extent();
  const int64_t first = std::clamp<int64_t>(low, 0, w.input_shape[0]);
  const int64_t last = std::clamp<int64_t>(high, first, w.input_shape[0]);
  map.begin = first * w.input_plane();
  map.sites = (last - first) * w.input_plane();
}

struct ConvForward {
  using Call = ConvFwd;
  using Plan = ForwardPlan;
  template <typename T>
  using Layout = ForwardLayout;

  // Blocks are (item, block of output channels, tile of output sites). Where the whole batch does
  // not fit, it goes in chunks of items; where one item does not, in slabs of planes.
  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    const int64_t budget = tuning.CudaWorkspace(s.w.sites()), batch = std::max<int64_t>(s.batch, 1);
    const int64_t blocks = FiltersOf(s).blocks();
    Plan plan = {1, s.w.output_shape[0], kMaxTile, 0};
    while (plan.tile > tuning.min_tile &&
           batch * blocks * CeilDiv(s.w.output_sites, plan.tile) < kFullGpu) {
      plan.tile /= 2;
    }
    // Half for the maps of as many items as fit, the rest for the pool.
    const auto size = [&] { return SizeOf<ForwardLayout>(s, plan); };
    while (plan.slab_planes > 1 && size() > budget / 2) {
      plan.slab_planes = CeilDiv(plan.slab_planes, 2);
    }
    if (plan.slab_planes == s.w.output_shape[0]) {
      const int64_t items = std::clamp<int64_t>(budget / 2 / size(), 1, batch);
      plan.chunk_items = CeilDiv(batch, CeilDiv(batch, items));  // chunks of one size
    }
    // No site is out of reach of more entries than there are.
    const int64_t sites = std::min(s.w.output_sites, s.in_channels * s.slots * s.w.taps);
    const int64_t fit = (budget - size() - 256) / (4 + 4 * kBlock);
    plan.pool_sites =
        std::max<int64_t>(0, std::min({plan.chunk_items * blocks * sites, fit, kMost}));
    return plan;
  }
  static bool Fits(const ConvShape&, const Plan& plan) {
    return plan.chunk_items >= 1 && plan.chunk_items <= kMost && plan.slab_planes >= 1 &&
           plan.slab_planes <= kMost && plan.tile >= 32 && plan.tile % 32 == 0 &&
           plan.tile <= kMaxTile && plan.pool_sites >= 0 && plan.pool_sites <= kMost;
  }
  static std::string Limit(const ConvShape& s, const Plan& plan, const Tuning& tuning) {
    const int64_t blocks = FiltersOf(s).blocks(), groups = CeilDiv(s.in_channels, kMapGroup);
    const int64_t read = PlanesRead(s.w, plan.slab_planes) * s.w.input_plane();
    const int64_t slab = plan.slab_planes * s.w.output_plane();
    const int64_t zero_blocks =  // no more than all of the workspace is zeroed
        CeilDiv(SizeOf<ForwardLayout>(s, plan), sizeof(uint32_t) * Prepare<float>::kZerosOfBlock);
    return FirstOf({CountLimit(s), SharedLimit(TileBytes(s.w, groups, plan.tile, true), tuning),
                    GridLimit(plan.chunk_items * blocks * CeilDiv(slab, plan.tile)),
                    GridLimit(plan.chunk_items * groups * SiteMap::Chunks(read) +
                              blocks * s.in_channels + zero_blocks)});
  }

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, ConvFwd call, const ConvShape& s, const Plan& plan,
                        const ForwardLayout& layout) {
    ILAJAX_RETURN_IF_ERROR(CheckCounts(s));
    Forward f = layout.f;
    ILAJAX_RETURN_IF_ERROR(ReadSelect(call.select, f.select));
    f.bias = call.bias.typed_data();
    f.out_keys = call.out_keys->typed_data();
    f.out_values = call.out_values->untyped_data();
    f.responses = call.responses->typed_data();
    f.dtype = call.values.element_type();
    f.rank_mask = ~uint32_t{0} << (f.dtype == ffi::DataType::F32 ? 0 : LevelShift(1));
    f.levels = f.dtype == ffi::DataType::F32 ? kLevels : 2;
    // Candidates of a channel: at most the sites, and the products.
    const bool may_cut = s.capacity < s.w.output_sites &&
                         s.capacity < static_cast<double>(s.in_channels) * s.slots * s.w.taps;
    for (int64_t item = 0; item < s.batch; item += plan.chunk_items) {
      f.first_item = static_cast<int>(item);
      f.items = static_cast<int>(std::min(plan.chunk_items, s.batch - item));
      f.ticket_base = 0;
      Chunk<T> chunk = {stream, call, s, plan, layout.zero_words, item};
      f.level = 0;
      ILAJAX_RETURN_IF_ERROR(
          chunk.Pass(f, [&] { return LaunchTiles<Pass::kRespond>(stream, f, s.w); }));
      for (f.level = 1; may_cut && f.level < f.levels; ++f.level) {
        ILAJAX_RETURN_IF_ERROR(
            chunk.Pass(f, [&] { return LaunchTiles<Pass::kRefine>(stream, f, s.w); }));
      }
      ILAJAX_RETURN_IF_ERROR(chunk.Pass(f, [&] {
        const ffi::Error error = LaunchTiles<Pass::kEmit>(stream, f, s.w);
        f.ticket_base += f.items * f.filters.blocks() * f.slab_tiles.value;
        return error;
      }));
    }
    return ffi::Error::Success();
  }

 private:
  // One chunk of the batch. Its passes go over all slabs; the map of a single slab is built once.
  template <typename T>
  struct Chunk {
    cudaStream_t stream;
    ConvFwd& call;
    const ConvShape& s;
    const Plan& plan;
    int64_t zero_words, item;
    int64_t built = -1;  // the plane of the slab whose map there is

    template <typename F>
    ffi::Error Pass(Forward& f, F&& launch) {
      f.first_tile = 0;
      for (int64_t plane = 0; plane < s.w.output_shape[0]; plane += plan.slab_planes) {
        const int64_t end = std::min(plane + plan.slab_planes, s.w.output_shape[0]);
        f.slab_begin = plane * s.w.output_plane();
        f.slab_end = end * s.w.output_plane();
        f.slab_tiles = Divisor(CeilDiv(f.slab_end - f.slab_begin, plan.tile));
        if (built != plane) ILAJAX_RETURN_IF_ERROR(Build(f, plane, end));
        ILAJAX_RETURN_IF_ERROR(launch());
        f.first_tile += f.slab_tiles.value;
      }
      return ffi::Error::Success();
    }

    ffi::Error Build(Forward& f, int64_t plane, int64_t end) {
      CoverInput(s.w, plane, end, f.map);
      const bool first = built < 0;
      built = plane;
      return LaunchPrepare(stream,
                           Prepare<T>{f.map,
                                      {call.keys.typed_data() + s.KeyOffset(item, 0),
                                       Data<T>(call.values) + item * s.in_channels * s.slots,
                                       static_cast<int>(s.slots), s.shared()},
                                      f.items,
                                      f.filters,
                                      call.kernel_keys.typed_data(),
                                      call.weights.typed_data(),
                                      static_cast<int>(s.weights),
                                      first && item == 0,
                                      f.histograms,
                                      first ? zero_words : 0});
    }
  };
};

}  // namespace
}  // namespace ilajax
