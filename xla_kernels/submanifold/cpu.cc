// Submanifold convolution on the CPU, and its gradient.
//
// Layers of several channels are matrix products over pairs of sites (products/pairs.h). Narrow ones,
// and what has no room for its stacks, go line by line, forward (submanifold/lines.h) and backward as
// a convolution that has kept these sites (lines/gradient.h).

#include <algorithm>
#include <cstring>
#include <optional>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/lines/gradient.h"
#include "xla_kernels/products/waves.h"
#include "xla_kernels/submanifold/lines.h"
#include "xla_kernels/submanifold/spec.h"

namespace ilajax {
namespace {

// The plans of both ways, and the workspace of the one that is taken.
template <typename ByLines>
struct EitherPlan {
  products::Plan products;
  ByLines lines;
};
template <typename ByLines>
struct EitherLayout {
  std::optional<products::Layout> products;
  std::optional<ByLines> lines;

  template <typename Plan>
  EitherLayout(Carver& carver, const ConvShape& s, const Plan& plan) {
    if (plan.products.samples > 0) {
      products.emplace(carver, s, plan.products);
    } else {
      lines.emplace(carver, s, plan.lines);
    }
  }
};

struct SubmanifoldForward {
  using Call = SubmanifoldFwd;
  using Plan = EitherPlan<LinesForward::Plan>;
  template <typename T>
  using Layout = EitherLayout<LinesForward::Layout<T>>;

  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    return {products::MakePlan(s, tuning, false), LinesForward::Make<T>(s, tuning)};
  }
  static bool Fits(const ConvShape& s, const Plan& plan) {
    return products::Fits(plan.products, false) && LinesForward::Fits(s, plan.lines);
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, SubmanifoldFwd call, const ConvShape& s,
                        const Plan& plan, Layout<T>& layout) {
    if (layout.lines) return LinesForward::Run<T>(pool, call, s, plan.lines, *layout.lines);
    products::DispatchLoops([&]<typename Loops>() {
      RunProducts<Loops, T>(pool, call, s, plan.products, *layout.products);
    });
    return ffi::Error::Success();
  }

 private:
  template <typename Loops, typename T>
  static void RunProducts(ffi::ThreadPool& pool, SubmanifoldFwd& call, const ConvShape& s,
                          const products::Plan& plan, const products::Layout& layout) {
    const int32_t* const keys = call.keys.typed_data();
    int32_t* const responses = call.responses->typed_data();
    std::fill_n(responses, s.batch * s.out_channels, 0);
    std::fill_n(layout.bias, products::StackStep(s.out_channels), 0.0f);
    std::copy_n(call.bias.typed_data(), s.out_channels, layout.bias);
    const int64_t chunks = CeilDiv(s.slots, plan.chunk);
    for (int64_t item = 0; item < s.batch; item += plan.samples) {
      const int64_t count = std::min(plan.samples, s.batch - item);
      products::LayOut<Loops, T>(pool, layout, plan, keys, Data<T>(call.values), s.slots, item,
                                 count, [&] {
                                   if (item > 0) return;
                                   layout.reach.Fill(layout.w);
                                   layout.matrices.Fill(call.kernel_keys.typed_data(),
                                                        call.weights.typed_data(), s.weights);
                                 });
      ParallelFor(pool, count * chunks, plan.workers, [&](int64_t task, int64_t id) {
        const int64_t i = task / chunks, begin = task % chunks * plan.chunk;
        RunChunk<Loops, T>(call, s, layout, item + i,
                           layout.samples.At(i, layout.w, s.slots, s.in_channels), begin,
                           std::min(begin + plan.chunk, s.slots),
                           layout.workers.At(id, layout.reach.lines, s.out_channels, plan));
      });
    }
  }

  template <typename Loops, typename T>
  static void RunChunk(SubmanifoldFwd& call, const ConvShape& s, const products::Layout& layout,
                       int64_t item, const products::Sample& sample, int64_t begin, int64_t end,
                       const products::Worker& worker) {
    const int32_t* const keys = call.keys.typed_data() + item * s.slots;
    T* const features = Data<T>(*call.features) + item * s.out_channels * s.slots;
    const int64_t last = std::clamp(products::Stored(keys, s.slots, s.w.output_sites), begin, end);
    if (last > begin) {
      products::Sum<Loops>(layout, sample, keys, begin, last, worker);
      int32_t counts[kCounted];
      for (int64_t first = 0; first < s.out_channels; first += kCounted) {
        const int64_t channels = std::min(kCounted, s.out_channels - first);
        std::fill_n(counts, channels, 0);
        Loops::template kFromStacks<T>(worker.sums.data + first, worker.sums.step,
                                       layout.bias + first, channels, begin, last,
                                       features + first * s.slots, s.slots, counts);
        int32_t* const response = call.responses->typed_data() + item * s.out_channels + first;
        for (int64_t j = 0; j < channels; ++j) {
          __atomic_fetch_add(response + j, counts[j], __ATOMIC_RELAXED);
        }
      }
    }
    for (int64_t j = 0; j < s.out_channels; ++j) {
      std::fill(features + j * s.slots + last, features + j * s.slots + end, T(0.0f));
    }
  }

  static constexpr int64_t kCounted = 64;  // channels whose responses are counted at once
};

struct SubmanifoldBackward {
  using Call = SubmanifoldBwd;
  using Plan = EitherPlan<GradientPlan>;
  template <typename T>
  using Layout = EitherLayout<GradientLayout>;
  using ByLines = LineGradient<SubmanifoldBwd>;

  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    return {products::MakePlan(s, tuning, true), MakeGradientPlan(s, tuning)};
  }
  static bool Fits(const ConvShape& s, const Plan& plan) {
    return products::Fits(plan.products, true) && ilajax::Fits(s, plan.lines);
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, SubmanifoldBwd call, const ConvShape& s,
                        const Plan& plan, Layout<T>& layout) {
    if (layout.lines) return ByLines::Run<T>(pool, call, s, plan.lines, *layout.lines);
    products::DispatchLoops([&]<typename Loops>() {
      RunProducts<Loops, T>(pool, call, s, plan.products, *layout.products);
    });
    return ffi::Error::Success();
  }

