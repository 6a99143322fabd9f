// Responses at given sites, as products.

#pragma once

#include <algorithm>
#include <cstring>

#include "xla_kernels/products/chunks.h"

namespace ilajax::products {

// Sums the products at sites keys[begin, end) of a sample, which are keys of the grid, into
// worker.sums.
template <typename Loops, typename T>
void SumProducts(const Layout& layout, const Pairs& pairs, const Values<T>& values,
                 const int32_t* keys, int64_t begin, int64_t end, const Worker& worker) {
  std::memset(worker.sums.data, 0, (end - begin) * worker.sums.step * sizeof(float));
  ForEachTap<Loops>(
      layout, pairs, values, keys, begin, end, worker, 0, worker.lists.taps,
      [&](int64_t tap, const Pair* listed, int64_t count, const Stacks& from, bool finite) {
        Loops::kMultiply(listed, count, layout.matrices, tap, from,
                         finite && *layout.matrices.finite, worker.sums);
      });
}

// The bias, with zeros behind the last channel.
inline void FillBias(const Layout& layout, const float* bias, int64_t channels) {
  std::fill_n(layout.bias, StackStep(channels), 0.0f);
  std::copy_n(bias, channels, layout.bias);
}

// The buffers of a call.
template <typename T>
struct ForwardBuffers {
  const int32_t* keys;
  const T* values;
  const int32_t* out_keys;
  const int32_t* kernel_keys;
  const float* weights;
  const float* bias;
  const int32_t* map;
  T* features;
  int32_t* responses;
};

template <typename Loops, typename T>
class Forward {
 public:
  Forward(const ForwardBuffers<T>& buffers, const ConvShape& shape, const Plan& how,
          const Layout& where)
      : a(buffers), s(shape), plan(how), layout(where) {}

  void Run(ffi::ThreadPool& pool) const {
    std::fill_n(a.responses, s.batch * s.out_channels, 0);
    FillBias(layout, a.bias, s.out_channels);
    FillTables(pool, layout, plan, s, a.kernel_keys, a.weights);
    const int64_t chunks = CeilDiv(s.capacity, plan.chunk);
    for (int64_t item = 0; item < s.batch; item += plan.samples) {
      const int64_t count = std::min(plan.samples, s.batch - item);
      LayOut<Loops>(pool, layout, plan, a.keys, item, count);
      ParallelFor(pool, count * chunks, plan.workers, [&](int64_t task, int64_t id) {
        const int64_t begin = task % chunks * plan.chunk;
        const int64_t i = task / chunks;
        RunChunk(item + i, PairsOf(layout, plan, a.map, item + i, i), begin,
                 std::min(begin + plan.chunk, s.capacity),
                 layout.workers.At(id, layout.reach.lines, layout.d, plan));
      });
    }
  }

 private:
  void RunChunk(int64_t item, const Pairs& pairs, int64_t begin, int64_t end,
                const Worker& worker) const {
    const int32_t* const keys = a.out_keys + item * s.capacity;
    const Values<T> values = {a.values + item * s.in_channels * s.slots, s.slots, s.in_channels};
    T* const features = a.features + item * s.out_channels * s.capacity;
    const int64_t last = std::clamp(Stored(keys, s.capacity, s.w.output_sites), begin, end);
    if (last > begin) {
      SumProducts<Loops>(layout, pairs, values, keys, begin, last, worker);
      PutOut(item, begin, last, features, worker.sums);
    }
    for (int64_t j = 0; j < s.out_channels; ++j) {
      std::fill(features + j * s.capacity + last, features + j * s.capacity + end, T(0.0f));
    }
  }

  void PutOut(int64_t item, int64_t begin, int64_t end, T* features, const Stacks& sums) const {
    constexpr int64_t kCounted = 64;  // channels whose responses are counted at once
    int32_t counts[kCounted];
    for (int64_t first = 0; first < s.out_channels; first += kCounted) {
      const int64_t channels = std::min(kCounted, s.out_channels - first);
      std::fill_n(counts, channels, 0);
      Loops::template kFromStacks<T>(sums.data + first, sums.step, layout.bias + first, channels,
                                     begin, end, features + first * s.capacity, s.capacity, counts);
      int32_t* const response = a.responses + item * s.out_channels + first;
      for (int64_t j = 0; j < channels; ++j) {
        __atomic_fetch_add(response + j, counts[j], __ATOMIC_RELAXED);
      }
    }
  }

  const ForwardBuffers<T> a;
  const ConvShape& s;
  const Plan& plan;
  const Layout& layout;
};

// A call whose responses stand at `out_keys`.
template <typename T, typename Call>
void RunForward(ffi::ThreadPool& pool, Call& call, const S32& out_keys, const ConvShape& s,
                const Plan& plan, const Layout& layout) {
  const ForwardBuffers<T> buffers = {
      call.keys.typed_data(),        Data<T>(call.values),      out_keys.typed_data(),
      call.kernel_keys.typed_data(), call.weights.typed_data(), call.bias.typed_data(),
      call.map.typed_data(),         Data<T>(*call.features),   call.responses->typed_data()};
  DispatchLoops([&]<typename Loops>() { Forward<Loops, T>(buffers, s, plan, layout).Run(pool); });
}

}  // namespace ilajax::products
