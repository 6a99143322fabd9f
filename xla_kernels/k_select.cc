// k-selection of stored entries on the CPU, and its gradient; a task for each segment.
//
//   keys s32[B, C, K], values T[B, C, K] -> kept_keys s32[B, C, K'], kept_values T[B, C, K']
//
// Forward: entries that cannot be kept are dropped by a rank threshold, found by a radix select
// over the order-preserving bits of their values in three passes; the rest is copied in the order
// of its keys. Backward: both key lists ascend, so one merge takes the cotangents back.

#include <algorithm>
#include <cstdint>

#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"

namespace ilajax {
namespace {

constexpr int64_t kWorkPerThread = 1 << 14;  // entries below which another thread does not pay

int64_t Workers(int64_t segments, int64_t slots) {
  return std::max<int64_t>(1, segments * slots / kWorkPerThread);
}

ffi::Error KSelectFwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                          ffi::Result<ffi::Buffer<ffi::S32>> kept_keys,
                          ffi::Result<ffi::AnyBuffer> kept_values, int64_t sites,
                          std::string_view select_name) {
  const auto d = values.dimensions(), o = kept_keys->dimensions();
  if (d.size() != 3 || o.size() != 3) return InvalidArgument("k_select: buffers need 3 dimensions");
  const int64_t batch = d[0], channels = d[1], slots = d[2], capacity = o[2];
  ILAJAX_RETURN_IF_ERROR(CheckShape("k_select: keys", keys, {batch, channels, slots}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("k_select: kept_keys", *kept_keys, {batch, channels, capacity}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("k_select: kept_values", *kept_values, {batch, channels, capacity}));
  if (kept_values->element_type() != values.element_type()) {
    return InvalidArgument("k_select: values and kept_values have different dtypes");
  }
  Select select;
  ILAJAX_RETURN_IF_ERROR(ReadSelect(select_name, select));
  if (capacity < 1) return InvalidArgument("k_select: the capacity is ", capacity);
  return DispatchFloat(values.element_type(), [&]<typename T>() {
    ParallelFor(
        pool, batch * channels, Workers(batch * channels, slots), [&](int64_t segment, int64_t) {
          const int32_t* key = keys.typed_data() + segment * slots;
          const T* value = Data<T>(values) + segment * slots;
          auto candidate = [&](int64_t i) {
            return key[i] >= 0 && key[i] < sites &&
                   IsCandidate(static_cast<float>(value[i]), select);
          };
          auto rank = [&](int64_t i) { return RankBits(static_cast<float>(value[i]), select); };
          const RankCut cut(slots, capacity, [&](auto&& f) {
            for (int64_t i = 0; i < slots; ++i) {
              if (candidate(i)) f(rank(i));
            }
          });
          int32_t* kept_key = kept_keys->typed_data() + segment * capacity;
          T* kept_value = Data<T>(*kept_values) + segment * capacity;
          int64_t kept = 0, ties = cut.ties;
          for (int64_t i = 0; i < slots && kept < capacity; ++i) {
            if (!candidate(i) || !cut.Keeps(rank(i), ties)) continue;
            kept_key[kept] = key[i];
            kept_value[kept++] = value[i];
          }
          std::fill(kept_key + kept, kept_key + capacity, static_cast<int32_t>(sites));
          std::fill(kept_value + kept, kept_value + capacity, T(0.0f));
        });
    return ffi::Error::Success();
  });
}

ffi::Error KSelectBwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys,
                          ffi::Buffer<ffi::S32> kept_keys, ffi::AnyBuffer cotangent,
                          ffi::Result<ffi::AnyBuffer> values_bar, int64_t sites) {
  const auto d = keys.dimensions(), o = kept_keys.dimensions();
  if (d.size() != 3 || o.size() != 3) return InvalidArgument("k_select: buffers need 3 dimensions");
  const int64_t batch = d[0], channels = d[1], slots = d[2], capacity = o[2];
  ILAJAX_RETURN_IF_ERROR(CheckShape("k_select: kept_keys", kept_keys, {batch, channels, capacity}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("k_select: cotangent", cotangent, {batch, channels, capacity}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("k_select: values_bar", *values_bar, {batch, channels, slots}));
  if (cotangent.element_type() != values_bar->element_type()) {
    return InvalidArgument("k_select: cotangent and values_bar have different dtypes");
  }
  return DispatchFloat(cotangent.element_type(), [&]<typename T>() {
    ParallelFor(pool, batch * channels, Workers(batch * channels, slots),
                [&](int64_t segment, int64_t) {
                  const int32_t* key = keys.typed_data() + segment * slots;
                  const int32_t* kept_key = kept_keys.typed_data() + segment * capacity;
                  const T* g = Data<T>(cotangent) + segment * capacity;
                  T* value_bar = Data<T>(*values_bar) + segment * slots;
                  int64_t j = 0;
                  for (int64_t i = 0; i < slots; ++i) {
                    while (j < capacity && kept_key[j] < key[i]) ++j;
                    const bool kept =
                        j < capacity && kept_key[j] == key[i] && key[i] >= 0 && key[i] < sites;
                    value_bar[i] = kept ? g[j] : T(0.0f);
                  }
                });
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(KSelectFwd, ilajax::KSelectFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // kept_keys
                                  .Ret<xla::ffi::AnyBuffer>()              // kept_values
                                  .Attr<int64_t>("sites")
                                  .Attr<std::string_view>("select"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(KSelectBwd, ilajax::KSelectBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kept_keys
                                  .Arg<xla::ffi::AnyBuffer>()  // cotangent of kept_values
                                  .Ret<xla::ffi::AnyBuffer>()  // values_bar
                                  .Attr<int64_t>("sites"));