 private:
  template <typename Loops, typename T>
  static void RunProducts(ffi::ThreadPool& pool, SubmanifoldBwd& call, const ConvShape& s,
                          const products::Plan& plan, const products::Layout& layout) {
    const int64_t items = s.batch / s.groups;
    const int64_t size = layout.w.taps * Rows(s) * products::StackStep(s.out_channels);
    for (int64_t group = 0; group < s.groups; ++group) {
      std::fill_n(layout.filter_bars, plan.parts * size, 0.0f);
      for (int64_t first = 0; first < items; first += plan.samples) {
        const int64_t item = group * items + first, count = std::min(plan.samples, items - first);
        products::LayOut<Loops, T>(pool, layout, plan, call.keys.typed_data(),
                                   Data<T>(call.cotangent), s.slots, item, count, [&] {
                                     if (item > 0) return;
                                     layout.reach.Fill(layout.w);
                                     layout.matrices.Fill(call.kernel_keys.typed_data(),
                                                          call.weights.typed_data(), s.weights);
                                   });
        ParallelFor(pool, plan.parts, plan.workers, [&](int64_t part, int64_t id) {
          const products::Worker worker =
              layout.workers.At(id, layout.reach.lines, s.in_channels, plan);
          for (int64_t i = 0; i < count; ++i) {
            RunPart<Loops, T>(call, s, plan, layout, item + i,
                              layout.samples.At(i, layout.w, s.slots, s.out_channels), part,
                              layout.filter_bars + part * size, worker);
          }
        });
      }
      SumFilterBars(pool, call, s, plan, layout, group, size);
    }
    const KeptCotangents<T> kept = {items,
                                    s.out_channels,
                                    s.slots,
                                    s.w.output_sites,
                                    call.keys.typed_data(),
                                    Data<T>(call.cotangent),
                                    true};
    ParallelFor(pool, s.groups * s.out_channels, plan.workers, [&](int64_t task, int64_t) {
      call.bias_bar->typed_data()[task] = kept.Sum(task / s.out_channels, task % s.out_channels);
    });
  }

  // A part of a sample's sites: their own gradients, and what they add to the filter's.
  template <typename Loops, typename T>
  static void RunPart(SubmanifoldBwd& call, const ConvShape& s, const products::Plan& plan,
                      const products::Layout& layout, int64_t item, const products::Sample& sample,
                      int64_t part, float* filter_bar, const products::Worker& worker) {
    const int32_t* const keys = call.keys.typed_data() + item * s.slots;
    const T* const values = Data<T>(call.values) + item * s.in_channels * s.slots;
    T* const values_bar = Data<T>(*call.values_bar) + item * s.in_channels * s.slots;
    const int64_t stored = products::Stored(keys, s.slots, s.w.output_sites);
    const int64_t last = (part + 1) * stored / plan.parts;
    for (int64_t begin = part * stored / plan.parts; begin < last; begin += plan.chunk) {
      const int64_t end = std::min(begin + plan.chunk, last);
      products::Sum<Loops>(layout, sample, keys, begin, end, worker);
      Loops::template kFromStacks<T>(worker.sums.data, worker.sums.step, nullptr, s.in_channels,
                                     begin, end, values_bar, s.slots, nullptr);
      const bool finite = Loops::template kToStacks<T>(values, s.slots, s.in_channels, begin, end,
                                                       worker.own.data, worker.own.step);
      Loops::kAddOuter(worker.lists, layout.matrices, worker.own, Rows(s), sample.stacks,
                       finite && *sample.finite, filter_bar);
    }
    if (part + 1 < plan.parts) return;
    for (int64_t j = 0; j < s.in_channels; ++j) {
      std::fill(values_bar + j * s.slots + stored, values_bar + (j + 1) * s.slots, T(0.0f));
    }
  }

  // The parts' gradients of the filter in their order, at the live weights.
  static void SumFilterBars(ffi::ThreadPool& pool, SubmanifoldBwd& call, const ConvShape& s,
                            const products::Plan& plan, const products::Layout& layout,
                            int64_t group, int64_t size) {
    constexpr int64_t kBlock = 4096;  // weights of a task
    float* const weights_bar = call.weights_bar->typed_data() + group * s.weights;
    ParallelFor(pool, CeilDiv(s.weights, kBlock), plan.workers, [&](int64_t task, int64_t) {
      WeightPlace place(s.in_channels, s.out_channels, layout.w.taps);
      for (int64_t n = task * kBlock; n < std::min((task + 1) * kBlock, s.weights); ++n) {
        float sum = 0.0f;
        if (place.MoveTo(call.kernel_keys.typed_data()[n])) {
          const int64_t tap = layout.w.taps - 1 - place.tap;
          const float* from = layout.filter_bars +
                              (tap * Rows(s) + place.in) * products::StackStep(s.out_channels) +
                              place.out;
          for (int64_t part = 0; part < plan.parts; ++part) sum += from[part * size];
        }
        weights_bar[n] = sum;
      }
    });
  }

  static int64_t Rows(const ConvShape& s) { return products::EvenRows(s.in_channels); }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(SubmanifoldFwd, SubmanifoldForward);
ILAJAX_CPU_TARGET(SubmanifoldBwd, SubmanifoldBackward);
