// The gradient of a convolution with given outputs: those that it has kept, or the input's own
// sites.
//
// A task for each of a fixed number of runs of (sample, slab of input planes). Each output line
// within reach gets the cotangents of its kept outputs, and every stored input of the lists gathers
// from there what its own cotangent and the weights' need; or the same in the dense form of the
// transposed convolution. Partial sums of the weights are added in the order of the tasks.

#pragma once

#include <algorithm>

#include "xla_kernels/lines/line.h"

namespace ilajax {

struct GradientPlan {
  int64_t block;          // output channels
  int64_t line_sites;     // of a line's buffer
  int64_t spread_lines;   // output lines whose cotangents are spread at once
  int64_t slab_planes;    // input planes of a task, at most
  int64_t dense_planes;   // of them, laid out densely at once; 0: never
  int64_t dense_percent;  // see Tuning
  int64_t max_entries;    // sorted at once
  int64_t parts;          // tasks of a group, each with a gradient of the filter
  int64_t workers;
};

// What all workers share.
struct GradientTables {
  Window w;
  Lines lines, transposed;
  Filters filters;
  TapLines tap_lines;
  bool has_dense;
  DenseLines dense_lines;  // of the cotangents, as transposed lines read them
  LiveTaps live_taps;
  // The filters' weights with channels exchanged, [block][line of taps][tap][channel of the block][ic]:
  // for stacks, of whole vectors of input channels.
  float* transposed_weights;
  float* part_bars;  // [group][part]: of the weights, as Filters::weights

  GradientTables(Carver& carver, const ConvShape& s, const GradientPlan& plan)
      : w(Squeeze(s.w)),
        lines(w),
        transposed(Transposed(w)),
        filters(carver, s, plan.block, lines.line.taps),
        tap_lines(carver, filters.blocks, lines.tap_lines),
        has_dense(plan.dense_planes > 0),
        dense_lines(transposed.line, s.out_channels),
        live_taps(carver, has_dense ? s.in_channels : 0, has_dense ? lines.tap_lines : 0,
                  has_dense ? s.weights : 0),
        transposed_weights(s.in_channels % kLanes == 0 ? carver.Take<float>(filters.size())
                                                       : nullptr),
        part_bars(carver.Take<float>(s.groups, plan.parts, filters.size())) {}

  void TransposeWeights() const {
    if (transposed_weights == nullptr) return;
    const int64_t row = filters.line_taps * filters.block;
    for (int64_t run = 0; run < filters.blocks * filters.tap_lines(); ++run) {
      const float* from = filters.weights + run * filters.in_channels * row;
      float* to = transposed_weights + run * filters.in_channels * row;
      for (int64_t i = 0; i < row; ++i) {
        for (int64_t ic = 0; ic < filters.in_channels; ++ic, ++to) *to = from[ic * row + i];
      }
    }
  }
};

struct GradientWorker {
  LineBuffer line;  // that of one of the lines below
  float* spread;    // [line][site of its buffer][channel of the block]: cotangents, 0 in between
  uint8_t* filled;  // [line]: whether it has any
  bool* clear;      // whether that holds: not before the worker's first task
  LineEntries entries;
  Segment* segments;
  int32_t* begins;               // [oc]: the kept outputs that are spread, as slots [begin, end)
  int32_t* ends;                 // [oc]
  float* weights_bar = nullptr;  // of the task's part
  bool has_products = false;     // whether the task has added to those below
  // Of the dense form:
  float* cotangents;    // DenseSlab::values
  float* products;      // [live tap][lane]: shares of the weights' gradient
  float* own;           // one input line of one channel; zero in between
  float* sums;          // what it gets
  const float** bases;  // [line of taps]
  uint8_t* laid_out;    // DenseSlab::filled

