// How the products of a call are cut, and the parts of its workspace.

#pragma once

#include <algorithm>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/tuning.h"
#include "xla_kernels/products/pairs.h"

namespace ilajax::products {

struct Plan {
  int64_t samples;  // that are laid out at once
  int64_t chunk;    // sites of a task
  int64_t near;     // sites whose stacks a worker has at once: those that a chunk reads
  int64_t parts;    // of a sample's sites, each with a gradient of the filter; forward 0
  int64_t taps;     // 0: a part has a gradient of all taps; else of so many at a time, one part
  int64_t mapped;   // 1: pairs come from a map that the call is given
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

struct Worker {
  PairLists lists;
  Stacks sums;  // of a chunk, and one that nobody reads
  Stacks own;   // backward: the chunk's input
  int64_t near_room;
  Stacks near;  // [near_room], what the taps read, some of them at a time
  Pair* pairs;  // to stacks that were gathered

  Worker(Carver& carver, const Lines& lines_, const Direction& d, const Plan& plan)
      : lists(carver, lines_, plan.chunk, plan.mapped),
        sums{carver.Take<float>(plan.chunk + 1, StackStep(d.to)), StackStep(d.to)},
        own{carver.Take<float>(d.backward ? plan.chunk : 0, StackStep(d.to)), StackStep(d.to)},
        near_room(std::max(plan.near, lists.room)),
        near{carver.Take<float>(near_room, StackStep(d.from)), StackStep(d.from)},
        pairs(carver.Take<Pair>(lists.room)) {}
};

struct Layout {
  Direction d;
  TapReach reach;
  TapMatrices matrices;
  float* bias;         // forward [StackStep(to)]
  float* filter_bars;  // backward [part][tap][EvenRows(to)][StackStep(from)]
  LayoutOfEach<SiteIndex> samples;
  LayoutOfEach<Worker> workers;

  Layout(Carver& carver, const ConvShape& s, const Plan& plan)
      : d(s, plan.parts > 0),
        reach(carver, d.w),
        matrices(carver, s.in_channels, s.out_channels, d.w.taps, d.backward),
        bias(carver.Take<float>(d.backward ? 0 : StackStep(d.to))),
        filter_bars(carver.Take<float>(plan.parts, d.w.taps, EvenRows(d.to), StackStep(d.from))),
        samples(carver, plan.mapped ? 0 : plan.samples, d.w),
        workers(carver, plan.workers, reach.lines, d, plan) {}
};

// Whether a call takes a site map: layers within one grid do, whose gradient mostly shares it with them. Those
// between two grids would use theirs once, and lose what it takes to write and to read it. A map stays in
// memory for as long as layers share it, so it may not be larger than what a layer reads and writes.
inline bool IsMapped(const ConvShape& s, const Lines& lines, const Tuning& tuning) {
  const auto one = [](int64_t step) { return step == 1; };
  return tuning.site_maps > 0 && s.map_items != kUnread &&
         std::all_of(s.w.strides, s.w.strides + s.w.rank, one) &&
         std::all_of(s.w.input_dilation, s.w.input_dilation + s.w.rank, one) &&
         MapWords(lines) <= s.in_channels + s.out_channels;
}

// A plan. An op may want more bytes for each sample, and for each worker.
inline Plan MakePlan(const ConvShape& s, const Tuning& tuning, bool backward,
                     int64_t more_of_sample = 0, int64_t more_of_worker = 0) {
  const Direction d(s, backward);
  const int64_t budget = tuning.CpuWorkspace(s.w.sites());
  Plan plan = {};
  plan.chunk = std::clamp<int64_t>((int64_t{1} << 15) / StackStep(d.to), 64, 512);
  plan.chunk = std::clamp<int64_t>(d.to_slots, 1, plan.chunk);
  plan.near = std::clamp<int64_t>((int64_t{1} << 17) / StackStep(d.from), 512, 8192);
  plan.near = std::clamp<int64_t>(d.from_slots, 1, plan.near);
  const int64_t items = std::max<int64_t>(s.batch / std::max<int64_t>(s.groups, 1), 1);
  int64_t tasks = items * CeilDiv(d.to_slots, plan.chunk);
  const Lines lines(d.w);
  if (backward) {
    const int64_t filter =
        d.w.taps * EvenRows(d.to) * StackStep(d.from) * static_cast<int64_t>(sizeof(float));
    plan.parts = std::clamp<int64_t>(budget / 4 / filter, 1, tuning.tasks);
    // Too few parts to keep workers busy: these take taps instead.
    if (2 * plan.parts < tuning.tasks) plan.parts = 1, plan.taps = CeilDiv(d.w.taps, tuning.tasks);
    if (plan.taps == 0) tasks = plan.parts;
  }
  plan.mapped = IsMapped(s, lines, tuning);
  const int64_t tables = SizeOf<Layout>(s, plan);
  const int64_t worker = SizeOf<Worker>(lines, d, plan) + more_of_worker;
  const int64_t sample = SizeOf<SiteIndex>(d.w) + more_of_sample;
  plan.workers = std::clamp<int64_t>(tasks, 1, tuning.workers);
  while (plan.workers > 2 && plan.workers * worker > budget / 2) --plan.workers;
  const int64_t left = budget - tables - plan.workers * worker;
  plan.samples = plan.mapped ? items : std::clamp<int64_t>(left / sample, 1, items);
  return plan;
}

// The words of a slot in the map that a call takes by this plan.
inline int64_t MapWords(const ConvShape& s, const Plan& plan, bool backward) {
  return plan.mapped ? MapWords(Lines(Direction(s, backward).w)) : 0;
}

inline bool Fits(const ConvShape& s, const Plan& plan, bool backward) {
  if (plan.mapped != 0) {
    const Direction d(s, backward);
    if (plan.mapped != 1 || s.map_items != s.batch || s.map_slots != d.to_slots ||
        s.map_words != MapWords(Lines(d.w))) {
      return false;
    }
  }
  return plan.samples >= 1 && plan.chunk >= 1 && plan.near >= 1 && plan.workers >= 1 &&
         (backward ? plan.parts >= 1 && plan.taps >= 0 && (plan.taps == 0 || plan.parts == 1)
                   : plan.parts == 0 && plan.taps == 0);
}

}  // namespace ilajax::products
