// Samples, laid out some at a time, and chunks of the sites that their products make.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

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

// Lays out `count` samples from `item`: their keys [item][slots], and their values
// [item][channel][slot] as stacks. `more()` is a task beside them.
template <typename Loops, typename T, typename More>
void LayOut(ffi::ThreadPool& pool, const Layout& layout, const Plan& plan, const int32_t* keys,
            const T* values, int64_t sites, int64_t item, int64_t count, More&& more) {
  const Direction& d = layout.d;
  const auto sample = [&](int64_t i) { return layout.samples.At(i, d, plan); };
  for (int64_t i = 0; i < count; ++i) *sample(i).finite = 1;
  constexpr int64_t kSlots = 1024;  // of a task
  const int64_t tasks = plan.stacked ? CeilDiv(d.from_slots, kSlots) + 1 : 1;
  ParallelFor(pool, count * tasks + 1, plan.workers, [&](int64_t task, int64_t) {
    if (task == 0) return more();
    const int64_t i = (task - 1) / tasks, part = (task - 1) % tasks;
    const Sample s = sample(i);
    const int32_t* const own_keys = keys + (item + i) * d.from_slots;
    if (part == 0) return s.index.Fill(d.w, own_keys, d.from_slots);
    const auto to_stacks = [&](int64_t begin, int64_t end) {
      return Loops::template kToStacks<T>(values + (item + i) * d.from * d.from_slots, d.from_slots,
                                          d.from, begin, end, s.stacks.data + begin * s.stacks.step,
                                          s.stacks.step);
    };
    const int64_t begin = (part - 1) * kSlots, end = std::min(begin + kSlots, d.from_slots);
    const int64_t last = std::clamp(Stored(own_keys, d.from_slots, sites), begin, end);
    if (!to_stacks(begin, last)) __atomic_store_n(s.finite, 0, __ATOMIC_RELAXED);
    to_stacks(last, end);  // padding, whose values do not count
  });
}

// Gathers what a tap's pairs read, and makes them pairs to that. Returns whether all is finite.
template <typename T>
bool Gather(const Values<T>& values, const Pair* pairs, int64_t count, const Worker& worker) {
  const int64_t step = worker.gathered.step;
  bool finite = true;
  for (int64_t i = 0; i < CeilDiv(count, kSites) * kSites; ++i) {
    worker.pairs[i] = {static_cast<int32_t>(i), pairs[i].to};
    float* const stack = worker.gathered.data + i * step;
    std::fill_n(stack, step, 0.0f);
    for (int64_t c = 0; c < values.channels && i < count; ++c) {
      stack[c] = static_cast<float>(values.data[c * values.slots + pairs[i].from]);
      finite &= std::isfinite(stack[c]);
    }
  }
  return finite;
}

// Finds the pairs of sites keys[begin, end), and calls f(tap, pairs, count, stacks, finite) with
// those of each tap that has some and the stacks that they read, of the sample whose values are given.
template <typename Loops, typename T, typename F>
void ForEachTap(const Layout& layout, const Sample& sample, const Values<T>& values,
                const int32_t* keys, int64_t begin, int64_t end, const Worker& worker, F&& f) {
  const PairLists& lists = worker.lists;
  lists.Clear();
  Loops::kFindPairs(layout.reach, sample.index, keys, begin, end, lists);
  lists.Pad(static_cast<int32_t>(end - begin));
  for (int64_t tap = 0; tap < lists.taps; ++tap) {
    const int64_t count = lists.counts[tap];
    if (count == 0) continue;
    if (sample.stacked) {
      f(tap, lists.At(tap), count, sample.stacks, *sample.finite != 0);
    } else {
      const bool finite = Gather(values, lists.At(tap), count, worker);
      f(tap, worker.pairs, count, worker.gathered, finite);
    }
  }
}

}  // namespace ilajax::products
