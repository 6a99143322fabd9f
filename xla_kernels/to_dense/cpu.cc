// to_dense on the CPU: scatter stored values into a zero-filled grid, and gather them back.
//
// Forward: the grid is cut into chunks, and a task fills one chunk of one segment while it is in
// the cache: zeros, then the chunk's keys, which lie together and are found by bisection. dense is
// written once. A task writes only inside its chunk whatever the keys are, so broken keys can lose
// values but neither leave the buffer nor race. Backward: values_bar[k] = dense_bar[keys[k]], 0 at
// padding.

#include <algorithm>
#include <cstring>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/to_dense/spec.h"

namespace ilajax {
namespace {

constexpr int64_t kChunk = 1 << 14;  // sites, or stored entries, of one task
// Fewer elements than these are done before another thread has started.
constexpr int64_t kWorkOfThread = 1 << 15;

template <typename T>
void FillChunk(const int32_t* keys, const T* values, int64_t slots, int64_t begin, int64_t end,
               T* dense) {
  std::memset(static_cast<void*>(dense + begin), 0, (end - begin) * sizeof(T));
  const int32_t* last = keys + slots;
  for (const int32_t* key = std::lower_bound(keys, last, begin); key != last && *key < end; ++key) {
    if (*key >= begin) dense[*key] = values[key - keys];
  }
}

struct ToDenseForward {
  using Call = ToDenseFwd;

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, ToDenseFwd call, const ToDenseShape& s) {
    const int64_t chunks = CeilDiv(s.sites, kChunk);
    const int64_t workers = CeilDiv(s.segments() * (s.sites + s.slots), kWorkOfThread);
    ParallelFor(pool, s.segments() * chunks, workers, [&](int64_t task, int64_t) {
      const int64_t segment = task / chunks, begin = task % chunks * kChunk;
      FillChunk(call.keys.typed_data() + s.KeyOffset(segment),
                Data<T>(call.values) + segment * s.slots, s.slots, begin,
                std::min(begin + kChunk, s.sites), Data<T>(*call.dense) + segment * s.sites);
    });
    return ffi::Error::Success();
  }
};

struct ToDenseBackward {
  using Call = ToDenseBwd;

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, ToDenseBwd call, const ToDenseShape& s) {
    const int64_t chunks = CeilDiv(s.slots, kChunk);
    const int64_t workers = CeilDiv(s.segments() * s.slots, kWorkOfThread);
    ParallelFor(pool, s.segments() * chunks, workers, [&](int64_t task, int64_t) {
      const int64_t segment = task / chunks, begin = task % chunks * kChunk;
      const int64_t end = std::min(begin + kChunk, s.slots);
      const int32_t* key = call.keys.typed_data() + s.KeyOffset(segment);
      const T* dense_bar = Data<T>(call.dense_bar) + segment * s.sites;
      T* values_bar = Data<T>(*call.values_bar) + segment * s.slots;
      for (int64_t i = begin; i < end; ++i) {
        values_bar[i] = key[i] >= 0 && key[i] < s.sites ? dense_bar[key[i]] : T(0.0f);
      }
    });
    return ffi::Error::Success();
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(ToDenseFwd, ToDenseForward);
ILAJAX_CPU_TARGET(ToDenseBwd, ToDenseBackward);
