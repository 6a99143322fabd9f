// The gradient: how it is cut, its workspace, its launches; see cuda.cu.

#pragma once

#include <algorithm>

#include "xla_kernels/conv/cuda_gradient.cuh"

namespace ilajax {
namespace {

struct BackwardPlan {
  int64_t chunk_items;  // of the batch, at a time
  int64_t slab_planes;  // of the input, at a time
  int64_t span;         // items that share sums of the weights
  int64_t parts;        // of one item, each with its own
};

// Whether the sums of the weights fit into shared memory beside the taps on every device: a plan,
// which knows none, keeps them in the workspace.
bool SumsInShared(const ConvShape& s) {
  const int64_t blocks = CeilDiv(s.out_channels, kBlock);
  return TapBytes(s.w, CeilDiv(blocks, 32)) + s.w.taps * blocks * kBlock * kGradientWarps * 4 <=
         kSharedAnywhere - kStaticShared;
}

// The numbers and the workspace of all launches, for `all_parts` sums of the weights in a slab.
Backward CarveBackward(Carver& carver, const ConvShape& s, const BackwardPlan& plan,
                       int64_t all_parts) {
  const Window& w = s.w;
  Backward b = {};
  b.filters = FiltersOf(s);
  b.batch = static_cast<int>(s.batch);
  b.slots = static_cast<int>(s.slots);
  b.capacity = static_cast<int>(s.capacity);
  b.weights = static_cast<int>(s.weights);
  b.groups = static_cast<int>(s.groups);
  b.shared = s.shared();
  b.input_sites = w.input_sites;
  b.output_sites = w.output_sites;
  b.slabs = static_cast<int>(CeilDiv(w.input_shape[0], plan.slab_planes));
  b.span = static_cast<int>(plan.span);
  b.parts = static_cast<int>(plan.parts);
  b.sums_in_shared = SumsInShared(s);
  b.map.channels = static_cast<int>(s.out_channels);
  const int64_t reached =
      b.slabs == 1 ? w.output_shape[0] : (plan.slab_planes + w.extent() - 2) / w.strides[0] + 1;
  b.map.sites = std::min(reached, w.output_shape[0]) * w.output_plane();
  b.map.slots = static_cast<int>(std::min(s.capacity, b.map.sites));
  b.filters.Carve(carver);
  b.map.Carve(carver, plan.chunk_items);
  b.sums = carver.Take<float>(b.slabs, all_parts, s.in_channels, b.copies(), w.taps, b.width());
  b.bias_sums = carver.Take<float>(s.batch, s.out_channels, b.bias_strips());
  return b;
}

struct BackwardLayout {
  Backward b;

  BackwardLayout(Carver& carver, const ConvShape& s, const BackwardPlan& plan)
      : b(CarveBackward(carver, s, plan, s.batch / plan.span * plan.parts)) {}
};

int64_t GradientBytes(const ConvShape& s) {
  const int64_t blocks = CeilDiv(s.out_channels, kBlock);
  return TapBytes(s.w, CeilDiv(blocks, 32)) +
         (SumsInShared(s) ? s.w.taps * blocks * kBlock * kGradientWarps * 4 : 0);
}

template <typename T, int R>
ffi::Error LaunchGradient(cudaStream_t stream, const Backward& b, const ConvShape& s,
                          const T* values, const T* cotangent, T* values_bar) {
  const int64_t bytes = GradientBytes(s);
  ILAJAX_RETURN_IF_ERROR(CheckShared(s.w, bytes));
  return LaunchEach<GradientKernel<T, R>>(b.gradient_blocks() + b.bias_blocks(), kGradientThreads,
                                          bytes, stream, b, Axes<R>(s.w), values, cotangent,
                                          values_bar);
}

struct ConvBackward {
  using Call = ConvBwd;
  using Plan = BackwardPlan;
  template <typename T>
  using Layout = BackwardLayout;