  GradientWorker(Carver& carver, const GradientTables& t, const GradientPlan& plan)
      : line(t.lines.line, plan.line_sites, plan.block),
        spread(carver.Take<float>(plan.spread_lines, plan.line_sites, plan.block)),
        filled(carver.Take<uint8_t>(plan.spread_lines)),
        clear(carver.Take<bool>(1)),
        entries(carver,
                std::min(plan.slab_planes, t.lines.input_planes) * t.lines.input_plane_lines,
                t.lines.line.input_length, line.plain, plan.max_entries, true),
        segments(carver.Take<Segment>(t.lines.tap_lines)),
        begins(carver.Take<int32_t>(plan.block)),
        ends(carver.Take<int32_t>(plan.block)) {
    const int64_t dense_lines = t.has_dense ? t.transposed.InputLines(plan.dense_planes) : 0;
    const int64_t line_floats = t.has_dense ? t.dense_lines.vectors * kLanes : 0;
    cotangents = carver.Take<float>(dense_lines, t.dense_lines.size());
    products = carver.Take<float>(t.live_taps.weights, kLanes);
    own = carver.Take<float>(line_floats);
    sums = carver.Take<float>(line_floats);
    bases = carver.Take<const float*>(t.has_dense ? t.lines.tap_lines : 0);
    laid_out = carver.Take<uint8_t>(dense_lines);
  }

  // Before a task.
  void Clear(const GradientTables& t, const GradientPlan& plan) const {
    if (*clear) return;
    std::fill_n(spread, plan.spread_lines * plan.line_sites * plan.block, 0.0f);
    std::fill_n(filled, plan.spread_lines, uint8_t{0});
    if (t.has_dense) std::fill_n(own, t.dense_lines.vectors * kLanes, 0.0f);
    *clear = true;
  }
};

struct GradientLayout {
  GradientTables tables;
  LayoutOfEach<GradientWorker> workers;

  GradientLayout(Carver& carver, const ConvShape& s, const GradientPlan& plan)
      : tables(carver, s, plan), workers(carver, plan.workers, tables, plan) {}
};

GradientPlan MakeGradientPlan(const ConvShape& s, const Tuning& tuning);
bool Fits(const ConvShape& s, const GradientPlan& plan);

// The buffers of the call.
template <typename T>
struct GradientCall {
  const int32_t* keys;
  const T* values;
  const int32_t* kernel_keys;
  const float* weights;
  const int32_t* out_keys;
  bool out_shared;  // one list of output keys for all channels of a sample
  const T* cotangent;
  T* values_bar;
  float* weights_bar;
  float* bias_bar;
};

// Of float, BFloat16 and Float16.
template <typename T>
void RunGradient(ffi::ThreadPool& pool, const GradientCall<T>& call, const ConvShape& s,
                 const GradientPlan& plan, GradientLayout& layout);

// A handler of such a gradient. `Spec` has the members of ConvBwd, but maybe for out_keys.
template <typename Spec>
struct LineGradient {
  using Call = Spec;
  using Plan = GradientPlan;
  template <typename T>
  using Layout = GradientLayout;

  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    return MakeGradientPlan(s, tuning);
  }
  static bool Fits(const ConvShape& s, const Plan& plan) { return ilajax::Fits(s, plan); }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, Spec call, const ConvShape& s, const Plan& plan,
                        GradientLayout& layout) {
    const int32_t* out_keys = call.keys.typed_data();
    constexpr bool kHasOutKeys = requires { call.out_keys; };
    if constexpr (kHasOutKeys) out_keys = call.out_keys.typed_data();
    RunGradient<T>(
        pool,
        {call.keys.typed_data(), Data<T>(call.values), call.kernel_keys.typed_data(),
         call.weights.typed_data(), out_keys, !kHasOutKeys, Data<T>(call.cotangent),
         Data<T>(*call.values_bar), call.weights_bar->typed_data(), call.bias_bar->typed_data()},
        s, plan, layout);
    return ffi::Error::Success();
  }
};

}  // namespace ilajax
