// Convolution at given sites on the GPU, and its gradient: the handlers of conv_at and submanifold.
//
// Forward: one thread a site, with a tile of output channels in its registers. For each tap it
// finds the input's site by bisection, from where the last tap's was, or would be, so that a step along
// the last axis costs one probe, then adds the neighbour's inputs times vectors of weights, which all
// threads of a warp read at the same address. No shared memory, no barriers.
// Backward: values_bar is the same with the reversed window and a transposed filter. weights_bar: a block
// takes a (run of sites, tap, up to four tiles of 8 x 8 channels) and lists the pairs of sites; a
// lane takes a pair, and keeps the tile's sums in its registers to the end. The runs are a fixed
// number, whose sums are added in order. So nothing depends on scheduling.
//
// The filter stands in the workspace as dense vectors, for a block of channels at a time where it
// is large. Traffic: neighbours' values once for each tap with live weights and tile of 32
// channels, mostly from the caches, since neighbours of consecutive sites lie together; features
// are written once, coalesced.

#pragma once

#include <algorithm>

#include "xla_kernels/products/cuda_weights.cuh"

namespace ilajax {
namespace {

// The filter in the workspace, `block` columns of it at a time.
Filter CarveFilter(Carver& carver, const ConvShape& s, int64_t block, bool transposed) {
  Filter f = {nullptr, nullptr, s.w.taps, s.in_channels, s.out_channels, 0, block, transposed};
  f.vectors = carver.Take<float>(f.taps, f.summed_channels(), block);
  f.live = carver.Take<uint32_t>(f.taps, CeilDiv(block, kNarrowTile), f.groups());
  return f;
}

// As many columns at a time as fit into `bytes`.
int64_t BlockOf(const ConvShape& s, bool transposed, int64_t bytes) {
  int64_t block = CeilDiv(transposed ? s.in_channels : s.out_channels, kTile) * kTile;
  const auto size = [&] {
    Carver carver(nullptr);
    CarveFilter(carver, s, block, transposed);
    return carver.used();
  };
  while (block > kTile && size() > bytes) block = CeilDiv(block, 2 * kTile) * kTile;
  return block;
}

bool IsBlock(int64_t block) { return block >= kTile && block % kTile == 0; }

// Makes the filter of the block of columns from `first`.
ffi::Error Fill(cudaStream_t stream, const ConvShape& s, const Filter& f,
                const int32_t* kernel_keys, const float* weights, int64_t count,
                int32_t* responses) {
  // Without weights there are responses still, all 0.
  const int64_t cells = std::max(f.taps * f.summed_channels() * f.block, count);
  ILAJAX_RETURN_IF_ERROR(Launch<ZeroKernel>(GridFor(CeilDiv(cells, kThreads)), kThreads, 0, stream,
                                            f, count, responses));
  return Launch<FillKernel>(GridFor(CeilDiv(s.weights, kThreads)), kThreads, 0, stream, f,
                            s.weights, kernel_keys, weights);
}

// The keys of a call's output, and whether they are the input's.
template <typename Call>
constexpr bool kOwn = !requires(Call call) { call.out_keys; };
template <typename Call>
const int32_t* OutKeys(Call& call) {
  if constexpr (kOwn<Call>) {
    return call.keys.typed_data();
  } else {
    return call.out_keys.typed_data();
  }
}

// Calls f with the reach of a window of three axes at most, or of any.
template <typename F>
ffi::Error WithReach(const Window& w, F&& f) {
  return w.rank <= 3 ? f(Reach<3>(w)) : f(Reach<kMaxRank>(w));
}

template <typename T, int R>
ffi::Error ApplyFilter(cudaStream_t stream, const Apply<T>& a, const Reach<R>& reach) {
  const dim3 grid = GridFor(a.items * CeilDiv(a.slots, kSites) * a.filter.tiles());
  if (a.filter.tile() == kNarrowTile) {
    return Launch<ApplyKernel<T, kNarrowTile, R>>(grid, kSites, 0, stream, a, reach);
  }
  return Launch<ApplyKernel<T, kTile, R>>(grid, kSites, 0, stream, a, reach);
}

template <typename T>
ffi::Error ApplyFilter(cudaStream_t stream, const Window& w, Apply<T> a) {
  a.sites = w.output_sites;
  return WithReach(w, [&](const auto& reach) { return ApplyFilter<T>(stream, a, reach); });
}

template <typename CallOfOp>
struct AtSitesForward {
  using Call = CallOfOp;
  struct Plan {
    int64_t block;  // output channels at a time
  };
  template <typename T>
  struct Layout {
    Filter filter;