  // Blocks are (item or run of items, input channel, part of its stored entries).
  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    const int64_t budget = tuning.CudaWorkspace(s.w.sites());
    const int64_t batch = std::max<int64_t>(s.batch, 1), group_items = batch / s.groups;
    Plan plan = {1, s.w.input_shape[0], 1, 1};
    const auto size = [&](int64_t items, int64_t all_parts) {
      Carver carver(nullptr);
      CarveBackward(carver, s, {items, plan.slab_planes, 1, 1}, all_parts);
      return carver.used();
    };
    while (plan.slab_planes > 1 && size(1, 1) > budget / 2) {
      plan.slab_planes = CeilDiv(plan.slab_planes, 2);
    }
    const int64_t slabs = CeilDiv(s.w.input_shape[0], plan.slab_planes);
    const int64_t part = s.in_channels * (SumsInShared(s) ? 1 : kGradientWarps) * s.w.taps *
                         CeilDiv(s.out_channels, kBlock) * kBlock * 4;
    const int64_t sums = std::max(budget / 8, part);
    // Items share their sums where those of each would not fit; where there are few, each has
    // parts. Of an open batch each has its own, since no number divides it for certain.
    while (!tuning.open_batch && plan.span < group_items &&
           (group_items % plan.span != 0 || slabs * (batch / plan.span) * part > sums)) {
      ++plan.span;
    }
    if (plan.span == 1) {
      const int64_t wanted = CeilDiv(2 * kFullGpu, std::max<int64_t>(batch * s.in_channels, 1));
      const int64_t fit = sums / std::max<int64_t>(slabs * batch * part, 1);
      plan.parts = std::max<int64_t>(1, std::min({wanted, CeilDiv(s.slots, kStrip), fit}));
    }
    plan.chunk_items = plan.span;
    if (slabs == 1) {
      const int64_t fixed = size(0, batch / plan.span * plan.parts);
      const int64_t each = size(1, 0) - size(0, 0);
      const int64_t fit = (budget - fixed) / (each * plan.span);
      plan.chunk_items *= std::max<int64_t>(1, std::min(batch / plan.span, fit));
    }
    return plan;
  }
  static bool Fits(const ConvShape& s, const Plan& plan) {
    return plan.chunk_items >= 1 && plan.chunk_items <= kMost && plan.slab_planes >= 1 &&
           plan.slab_planes <= kMost && plan.span >= 1 && plan.parts >= 1 &&
           (plan.span == 1 || plan.parts == 1) && s.batch / s.groups % plan.span == 0 &&
           plan.chunk_items % plan.span == 0;
  }
  static std::string Limit(const ConvShape& s, const Plan& plan, const Tuning& tuning) {
    const int64_t blocks = CeilDiv(s.out_channels, kBlock);
    const int64_t sums = s.w.taps * blocks * kBlock * kGradientWarps;
    const int64_t strips = CeilDiv(s.capacity, kBiasStrip);
    return FirstOf({CountLimit(s),
                    sums > kMost ? std::to_string(sums) + " sums of weights are 2^31 or more" : "",
                    SharedLimit(GradientBytes(s), tuning),
                    GridLimit(plan.chunk_items / plan.span * plan.parts * s.in_channels +
                              plan.chunk_items * s.out_channels * strips),
                    GridLimit(plan.chunk_items * CeilDiv(s.out_channels, kMapGroup) *
                                  SiteMap::Chunks(s.w.output_sites) +
                              blocks * s.in_channels)});
  }

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, ConvBwd call, const ConvShape& s, const Plan& plan,
                        const BackwardLayout& layout) {
    ILAJAX_RETURN_IF_ERROR(CheckCounts(s));
    if (s.w.taps * CeilDiv(s.out_channels, kBlock) * kBlock * kGradientWarps > kMost) {
      return InvalidArgument("conv: ", s.w.taps, " taps of ", s.out_channels,
                             " channels, on a GPU");
    }
    Backward b = layout.b;
    b.keys = call.keys.typed_data();
    b.out_keys = call.out_keys.typed_data();
    b.kernel_keys = call.kernel_keys.typed_data();
    b.weights_bar = call.weights_bar->typed_data();
    b.bias_bar = call.bias_bar->typed_data();
    const T* const cotangent = Data<T>(call.cotangent);
    const auto launch = s.w.rank <= 3 ? LaunchGradient<T, 3> : LaunchGradient<T, kMaxRank>;
    for (int64_t item = 0; item < s.batch; item += plan.chunk_items) {
      b.first_item = static_cast<int>(item);
      b.items = static_cast<int>(std::min(plan.chunk_items, s.batch - item));
      for (b.slab = 0; b.slab < b.slabs; ++b.slab) {
        const int64_t begin = b.slab * plan.slab_planes;
        const int64_t end = std::min(begin + plan.slab_planes, s.w.input_shape[0]);
        b.slab_begin = begin * s.w.input_plane();
        b.slab_end = end * s.w.input_plane();
        CoverOutput(s.w, begin, end, b.map);
        const int64_t segment = item * s.out_channels;
        const Prepare<T> prepare = {b.map,
                                    {b.out_keys + segment * s.capacity,
                                     cotangent + segment * s.capacity, b.capacity, false},
                                    b.items,
                                    b.filters,
                                    b.kernel_keys,
                                    call.weights.typed_data(),
                                    b.weights,
                                    item == 0 && b.slab == 0,
                                    nullptr,
                                    0};
        ILAJAX_RETURN_IF_ERROR(LaunchPrepare(stream, prepare));
        ILAJAX_RETURN_IF_ERROR(
            launch(stream, b, s, Data<T>(call.values), cotangent, Data<T>(*call.values_bar)));
      }
    }
    const int64_t tasks = s.groups * (s.weights + s.out_channels);
    return Launch<FinishKernel>(GridFor(CeilDiv(tasks, kGradientWarps)), kGradientThreads, 0,
                                stream, b);
  }

 private:
  // The slab of output sites that input planes [begin, end) reach.
  static void CoverOutput(const Window& w, int64_t begin, int64_t end, SiteMap& map) {
    const int64_t lowest = begin + w.low[0] - w.extent() + 1, highest = end - 1 + w.low[0];
    const int64_t first =
        std::clamp<int64_t>(lowest <= 0 ? 0 : CeilDiv(lowest, w.strides[0]), 0, w.output_shape[0]);
    const int64_t last =
        std::clamp<int64_t>(highest < 0 ? 0 : highest / w.strides[0] + 1, first, w.output_shape[0]);
    map.begin = first * w.output_plane();
    map.sites = (last - first) * w.output_plane();
  }
};

}  // namespace
}  // namespace ilajax
