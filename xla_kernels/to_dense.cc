// to_dense on the CPU: scatter stored values into a zero-filled grid, and gather them back.
//
// Forward: the grid is cut into chunks, and a task fills one chunk of one segment while it is in
// the cache: zeros, then the chunk's keys, which lie together and are found by bisection. dense is
// written once. A task writes only inside its chunk whatever the keys are, so broken keys can lose
// values but neither leave the buffer nor race. Backward: values_bar[k] = dense_bar[keys[k]], 0 at
// padding.

#include "xla_kernels/to_dense.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/parallel.h"

namespace ilajax {
namespace {

constexpr int64_t kChunk = 1 << 14;          // grid positions, or stored entries, of one task
constexpr int64_t kWorkPerThread = 1 << 15;  // elements below which another thread does not pay

template <typename T>
void FillChunk(const int32_t* keys, const T* values, int64_t capacity, int64_t begin, int64_t end,
               T* dense) {
  std::memset(static_cast<void*>(dense + begin), 0, (end - begin) * sizeof(T));
  const int32_t* last = keys + capacity;
  for (const int32_t* key = std::lower_bound(keys, last, begin); key != last && *key < end; ++key) {
    if (*key >= begin) dense[*key] = values[key - keys];
  }
}

ffi::Error ToDenseFwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                          ffi::Result<ffi::AnyBuffer> dense) {
  ToDenseShape s;
  ILAJAX_RETURN_IF_ERROR(ToDenseShape::Read(keys, values, *dense, s));
  return DispatchFloat(values.element_type(), [&]<typename T>() {
    const int64_t chunks = CeilDiv(s.sites, kChunk);
    const int64_t workers = CeilDiv(s.segments() * (s.sites + s.capacity), kWorkPerThread);
    ParallelFor(pool, s.segments() * chunks, workers, [&](int64_t task, int64_t) {
      const int64_t segment = task / chunks, begin = task % chunks * kChunk;
      FillChunk(keys.typed_data() + s.KeyOffset(segment), Data<T>(values) + segment * s.capacity,
                s.capacity, begin, std::min(begin + kChunk, s.sites),
                Data<T>(*dense) + segment * s.sites);
    });
    return ffi::Error::Success();
  });
}

ffi::Error ToDenseBwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys,
                          ffi::AnyBuffer dense_bar, ffi::Result<ffi::AnyBuffer> values_bar) {
  ToDenseShape s;
  ILAJAX_RETURN_IF_ERROR(ToDenseShape::Read(keys, *values_bar, dense_bar, s));
  return DispatchFloat(dense_bar.element_type(), [&]<typename T>() {
    const int64_t chunks = CeilDiv(s.capacity, kChunk);
    const int64_t workers = CeilDiv(s.segments() * s.capacity, kWorkPerThread);
    ParallelFor(pool, s.segments() * chunks, workers, [&](int64_t task, int64_t) {
      const int64_t segment = task / chunks, begin = task % chunks * kChunk;
      const int64_t end = std::min(begin + kChunk, s.capacity);
      const int32_t* key = keys.typed_data() + s.KeyOffset(segment);
      const T* in = Data<T>(dense_bar) + segment * s.sites;
      T* out = Data<T>(*values_bar) + segment * s.capacity;
      for (int64_t i = begin; i < end; ++i) {
        out[i] = key[i] >= 0 && key[i] < s.sites ? in[key[i]] : T(0.0f);
      }
    });
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(ToDenseFwd, ilajax::ToDenseFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Ret<xla::ffi::AnyBuffer>());            // dense

XLA_FFI_DEFINE_HANDLER_SYMBOL(ToDenseBwd, ilajax::ToDenseBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // cotangent of dense
                                  .Ret<xla::ffi::AnyBuffer>());            // cotangent of values
