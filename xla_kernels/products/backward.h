// The gradients of responses at given sites, as products.

#pragma once

#include <algorithm>
#include <cstring>

#include "xla_kernels/lines/line.h"
#include "xla_kernels/products/chunks.h"

namespace ilajax::products {

// The buffers of a call.
template <typename T>
struct BackwardBuffers {
  const int32_t* keys;
  const T* values;
  const int32_t* kernel_keys;
  const float* weights;
  const int32_t* out_keys;
  const T* cotangent;
  const int32_t* map;
  T* values_bar;
  float* weights_bar;
  float* bias_bar;
};

template <typename Loops, typename T>
class Backward {
 public:
  Backward(const BackwardBuffers<T>& buffers, const ConvShape& shape, const Plan& how,
           const Layout& where)
      : a(buffers),
        s(shape),
        plan(how),
        layout(where),
        rows(EvenRows(s.in_channels)),
        filter(layout.d.w.taps * rows * StackStep(s.out_channels)) {}

  void Run(ffi::ThreadPool& pool) const {
    const int64_t items = s.batch / s.groups, taps = layout.d.w.taps;
    FillTables(pool, layout, plan, s, a.kernel_keys, a.weights);
    for (int64_t group = 0; group < s.groups; ++group) {
      ParallelFor(pool, plan.parts * taps, plan.workers, [&](int64_t task, int64_t) {
        std::fill_n(layout.filter_bars + task * (filter / taps), filter / taps, 0.0f);
      });
      for (int64_t first = 0; first < items; first += plan.samples) {
        const int64_t item = group * items + first, count = std::min(plan.samples, items - first);
        LayOut<Loops>(pool, layout, plan, a.out_keys, item, count);
        if (plan.taps == 0) {
          ParallelFor(pool, plan.parts, plan.workers, [&](int64_t part, int64_t id) {
            for (int64_t i = 0; i < count; ++i) {
              RunPart(item + i, i, part, plan.parts, id, {kBoth, 0, taps});
            }
          });
        } else {
          // The values' gradients, by parts of the sites, and the filter's, some taps at a time.
          ParallelFor(pool, count * kParts, plan.workers, [&](int64_t task, int64_t id) {
            const int64_t i = task / kParts;
            RunPart(item + i, i, task % kParts, kParts, id, {kValues, 0, taps});
          });
          ParallelFor(pool, CeilDiv(taps, plan.taps), plan.workers, [&](int64_t task, int64_t id) {
            const int64_t begin = task * plan.taps, end = std::min(begin + plan.taps, taps);
            for (int64_t i = 0; i < count; ++i) {
              RunPart(item + i, i, 0, 1, id, {kFilter, begin, end});
            }
          });
        }
      }
      SumFilterBars(pool, group);
    }
    const KeptCotangents<T> kept = {items,      s.out_channels, s.capacity, s.w.output_sites,
                                    a.out_keys, a.cotangent,    true};
    ParallelFor(pool, s.groups * s.out_channels, plan.workers, [&](int64_t task, int64_t) {
      a.bias_bar[task] = kept.Sum(task / s.out_channels, task % s.out_channels);
    });
  }

 private:
  static constexpr int64_t kParts =
      8;  // of a sample's sites, where filters are too large for parts
  enum Which { kBoth, kValues, kFilter };
  // Which gradients to make, and of which taps.
  struct Wanted {
    Which which;
    int64_t first_tap, last_tap;
  };

