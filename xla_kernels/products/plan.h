// How the products of a call are cut, and the parts of its workspace.

#pragma once

#include <algorithm>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/tuning.h"
#include "xla_kernels/products/pairs.h"

namespace ilajax::products {

struct Plan {
  int64_t samples;  // whose stacks there are at once; 0: the call goes by lines
  int64_t chunk;    // sites of a task
  int64_t parts;    // of a sample's sites, each with a gradient of the filter; forward 0
  int64_t workers;
};

// What a sample's tasks share: its sites, and the stacks that they read.
struct Sample {
  SiteIndex index;
  Stacks stacks;
  int32_t* finite;  // whether all values are

  Sample(Carver& carver, const Window& w, int64_t slots, int64_t channels)
      : index(carver, w.input_sites),
        stacks{carver.Take<float>(slots, StackStep(channels)), StackStep(channels)},
        finite(carver.Take<int32_t>(1)) {}
};

struct Worker {
  PairLists lists;
  Stacks sums;  // of a chunk, and one that nobody reads
  Stacks own;   // backward: the chunk's input

  Worker(Carver& carver, const Lines& lines_, int64_t channels, const Plan& plan)
      : lists(carver, lines_, plan.chunk),
        sums{carver.Take<float>(plan.chunk + 1, StackStep(channels)), StackStep(channels)},
        own{carver.Take<float>(plan.parts > 0 ? plan.chunk : 0, StackStep(channels)),
            StackStep(channels)} {}
};

// The workspace of a call that reads stacks of `from` channels and makes those of `to`.
struct Layout {
  Window w;  // transposed, if it is a gradient
  TapReach reach;
  TapMatrices matrices;
  float* bias;         // forward [StackStep(to)]
  float* filter_bars;  // backward [part][tap][EvenRows(to)][StackStep(from)]
  LayoutOfEach<Sample> samples;
  LayoutOfEach<Worker> workers;

  Layout(Carver& carver, const ConvShape& s, const Plan& plan)
      : w(plan.parts > 0 ? Transposed(Squeeze(s.w)) : Squeeze(s.w)),
        reach(carver, w),
        matrices(carver, s.in_channels, s.out_channels, w.taps, plan.parts > 0),
        bias(carver.Take<float>(plan.parts > 0 ? 0 : StackStep(matrices.to))),
        filter_bars(carver.Take<float>(plan.parts, w.taps, EvenRows(matrices.to),
                                       StackStep(matrices.from))),
        samples(carver, plan.samples, w, s.slots, matrices.from),
        workers(carver, plan.workers, reach.lines, matrices.to, plan) {}
};

// A plan, or one of no samples where lines are quicker, or stacks do not fit.
inline Plan MakePlan(const ConvShape& s, const Tuning& tuning, bool backward) {
  Plan plan = {};
  // The gradient by lines costs more than its products where most sites are stored.
  if (s.in_channels * s.out_channels < tuning.products / (backward ? 2 : 1)) return plan;
  const int64_t budget = tuning.CpuWorkspace(s.w.sites());
  const int64_t from = backward ? s.out_channels : s.in_channels;
  const int64_t to = backward ? s.in_channels : s.out_channels;
  plan.chunk = std::clamp<int64_t>((int64_t{1} << 15) / StackStep(to), 64, 512);
  const Lines lines(Squeeze(s.w));
  if (backward) {
    const int64_t filter =
        s.w.taps * EvenRows(to) * StackStep(from) * static_cast<int64_t>(sizeof(float));
    plan.parts = std::clamp<int64_t>(budget / 4 / filter, 1, tuning.tasks);
  }
  const int64_t tables = SizeOf<Layout>(s, plan);
  const int64_t worker = SizeOf<Worker>(lines, to, plan);
  const int64_t sample = SizeOf<Sample>(s.w, s.slots, from);
  plan.workers = std::min<int64_t>(tuning.workers, backward ? plan.parts : tuning.workers);
  while (plan.workers > 2 && plan.workers * worker > budget / 4) --plan.workers;
  const int64_t left = budget - tables - plan.workers * worker;
  plan.samples = std::clamp<int64_t>(left / sample, 0, std::max<int64_t>(s.batch / s.groups, 1));
  return plan.samples == 0 ? Plan{} : plan;
}

inline bool Fits(const Plan& plan, bool backward) {
  if (plan.samples == 0) return true;
  return plan.chunk >= 1 && plan.workers >= 1 && (backward ? plan.parts >= 1 : plan.parts == 0);
}

}  // namespace ilajax::products
