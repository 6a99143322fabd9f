// k-selection of stored entries on the GPU, and its gradient.
//
//   keys s32[B, C, K], values T[B, C, K] -> kept_keys s32[B, C, K'], kept_values T[B, C, K'],
//   workspace
//
// Forward: common/cuda_select.cuh, a radix select and ordered emission; a block for each segment,
// or for each chunk of long ones. Backward: one thread an entry finds its key among the kept ones
// by bisection. Keys and cotangents are read once, values_bar is written once; the kept keys of a
// segment stay in the caches.

#include <cstdint>

#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/cuda_select.cuh"
#include "xla_kernels/common/ffi.h"

namespace ilajax {
namespace {

constexpr int kThreads = 256;

struct KSelectShape {
  int64_t segments = 0, slots = 0, capacity = 0, sites = 0;

  // `values` stand at `keys`, and `kept_values` at `kept_keys`; either may be a cotangent.
  static ffi::Error Read(const ffi::Buffer<ffi::S32>& keys, const ffi::AnyBuffer& values,
                         const ffi::Buffer<ffi::S32>& kept_keys, const ffi::AnyBuffer& kept_values,
                         int64_t sites, KSelectShape& s) {
    const auto d = keys.dimensions(), o = kept_keys.dimensions();
    if (d.size() != 3 || o.size() != 3) {
      return InvalidArgument("k_select: buffers need 3 dimensions");
    }
    s = {d[0] * d[1], d[2], o[2], sites};
    ILAJAX_RETURN_IF_ERROR(CheckShape("k_select: values", values, {d[0], d[1], s.slots}));
    ILAJAX_RETURN_IF_ERROR(CheckShape("k_select: kept_keys", kept_keys, {d[0], d[1], s.capacity}));
    ILAJAX_RETURN_IF_ERROR(
        CheckShape("k_select: kept_values", kept_values, {d[0], d[1], s.capacity}));
    if (kept_values.element_type() != values.element_type()) {
      return InvalidArgument("k_select: values and kept_values have different dtypes");
    }
    return ffi::Error::Success();
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    MatchKernel(KSelectShape s, const int32_t* keys, const int32_t* kept_keys, const T* cotangent,
                T* values_bar) {
  const int64_t entries = s.segments * s.slots, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < entries; i += stride) {
    const int64_t segment = i / s.slots;
    const int32_t key = keys[i];
    const int32_t* kept = kept_keys + segment * s.capacity;
    T value = T(0.0f);
    if (key >= 0 && key < s.sites) {
      const int64_t j = LowerBound(kept, s.capacity, key);
      if (j < s.capacity && kept[j] == key) value = cotangent[segment * s.capacity + j];
    }
    values_bar[i] = value;
  }
}

ffi::Error KSelectFwdImpl(cudaStream_t stream, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                          ffi::Result<ffi::Buffer<ffi::S32>> kept_keys,
                          ffi::Result<ffi::AnyBuffer> kept_values,
                          ffi::Result<ffi::Buffer<ffi::U8>> workspace, int64_t sites,
                          std::string_view select_name, int64_t chunk) {
  KSelectShape s;
  ILAJAX_RETURN_IF_ERROR(KSelectShape::Read(keys, values, *kept_keys, *kept_values, sites, s));
  Select select = Select::kValue;
  ILAJAX_RETURN_IF_ERROR(ReadSelect(select_name, select));
  if (chunk < 1) return InvalidArgument("k_select: the plan has an entry below 1");
  ILAJAX_RETURN_IF_ERROR(
      CheckWorkspace("k_select", *workspace, SelectWorkspace(s.segments, s.slots, chunk)));
  return DispatchFloat(values.element_type(), [&]<typename T>() {
    const Entries<T> entries = {keys.typed_data(), Data<T>(values), s.segments, 1,
                                s.slots,           s.sites,         select};
    return LaunchSelect(stream, entries, chunk, workspace->untyped_data(), kept_keys->typed_data(),
                        Data<T>(*kept_values), s.capacity);
  });
}

ffi::Error KSelectBwdImpl(cudaStream_t stream, ffi::Buffer<ffi::S32> keys,
                          ffi::Buffer<ffi::S32> kept_keys, ffi::AnyBuffer cotangent,
                          ffi::Result<ffi::AnyBuffer> values_bar, int64_t sites) {
  KSelectShape s;
  ILAJAX_RETURN_IF_ERROR(KSelectShape::Read(keys, *values_bar, kept_keys, cotangent, sites, s));
  return DispatchFloat(cotangent.element_type(), [&]<typename T>() {
    return Launch<MatchKernel<T>>(GridFor(CeilDiv(s.segments * s.slots, kThreads)), kThreads, 0,
                                  stream, s, keys.typed_data(), kept_keys.typed_data(),
                                  Data<T>(cotangent), Data<T>(*values_bar));
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(KSelectFwd, ilajax::KSelectFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<ilajax::Stream>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // kept_keys
                                  .Ret<xla::ffi::AnyBuffer>()              // kept_values
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<int64_t>("sites")
                                  .Attr<std::string_view>("select")
                                  .Attr<int64_t>("chunk"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(KSelectBwd, ilajax::KSelectBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<ilajax::Stream>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kept_keys
                                  .Arg<xla::ffi::AnyBuffer>()  // cotangent of kept_values
                                  .Ret<xla::ffi::AnyBuffer>()  // values_bar
                                  .Attr<int64_t>("sites"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
