// How the products of a call are cut, and the parts of its workspace.

#pragma once

#include <algorithm>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/tuning.h"
#include "xla_kernels/products/pairs.h"

namespace ilajax::products {

struct Plan {
  int64_t samples;  // that are laid out at once
  int64_t stacked;  // 1: with stacks of all their values; 0: each tap gathers its own
  int64_t chunk;    // sites of a task
  int64_t parts;    // of a sample's sites, each with a gradient of the filter; forward 0
  int64_t workers;
};

// The sizes of one direction: what the taps read, and the sites that they make.
struct Direction {
  bool backward;
  Window w;  // spread apart
  int64_t from_slots, from, to_slots, to;

  Direction(const ConvShape& s, bool is_backward) : backward(is_backward) {
    const Window squeezed = Squeeze(s.w);
    w = SpreadApart(backward ? Reversed(squeezed) : squeezed);
    from_slots = s.slots, from = s.in_channels, to_slots = s.capacity, to = s.out_channels;
    if (backward) std::swap(from_slots, to_slots), std::swap(from, to);
  }
};

// What a sample's tasks share: its sites, and the stacks that they read.
struct Sample {
  SiteIndex index;
  bool stacked;
  Stacks stacks;
  int32_t* finite;  // whether all values are

  Sample(Carver& carver, const Direction& d, const Plan& plan)
      : index(carver, d.w),
        stacked(plan.stacked != 0),
        stacks{carver.Take<float>(stacked ? d.from_slots : 0, StackStep(d.from)),
               StackStep(d.from)},
        finite(carver.Take<int32_t>(1)) {}
};

struct Worker {
  PairLists lists;
  Stacks sums;      // of a chunk, and one that nobody reads
  Stacks own;       // backward: the chunk's input
  Stacks gathered;  // what the pairs of a tap read, where the sample has no stacks
  Pair* pairs;      // to them

  Worker(Carver& carver, const Lines& lines_, const Direction& d, const Plan& plan)
      : lists(carver, lines_, plan.chunk),
        sums{carver.Take<float>(plan.chunk + 1, StackStep(d.to)), StackStep(d.to)},
        own{carver.Take<float>(d.backward ? plan.chunk : 0, StackStep(d.to)), StackStep(d.to)},
        gathered{carver.Take<float>(plan.stacked ? 0 : lists.room, StackStep(d.from)),
                 StackStep(d.from)},
        pairs(carver.Take<Pair>(plan.stacked ? 0 : lists.room)) {}
};

struct Layout {
  Direction d;
  TapReach reach;
  TapMatrices matrices;
  float* bias;         // forward [StackStep(to)]
  float* filter_bars;  // backward [part][tap][EvenRows(to)][StackStep(from)]
  LayoutOfEach<Sample> samples;
  LayoutOfEach<Worker> workers;

  Layout(Carver& carver, const ConvShape& s, const Plan& plan)
      : d(s, plan.parts > 0),
        reach(carver, d.w),
        matrices(carver, s.in_channels, s.out_channels, d.w.taps, d.backward),
        bias(carver.Take<float>(d.backward ? 0 : StackStep(d.to))),
        filter_bars(carver.Take<float>(plan.parts, d.w.taps, EvenRows(d.to), StackStep(d.from))),
        samples(carver, plan.samples, d, plan),
        workers(carver, plan.workers, reach.lines, d, plan) {}
};

// A plan; where the stacks of a sample have no room, one without them. An op may want more bytes for
// each sample, and for each worker.
inline Plan MakePlan(const ConvShape& s, const Tuning& tuning, bool backward,
                     int64_t more_of_sample = 0, int64_t more_of_worker = 0) {
  const Direction d(s, backward);
  const int64_t budget = tuning.CpuWorkspace(s.w.sites());
  Plan plan = {};
  plan.stacked = 1;
  plan.chunk = std::clamp<int64_t>((int64_t{1} << 15) / StackStep(d.to), 64, 512);
  const Lines lines(d.w);
  if (backward) {
    const int64_t filter =
        d.w.taps * EvenRows(d.to) * StackStep(d.from) * static_cast<int64_t>(sizeof(float));
    plan.parts = std::clamp<int64_t>(budget / 4 / filter, 1, tuning.tasks);
  }
  const int64_t tables = SizeOf<Layout>(s, plan);
  const int64_t worker = SizeOf<Worker>(lines, d, plan) + more_of_worker;
  const int64_t sample = SizeOf<Sample>(d, plan) + more_of_sample;
  plan.workers = std::min<int64_t>(tuning.workers, backward ? plan.parts : tuning.workers);
  while (plan.workers > 2 && plan.workers * worker > budget / 4) --plan.workers;
  const int64_t left = budget - tables - plan.workers * worker;
  plan.samples = std::clamp<int64_t>(left / sample, 0, std::max<int64_t>(s.batch / s.groups, 1));
  if (plan.samples == 0) plan.samples = 1, plan.stacked = 0;
  return plan;
}

inline bool Fits(const Plan& plan, bool backward) {
  return plan.samples >= 1 && plan.chunk >= 1 && plan.workers >= 1 &&
         (backward ? plan.parts >= 1 : plan.parts == 0);
}

}  // namespace ilajax::products
