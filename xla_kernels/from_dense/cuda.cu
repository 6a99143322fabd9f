// The non-zeros of a dense array on the GPU, at most K for each sample and channel.
//
// common/cuda_select.cuh over the sites of each (sample, channel), which stand C apart: the
// channels of one chunk go to neighbouring blocks, so that x comes out of the L2 cache for all but
// the first. x is read once for each pass: twice where nothing can be cut, else up to six times.

#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/cuda_select.cuh"
#include "xla_kernels/from_dense/spec.h"

namespace ilajax {
namespace {

struct FromDenseForward {
  using Call = FromDenseFwd;
  struct Plan {
    int64_t chunk;  // sites of a block
  };
  template <typename T>
  struct Layout {
    SelectWorkspace select;

    Layout(Carver& carver, const FromDenseShape& s, const Plan& plan)
        : select(carver, s.batch * s.channels, s.sites, plan.chunk) {}
  };

  template <typename T>
  static Plan Make(const FromDenseShape& s, const Tuning& tuning) {
    return {SelectChunk(s.batch * s.channels, s.sites, tuning)};
  }

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, FromDenseFwd call, const FromDenseShape& s,
                        const Plan& plan, const Layout<T>& layout) {
    Select select = Select::kValue;
    ILAJAX_RETURN_IF_ERROR(ReadSelect(call.select, select));
    const Entries<T> entries = {nullptr, Data<T>(call.x), s.batch * s.channels, s.channels, s.sites,
                                s.sites, select};
    return LaunchSelect(stream, entries, plan.chunk, layout.select, call.keys->typed_data(),
                        Data<T>(*call.values), s.capacity);
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CUDA_TARGET(FromDenseFwd, FromDenseForward);
