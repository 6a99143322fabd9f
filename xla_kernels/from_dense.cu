// The non-zeros of a dense array on the GPU, at most K for each sample and channel.
//
//   x T[B, sites, C] -> keys s32[B, C, K], values T[B, C, K], workspace
//
// common/cuda_select.cuh over the sites of each (sample, channel), which stand C apart: the
// channels of one chunk go to neighbouring blocks, so that x comes out of the L2 cache for all but
// the first. x is read once for each pass: twice where nothing can be cut, else up to six times.
// Its gradient is to_dense.

#include <cstdint>

#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/cuda_select.cuh"
#include "xla_kernels/common/ffi.h"

namespace ilajax {
namespace {

ffi::Error FromDenseFwdImpl(cudaStream_t stream, ffi::AnyBuffer x,
                            ffi::Result<ffi::Buffer<ffi::S32>> keys,
                            ffi::Result<ffi::AnyBuffer> values,
                            ffi::Result<ffi::Buffer<ffi::U8>> workspace,
                            std::string_view select_name, int64_t chunk) {
  const auto d = x.dimensions(), o = keys->dimensions();
  if (d.size() != 3 || o.size() != 3) {
    return InvalidArgument("from_dense: buffers need 3 dimensions");
  }
  const int64_t batch = d[0], sites = d[1], channels = d[2], capacity = o[2];
  ILAJAX_RETURN_IF_ERROR(CheckShape("from_dense: keys", *keys, {batch, channels, capacity}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("from_dense: values", *values, {batch, channels, capacity}));
  if (values->element_type() != x.element_type()) {
    return InvalidArgument("from_dense: x and values have different dtypes");
  }
  Select select = Select::kValue;
  ILAJAX_RETURN_IF_ERROR(ReadSelect(select_name, select));
  if (chunk < 1) return InvalidArgument("from_dense: the plan has an entry below 1");
  ILAJAX_RETURN_IF_ERROR(
      CheckWorkspace("from_dense", *workspace, SelectWorkspace(batch * channels, sites, chunk)));
  return DispatchFloat(x.element_type(), [&]<typename T>() {
    const Entries<T> entries = {nullptr, Data<T>(x), batch * channels, channels, sites,
                                sites,   select};
    return LaunchSelect(stream, entries, chunk, workspace->untyped_data(), keys->typed_data(),
                        Data<T>(*values), capacity);
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FromDenseFwd, ilajax::FromDenseFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<ilajax::Stream>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Ret<xla::ffi::AnyBuffer>()              // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<std::string_view>("select")
                                  .Attr<int64_t>("chunk"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
