// The non-zeros of a dense array on the CPU, at most K for each sample and channel; a task for each
// sample.
//
//   x T[B, sites, C] -> keys s32[B, C, K], values T[B, C, K], workspace
//
// x is read once, as it lies in memory, and every non-zero goes to the running selection of its
// channel. Its gradient is to_dense.

#include <cstdint>

#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {
namespace {

ffi::Error FromDenseFwdImpl(ffi::ThreadPool pool, ffi::AnyBuffer x,
                            ffi::Result<ffi::Buffer<ffi::S32>> keys,
                            ffi::Result<ffi::AnyBuffer> values,
                            ffi::Result<ffi::Buffer<ffi::U8>> workspace,
                            std::string_view select_name, int64_t channel_block, int64_t room,
                            int64_t workers) {
  const auto d = x.dimensions(), o = keys->dimensions();
  if (d.size() != 3 || o.size() != 3)
    return InvalidArgument("from_dense: buffers need 3 dimensions");
  const int64_t batch = d[0], sites = d[1], channels = d[2], capacity = o[2];
  ILAJAX_RETURN_IF_ERROR(CheckShape("from_dense: keys", *keys, {batch, channels, capacity}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("from_dense: values", *values, {batch, channels, capacity}));
  if (values->element_type() != x.element_type()) {
    return InvalidArgument("from_dense: x and values have different dtypes");
  }
  if (channel_block < 1 || room < 1 || workers < 1) {
    return InvalidArgument("from_dense: the plan has an entry below 1");
  }
  Select select;
  ILAJAX_RETURN_IF_ERROR(ReadSelect(select_name, select));
  if (capacity < 1) return InvalidArgument("from_dense: the capacity is ", capacity);
  return DispatchFloat(x.element_type(), [&]<typename T>() -> ffi::Error {
    struct Worker {
      RunningTopK<T>* best;
      uint64_t* stage;
      int32_t* digits;
      Worker(Carver carver, int64_t block, int64_t room)
          : best(carver.Take<RunningTopK<T>>(block)),
            stage(carver.Take<uint64_t>(block * room)),
            digits(carver.Take<int32_t>(block * kDigits)),
            bytes(carver.used()) {}
      int64_t bytes;
    };
    const int64_t bytes = Worker(Carver(nullptr), channel_block, room).bytes;
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("from_dense", *workspace, workers * bytes));
    const int64_t blocks = CeilDiv(channels, channel_block);
    ParallelFor(pool, batch * blocks, workers, [&](int64_t task, int64_t id) {
      char* base = static_cast<char*>(workspace->untyped_data()) + id * bytes;
      const Worker worker(Carver(base), channel_block, room);
      const int64_t item = task / blocks, first = task % blocks * channel_block;
      const int64_t count = std::min(channel_block, channels - first);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t segment = (item * channels + first + j) * capacity;
        worker.best[j] = RunningTopK<T>(select, capacity, keys->typed_data() + segment,
                                        Data<T>(*values) + segment, room, worker.stage + j * room,
                                        worker.digits + j * kDigits);
      }
      const T* row = Data<T>(x) + item * sites * channels + first;
      for (int64_t site = 0; site < sites; ++site, row += channels) {
        for (int64_t j = 0; j < count; ++j) {
          const float value = static_cast<float>(row[j]);
          if (value == 0.0f || !IsCandidate(value, select)) continue;
          worker.best[j].Push(site, row[j]);
        }
      }
      for (int64_t j = 0; j < count; ++j) worker.best[j].Finish(sites);
    });
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(FromDenseFwd, ilajax::FromDenseFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Ret<xla::ffi::AnyBuffer>()              // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<std::string_view>("select")
                                  .Attr<int64_t>("channel_block")
                                  .Attr<int64_t>("room")
                                  .Attr<int64_t>("workers"));
