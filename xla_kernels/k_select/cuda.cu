// k-selection of stored entries on the GPU, and its gradient.
//
// Forward: common/cuda_select.cuh, a radix select and ordered emission; a block for each segment,
// or for each chunk of long ones. Backward: one thread an entry finds its key among the kept ones
// by bisection. Keys and cotangents are read once, values_bar is written once; the kept keys of a
// segment stay in the caches.

#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/cuda_select.cuh"
#include "xla_kernels/k_select/spec.h"

namespace ilajax {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    MatchKernel(KSelectShape s, int64_t sites, const int32_t* keys, const int32_t* kept_keys,
                const T* cotangent, T* values_bar) {
  const int64_t entries = s.segments() * s.slots, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < entries; i += stride) {
    const int64_t segment = i / s.slots;
    const int32_t key = keys[i];
    const int32_t* kept = kept_keys + segment * s.capacity;
    T value = T(0.0f);
    if (key >= 0 && key < sites) {
      const int64_t j = LowerBound(kept, s.capacity, key);
      if (j < s.capacity && kept[j] == key) value = cotangent[segment * s.capacity + j];
    }
    values_bar[i] = value;
  }
}

struct KSelectForward {
  using Call = KSelectFwd;
  struct Plan {
    int64_t chunk;  // entries of a block
  };
  template <typename T>
  struct Layout {
    SelectWorkspace select;

    Layout(Carver& carver, const KSelectShape& s, const Plan& plan)
        : select(carver, s.segments(), s.slots, plan.chunk) {}
  };

  template <typename T>
  static Plan Make(const KSelectShape& s, const Tuning& tuning) {
    return {SelectChunk(s.segments(), s.slots, tuning)};
  }

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, KSelectFwd call, const KSelectShape& s,
                        const Plan& plan, const Layout<T>& layout) {
    Select select = Select::kValue;
    ILAJAX_RETURN_IF_ERROR(ReadSelect(call.select, select));
    const Entries<T> entries = {
        call.keys.typed_data(), Data<T>(call.values), s.segments(), 1, s.slots, call.sites, select};
    return LaunchSelect(stream, entries, plan.chunk, layout.select, call.kept_keys->typed_data(),
                        Data<T>(*call.kept_values), s.capacity);
  }
};

struct KSelectBackward {
  using Call = KSelectBwd;

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, KSelectBwd call, const KSelectShape& s) {
    return Launch<MatchKernel<T>>(GridFor(CeilDiv(s.segments() * s.slots, kThreads)), kThreads, 0,
                                  stream, s, call.sites, call.keys.typed_data(),
                                  call.kept_keys.typed_data(), Data<T>(call.cotangent),
                                  Data<T>(*call.values_bar));
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CUDA_TARGET(KSelectFwd, KSelectForward);
ILAJAX_CUDA_TARGET(KSelectBwd, KSelectBackward);
