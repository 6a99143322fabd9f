// What samples share, and chunks of the sites that their products make.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/products/loops.h"
#include "xla_kernels/products/plan.h"

namespace ilajax::products {

// The stored sites of a sample: what comes behind them is padding.
inline int64_t Stored(const int32_t* keys, int64_t slots, int64_t sites) {
  return std::lower_bound(keys, keys + slots, sites) - keys;
}

// Values [channel][slot] of one sample.
template <typename T>
struct Values {
  const T* data;
  int64_t slots, channels;
};

// Fills the index of `count` samples, whose keys are [count][slots].
template <typename Loops>
void FillIndex(ffi::ThreadPool& pool, const LayoutOfEach<SiteIndex>& samples, const Window& w,
               int64_t workers, const int32_t* keys, int64_t slots, int64_t count) {
  const int64_t slices = samples.At(0, w).slices;
  const auto each = [&](auto&& step) {
    ParallelFor(pool, count * slices, workers, [&](int64_t task, int64_t) {
      step(samples.At(task / slices, w), task / slices, task % slices);
    });
  };
  each([&](const SiteIndex& index, int64_t i, int64_t slice) {
    index.Mark(w, keys + i * slots, slots, slice);
    if (slices == 1) index.Rank<Loops>(w, 0);
  });
  if (slices == 1) return;
  each([&](const SiteIndex& index, int64_t, int64_t slice) { index.Rank<Loops>(w, slice); });
}

// What tells the pairs of a sample: the index of its sites, or a map [word][slots].
struct Pairs {
  std::optional<SiteIndex> index;
  const int32_t* map;
  int64_t slots;
};

// Prepares the pairs of `count` samples from `item`, whose keys are [item][slots].
template <typename Loops>
void LayOut(ffi::ThreadPool& pool, const Layout& layout, const Plan& plan, const int32_t* keys,
            int64_t item, int64_t count) {
  if (plan.mapped) return;
  const int64_t slots = layout.d.from_slots;
  FillIndex<Loops>(pool, layout.samples, layout.d.w, plan.workers, keys + item * slots, slots,
                   count);
}

// Those of item `item`, the i-th that is laid out, once LayOut has run. `map` is that of all.
inline Pairs PairsOf(const Layout& layout, const Plan& plan, const int32_t* map, int64_t item,
                     int64_t i) {
  const int64_t slots = layout.d.to_slots;
  if (!plan.mapped) return {layout.samples.At(i, layout.d.w), nullptr, 0};
  return {{}, map + item * MapWords(layout.reach.lines) * slots, slots};
}

// Fills the tables that all samples of a call share.
inline void FillTables(ffi::ThreadPool& pool, const Layout& layout, const Plan& plan,
                       const ConvShape& s, const int32_t* kernel_keys, const float* weights) {
  const TapMatrices& matrices = layout.matrices;
  *matrices.finite = true;
  ParallelFor(pool, matrices.taps + 1, plan.workers, [&](int64_t task, int64_t) {
    task == 0 ? layout.reach.Fill(layout.d.w) : matrices.Clear(task - 1);
  });
  // Keys ascend with the output channel.
  const int64_t tasks = std::clamp<int64_t>(s.weights / 8192, 1, s.out_channels);
  ParallelFor(pool, tasks, plan.workers, [&](int64_t task, int64_t) {
    const int64_t out_begin = task * s.out_channels / tasks;
    const int64_t out_end = (task + 1) * s.out_channels / tasks;
    const int64_t of_channel = s.in_channels * matrices.taps;
    const int32_t* const keys_end = kernel_keys + s.weights;
    const int32_t* const begin = std::lower_bound(kernel_keys, keys_end, out_begin * of_channel);
    const int32_t* const end = std::lower_bound(begin, keys_end, out_end * of_channel);
    matrices.Put(begin, weights + (begin - kernel_keys), end - begin, out_begin, out_end);
  });
  ParallelFor(pool, matrices.taps, plan.workers,
              [&](int64_t tap, int64_t) { matrices.Close(tap); });
}

// Gathers what a tap's pairs read, and makes them pairs to that. Returns whether all is finite.
template <typename T>
bool Gather(const Values<T>& values, const Pair* pairs, int64_t count, const Worker& worker) {
  bool finite = true;
  for (int64_t i = 0; i < CeilDiv(count, kSites) * kSites; ++i) {
    worker.pairs[i] = {static_cast<int32_t>(i), pairs[i].to};
    float* const stack = worker.near.At(i);
    std::fill_n(stack, worker.near.step, 0.0f);
    for (int64_t c = 0; c < values.channels && i < count; ++c) {
      stack[c] = static_cast<float>(values.data[c * values.slots + pairs[i].from]);
      finite &= std::isfinite(stack[c]);
    }
  }
  return finite;
}

// Finds the pairs of sites keys[begin, end), and calls f(tap, pairs, count, stacks, finite) with
// those of each tap in [first_tap, last_tap) that has some and the stacks that they read, of the
// sample whose values are given.
//
// Neighbouring taps read sites that lie near each other: as many taps at a time as have room for
// the stacks of all sites from the first to the last. A tap that has none by itself gathers.
template <typename Loops, typename T, typename F>
void ForEachTap(const Layout& layout, const Pairs& pairs, const Values<T>& values,
                const int32_t* keys, int64_t begin, int64_t end, const Worker& worker,
                int64_t first_tap, int64_t last_tap, F&& f) {
  const PairLists& lists = worker.lists;
  const int64_t sites = end - begin;
  if (pairs.index) {
    Loops::kMapSites(layout.reach, *pairs.index, keys, begin, end, lists.bases, lists.words, sites);
    Loops::kListPairs(layout.reach, lists.words, sites, sites, lists);
  } else {
    Loops::kListPairs(layout.reach, pairs.map + begin, pairs.slots, sites, lists);
  }
  lists.Pad(static_cast<int32_t>(sites));
  const int64_t room = worker.near_room;
  for (int64_t tap = first_tap, behind; tap < last_tap; tap = behind) {
    int32_t low = std::numeric_limits<int32_t>::max(), high = -1;
    for (behind = tap; behind < last_tap; ++behind) {
      int32_t new_low = low, new_high = high;
      Loops::kWidenBy(lists.At(behind), lists.counts[behind], new_low, new_high);
      if (new_high >= values.slots) {  // of a map that is not this sample's
        lists.counts[behind] = 0;
        continue;
      }
      if (high >= 0 && new_high - new_low >= room) break;
      low = new_low, high = new_high;
    }
    if (high < 0) return;
    const bool gathers = high - low >= room;  // one tap
    Stacks near = worker.near;
    bool finite = true;
    if (!gathers) {
      near.first = low;
      finite = Loops::template kToStacks<T>(values.data, values.slots, values.channels, low,
                                            int64_t{high} + 1, near.data, near.step);
    }
    for (; tap < behind; ++tap) {
      const int64_t count = lists.counts[tap];
      if (count == 0) continue;
      if (gathers) finite = Gather(values, lists.At(tap), count, worker);
      f(tap, gathers ? worker.pairs : lists.At(tap), count, near, finite);
    }
  }
}

}  // namespace ilajax::products
