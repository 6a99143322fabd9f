// k-selection of stored entries on the CPU, and its gradient; a task for each segment.
//
// Forward: entries that cannot be kept are dropped by a rank threshold, found by a radix select
// over the order-preserving bits of their values in three passes; the rest is copied in the order
// of its keys. Backward: both key lists ascend, so one merge takes the cotangents back.

#include <algorithm>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/k_select/spec.h"

namespace ilajax {
namespace {

// Fewer entries than these are done before another thread has started.
constexpr int64_t kEntriesOfThread = 1 << 14;

int64_t Workers(const KSelectShape& s) {
  return std::max<int64_t>(1, s.segments() * s.slots / kEntriesOfThread);
}

struct KSelectForward {
  using Call = KSelectFwd;

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, KSelectFwd call, const KSelectShape& s) {
    Select select;
    ILAJAX_RETURN_IF_ERROR(ReadSelect(call.select, select));
    ParallelFor(pool, s.segments(), Workers(s), [&](int64_t segment, int64_t) {
      const int32_t* key = call.keys.typed_data() + segment * s.slots;
      const T* value = Data<T>(call.values) + segment * s.slots;
      auto candidate = [&](int64_t i) {
        return key[i] >= 0 && key[i] < call.sites &&
               IsCandidate(static_cast<float>(value[i]), select);
      };
      auto rank = [&](int64_t i) { return RankBits(static_cast<float>(value[i]), select); };
      const RankCut cut(s.slots, s.capacity, [&](auto&& f) {
        for (int64_t i = 0; i < s.slots; ++i) {
          if (candidate(i)) f(rank(i));
        }
      });
      int32_t* kept_key = call.kept_keys->typed_data() + segment * s.capacity;
      T* kept_value = Data<T>(*call.kept_values) + segment * s.capacity;
      int64_t kept = 0, ties = cut.ties;
      for (int64_t i = 0; i < s.slots && kept < s.capacity; ++i) {
        if (!candidate(i) || !cut.Keeps(rank(i), ties)) continue;
        kept_key[kept] = key[i];
        kept_value[kept++] = value[i];
      }
      std::fill(kept_key + kept, kept_key + s.capacity, static_cast<int32_t>(call.sites));
      std::fill(kept_value + kept, kept_value + s.capacity, T(0.0f));
    });
    return ffi::Error::Success();
  }
};

struct KSelectBackward {
  using Call = KSelectBwd;

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, KSelectBwd call, const KSelectShape& s) {
    ParallelFor(pool, s.segments(), Workers(s), [&](int64_t segment, int64_t) {
      const int32_t* key = call.keys.typed_data() + segment * s.slots;
      const int32_t* kept_key = call.kept_keys.typed_data() + segment * s.capacity;
      const T* cotangent = Data<T>(call.cotangent) + segment * s.capacity;
      T* value_bar = Data<T>(*call.values_bar) + segment * s.slots;
      int64_t j = 0;
      for (int64_t i = 0; i < s.slots; ++i) {
        while (j < s.capacity && kept_key[j] < key[i]) ++j;
        const bool kept =
            j < s.capacity && kept_key[j] == key[i] && key[i] >= 0 && key[i] < call.sites;
        value_bar[i] = kept ? cotangent[j] : T(0.0f);
      }
    });
    return ffi::Error::Success();
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(KSelectFwd, KSelectForward);
ILAJAX_CPU_TARGET(KSelectBwd, KSelectBackward);