    Layout(Carver& carver, const ConvShape& s, const Plan& plan)
        : filter(CarveFilter(carver, s, plan.block, false)) {}
  };

  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    return {BlockOf(s, false, tuning.CudaWorkspace(s.w.sites()))};
  }
  static bool Fits(const ConvShape&, const Plan& plan) { return IsBlock(plan.block); }

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, Call call, const ConvShape& s, const Plan& plan,
                        const Layout<T>& layout) {
    Filter f = layout.filter;
    for (; f.first < s.out_channels; f.first += plan.block) {
      ILAJAX_RETURN_IF_ERROR(
          Fill(stream, s, f, call.kernel_keys.typed_data(), call.weights.typed_data(),
               f.first == 0 ? s.batch * s.out_channels : 0, call.responses->typed_data()));
      ILAJAX_RETURN_IF_ERROR(ApplyFilter<T>(
          stream, s.w,
          {f, kOwn<Call>, s.batch, s.slots, s.capacity, s.out_channels, call.keys.typed_data(),
           OutKeys(call), Data<T>(call.values), Data<T>(*call.features), call.bias.typed_data(),
           call.responses->typed_data(), false}));
    }
    return ffi::Error::Success();
  }
};

template <typename CallOfOp>
struct AtSitesBackward {
  using Call = CallOfOp;
  struct Plan {
    int64_t in_block;   // input channels at a time, for their values
    int64_t out_block;  // output channels at a time, for the weights
    int64_t parts;      // runs of sites, each with sums of the weights
  };
  template <typename T>
  struct Layout {
    Filter filter;
    float* sums;  // [group][part][tap][ic][channel of the block]

    Layout(Carver& carver, const ConvShape& s, const Plan& plan)
        : filter(CarveFilter(carver, s, plan.in_block, true)),
          sums(carver.Take<float>(s.groups, plan.parts, s.w.taps, s.in_channels, plan.out_block)) {}
  };

  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    constexpr int64_t kBlocks = 1024;  // fill the largest GPUs several times over
    const int64_t half = tuning.CudaWorkspace(s.w.sites()) / 2;
    const int64_t column = std::max<int64_t>(
        s.groups * s.w.taps * s.in_channels * static_cast<int64_t>(sizeof(float)), 1);
    Plan plan = {BlockOf(s, true, half), 0, 0};
    plan.out_block = std::max<int64_t>(1, std::min(s.out_channels, half / column));
    const int64_t units = s.batch / s.groups * CeilDiv(s.capacity, kPairThreads);
    const int64_t blocks = std::max<int64_t>(
        s.groups * s.w.taps * WeightTiles(s.in_channels, plan.out_block).blocks(), 1);
    plan.parts = std::max<int64_t>(
        1, std::min({units, CeilDiv(kBlocks, blocks), half / (column * plan.out_block)}));
    return plan;
  }
  static bool Fits(const ConvShape&, const Plan& plan) {
    return IsBlock(plan.in_block) && plan.out_block >= 1 && plan.parts >= 1;
  }

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, Call call, const ConvShape& s, const Plan& plan,
                        const Layout<T>& layout) {
    const int32_t *const keys = call.keys.typed_data(), *const out_keys = OutKeys(call);
    const int32_t* const kernel_keys = call.kernel_keys.typed_data();
    const T *const values = Data<T>(call.values), *const cotangent = Data<T>(call.cotangent);
    const int64_t items = s.batch / s.groups;
    Filter f = layout.filter;
    for (; f.first < s.in_channels; f.first += plan.in_block) {
      ILAJAX_RETURN_IF_ERROR(
          Fill(stream, s, f, kernel_keys, call.weights.typed_data(), 0, nullptr));
      ILAJAX_RETURN_IF_ERROR(
          ApplyFilter<T>(stream, Reversed(s.w),
                         {f, kOwn<Call>, s.batch, s.capacity, s.slots, s.in_channels, out_keys,
                          keys, cotangent, Data<T>(*call.values_bar), nullptr, nullptr, false}));
    }
    for (int64_t first = 0; first < s.out_channels; first += plan.out_block) {
      const WeightTiles tiles(s.in_channels, plan.out_block);
      const WeightSums<T> a = {
          tiles,          kOwn<Call>, s.w.taps,   s.w.output_sites, s.groups,       items,
          plan.parts,     s.slots,    s.capacity, s.in_channels,    s.out_channels, first,
          plan.out_block, keys,       out_keys,   values,           cotangent,      layout.sums};
      ILAJAX_RETURN_IF_ERROR(WithReach(s.w, [&]<int R>(const Reach<R>& reach) {
        return Launch<WeightSumsKernel<T, R>>(
            GridFor(s.groups * plan.parts * s.w.taps * tiles.blocks()), kPairThreads, 0, stream, a,
            reach);
      }));
      const Filter columns = {nullptr,        nullptr, s.w.taps,       s.in_channels,
                              s.out_channels, first,   plan.out_block, false};
      ILAJAX_RETURN_IF_ERROR(Launch<GatherKernel>(
          GridFor(CeilDiv(s.groups * s.weights, kThreads)), kThreads, 0, stream, columns, s.groups,
          plan.parts, s.weights, kernel_keys, layout.sums, call.weights_bar->typed_data()));
    }
    return Launch<BiasKernel<T>>(GridFor(s.groups * s.out_channels), kThreads, 0, stream, s.groups,
                                 items, s.out_channels, s.capacity, s.w.output_sites, out_keys,
                                 cotangent, call.bias_bar->typed_data());
  }
};

}  // namespace
}  // namespace ilajax
