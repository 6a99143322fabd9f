// A wave: as many samples as have room for their stacks, first laid out, then multiplied.

#pragma once

#include <algorithm>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/products/loops.h"
#include "xla_kernels/products/plan.h"

namespace ilajax::products {

// The stored sites of a sample: what comes behind them is padding.
inline int64_t Stored(const int32_t* keys, int64_t slots, int64_t sites) {
  return std::lower_bound(keys, keys + slots, sites) - keys;
}

// Lays out `count` samples from `item`: their sites keys [item][slots], and their stacks of values
// [item][channels][slots]. `more()` is a task beside them.
template <typename Loops, typename T, typename More>
void LayOut(ffi::ThreadPool& pool, const Layout& layout, const Plan& plan, const int32_t* keys,
            const T* values, int64_t slots, int64_t item, int64_t count, More&& more) {
  const Window& w = layout.w;
  const int64_t channels = layout.matrices.from;
  const auto sample = [&](int64_t i) { return layout.samples.At(i, w, slots, channels); };
  for (int64_t i = 0; i < count; ++i) *sample(i).finite = 1;
  constexpr int64_t kSlots = 1024;  // of a task
  const int64_t tasks = CeilDiv(slots, kSlots) + 1;
  ParallelFor(pool, count * tasks + 1, plan.workers, [&](int64_t task, int64_t) {
    if (task == 0) return more();
    const int64_t i = (task - 1) / tasks, part = (task - 1) % tasks;
    const Sample s = sample(i);
    const int32_t* const own_keys = keys + (item + i) * slots;
    if (part == 0) return s.index.Fill(own_keys, slots);
    const auto to_stacks = [&](int64_t begin, int64_t end) {
      return Loops::template kToStacks<T>(values + (item + i) * channels * slots, slots, channels,
                                          begin, end, s.stacks.data + begin * s.stacks.step,
                                          s.stacks.step);
    };
    const int64_t begin = (part - 1) * kSlots, end = std::min(begin + kSlots, slots);
    const int64_t last = std::clamp(Stored(own_keys, slots, w.input_sites), begin, end);
    if (!to_stacks(begin, last)) __atomic_store_n(s.finite, 0, __ATOMIC_RELAXED);
    to_stacks(last, end);  // padding, whose values do not count
  });
}

// Sums of output sites keys[begin, end) over their pairs, into the worker's stacks.
template <typename Loops>
void Sum(const Layout& layout, const Sample& sample, const int32_t* keys, int64_t begin,
         int64_t end, const Worker& worker) {
  worker.lists.Clear();
  Loops::kFindPairs(layout.reach, sample.index, keys, begin, end, worker.lists);
  worker.lists.Pad(static_cast<int32_t>(end - begin));
  std::memset(worker.sums.data, 0, (end - begin) * worker.sums.step * sizeof(float));
  Loops::kMultiply(worker.lists, layout.matrices, sample.stacks,
                   *sample.finite && *layout.matrices.finite, worker.sums);
}

}  // namespace ilajax::products