  // A part of a sample's sites: their own gradients, and what they add to the filter's.
  void RunPart(int64_t item, int64_t i, int64_t part, int64_t parts, int64_t id,
               const Wanted& wanted) const {
    const Pairs pairs = PairsOf(layout, plan, a.map, item, i);
    const Worker worker = layout.workers.At(id, layout.reach.lines, layout.d, plan);
    const bool of_values = wanted.which != kFilter, of_filter = wanted.which != kValues;
    const int32_t* const keys = a.keys + item * s.slots;
    const T* const values = a.values + item * s.in_channels * s.slots;
    const Values<T> cotangents = {a.cotangent + item * s.out_channels * s.capacity, s.capacity,
                                  s.out_channels};
    T* const values_bar = a.values_bar + item * s.in_channels * s.slots;
    float* const filter_bar = layout.filter_bars + (plan.taps == 0 ? part : 0) * filter;
    const int64_t stored = Stored(keys, s.slots, s.w.input_sites);
    const int64_t last = (part + 1) * stored / parts;
    for (int64_t begin = part * stored / parts; begin < last; begin += plan.chunk) {
      const int64_t end = std::min(begin + plan.chunk, last);
      bool own_finite = true;
      if (of_values) {
        std::memset(worker.sums.data, 0, (end - begin) * worker.sums.step * sizeof(float));
      }
      if (of_filter) {
        own_finite = Loops::template kToStacks<T>(values, s.slots, s.in_channels, begin, end,
                                                  worker.own.data, worker.own.step);
      }
      ForEachTap<Loops>(
          layout, pairs, cotangents, keys, begin, end, worker, wanted.first_tap, wanted.last_tap,
          [&](int64_t tap, const Pair* listed, int64_t count, const Stacks& from, bool finite) {
            if (of_values) {
              Loops::kMultiply(listed, count, layout.matrices, tap, from,
                               finite && *layout.matrices.finite, worker.sums);
            }
            if (of_filter) {
              Loops::kAddOuter(listed, count, layout.matrices, tap, worker.own, rows, from,
                               finite && own_finite, filter_bar + tap * rows * from.step);
            }
          });
      if (of_values) {
        Loops::template kFromStacks<T>(worker.sums.data, worker.sums.step, nullptr, s.in_channels,
                                       begin, end, values_bar, s.slots, nullptr);
      }
    }
    if (!of_values || part + 1 < parts) return;
    for (int64_t j = 0; j < s.in_channels; ++j) {
      std::fill(values_bar + j * s.slots + stored, values_bar + (j + 1) * s.slots, T(0.0f));
    }
  }

  // The parts' gradients of the filter in their order, at the live weights.
  void SumFilterBars(ffi::ThreadPool& pool, int64_t group) const {
    constexpr int64_t kWeights = 4096;  // of a task
    float* const weights_bar = a.weights_bar + group * s.weights;
    ParallelFor(pool, CeilDiv(s.weights, kWeights), plan.workers, [&](int64_t task, int64_t) {
      WeightPlace place(s.in_channels, s.out_channels, layout.d.w.taps);
      for (int64_t n = task * kWeights; n < std::min((task + 1) * kWeights, s.weights); ++n) {
        float sum = 0.0f;
        if (place.MoveTo(a.kernel_keys[n])) {
          const int64_t tap = layout.d.w.taps - 1 - place.tap;
          const float* from =
              layout.filter_bars + (tap * rows + place.in) * StackStep(s.out_channels) + place.out;
          for (int64_t part = 0; part < plan.parts; ++part) sum += from[part * filter];
        }
        weights_bar[n] = sum;
      }
    });
  }

  const BackwardBuffers<T> a;
  const ConvShape& s;
  const Plan& plan;
  const Layout& layout;
  const int64_t rows, filter;  // of a part's gradient of the filter: rows of a tap, all its numbers
};

// A call whose cotangents stand at `out_keys`.
template <typename T, typename Call>
void RunBackward(ffi::ThreadPool& pool, Call& call, const S32& out_keys, const ConvShape& s,
                 const Plan& plan, const Layout& layout) {
  const BackwardBuffers<T> buffers = {call.keys.typed_data(),         Data<T>(call.values),
                                      call.kernel_keys.typed_data(),  call.weights.typed_data(),
                                      out_keys.typed_data(),          Data<T>(call.cotangent),
                                      call.map.typed_data(),          Data<T>(*call.values_bar),
                                      call.weights_bar->typed_data(), call.bias_bar->typed_data()};
  DispatchLoops([&]<typename Loops>() { Backward<Loops, T>(buffers, s, plan, layout).Run(pool); });
}

}  // namespace ilajax::products
