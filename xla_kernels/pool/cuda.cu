// Pooling over windows on the GPU, which are cells where they do not overlap, and its gradient.
//
// Forward: the cells of a segment are cut into slabs, each a block's. A slab's entries lie in a
// contiguous range of keys, found by bisection, and mark their cells, one or several, in a bitmap
// in shared memory.
// One launch counts the cells in use; the next finds the bitmap again, ranks its bits, which are in
// the order of the output, and one thread a cell gathers the cell's entries, in the order of their
// keys. So sums are repeatable, without float atomics, and there is no grid-sized buffer. Where K'
// cuts, the cells go to the workspace and k-selection (common/cuda_select.cuh) follows, for as many
// segments at a time as fit. Backward: one thread an entry finds its cells among the kept ones and
// adds up what they have for it, in the order of the cells. Of a maximum in plain cells, one thread
// a kept cell finds its largest entry again and hands it the cotangent.
//
// Traffic: the keys are read about twice for a slab that is a run of planes, and once more with the
// values by the gather, whose bisections stay in the caches.

#include <algorithm>

#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/cuda_select.cuh"
#include "xla_kernels/pool/spec.h"

namespace ilajax {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsPerThread = 4;
constexpr int kSlabWords = kThreads * kWordsPerThread;
constexpr int64_t kSlab = kSlabWords * 32;  // cells of a block

struct Pool : PoolShape {
  PoolMode mode = PoolMode::kMax;
  bool plain = true;
  uint32_t windows = 1;  // that may hold a site

  explicit Pool(const PoolShape& s)
      : PoolShape(s), plain(s.Plain()), windows(static_cast<uint32_t>(s.reach())) {}
};

ILAJAX_HOST_DEVICE int64_t SlabsOf(const PoolShape& s) {
  return (s.w.output_sites + kSlab - 1) / kSlab;
}

__device__ uint32_t CellOf(const Window& w, uint32_t key) {
  uint32_t cell = 0, step = 1;
  for (int a = w.rank - 1; a >= 0; --a) {
    const uint32_t size = static_cast<uint32_t>(w.input_shape[a]);
    cell += key % size / static_cast<uint32_t>(w.strides[a]) * step;
    key /= size;
    step *= static_cast<uint32_t>(w.output_shape[a]);
  }
  return cell;
}

// The cell of a key among those that may hold it, or -1 if this one does not.
__device__ int64_t CellOf(const Pool& s, uint32_t key, uint32_t window) {
  if (s.plain) return CellOf(s.w, key);
  const Window& w = s.w;
  int64_t cell = 0, step = 1;
  for (int a = w.rank - 1; a >= 0; --a) {
    const uint32_t size = static_cast<uint32_t>(w.input_shape[a]);
    const uint32_t reach = static_cast<uint32_t>(s.Reach(a));
    const int64_t place = key % size + w.low[a];
    const int64_t at = place / w.strides[a] - window % reach;
    key /= size;
    window /= reach;
    if (place < 0 || at < 0 || at >= w.output_shape[a]) return -1;
    if (place - at * w.strides[a] >= w.window_shape[a]) return -1;
    cell += at * step;
    step *= w.output_shape[a];
  }
  return cell;
}

// The first key of run `r` of a cell, whose runs go along `axis`.
__device__ __forceinline__ int64_t RunKey(const Window& w, uint32_t cell, int axis, uint32_t r) {
  int64_t key = 0, step = 1;
  for (int a = w.rank - 1; a >= 0; --a) {
    const uint32_t size = static_cast<uint32_t>(w.output_shape[a]);
    const Extent extent(w, a, cell % size);
    int64_t p = extent.first;
    cell /= size;
    if (a < axis) {
      p += r % static_cast<uint32_t>(extent.count);
      r /= static_cast<uint32_t>(extent.count);
    }
    key += p * step;
    step *= w.input_shape[a];
  }
  return key;
}

// Calls f(slot) for the stored entries of a cell, in the order of their keys. The cell is a set of
// runs of consecutive keys; each is found by a bisection that starts where the one before ended.
template <typename F>
__device__ void ForCell(const Window& w, uint32_t cell, const int32_t* keys, int64_t slots, F&& f) {
  // A run goes along `axis`, over the trailing axes which the cell spans whole.
  int axis = w.rank - 1;
  int64_t inner = 1;
  while (axis > 0 && w.output_shape[axis] == 1 && Extent(w, axis, 0).count == w.input_shape[axis]) {
    inner *= w.input_shape[axis--];
  }
  int64_t run = 0, runs = 1;
  uint32_t rest = cell;
  for (int a = w.rank - 1; a >= 0; --a) {
    const uint32_t size = static_cast<uint32_t>(w.output_shape[a]);
    const int64_t extent = Extent(w, a, rest % size).count;
    rest /= size;
    if (extent <= 0) return;  // a window in the padding
    if (a == axis) run = extent * inner;
    if (a < axis) runs *= extent;
  }
  int64_t slot = 0;
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t key = RunKey(w, cell, axis, static_cast<uint32_t>(r));
    slot += LowerBound(keys + slot, slots - slot, key);
    for (; slot < slots && keys[slot] < key + run; ++slot) {
      if (keys[slot] >= key) f(slot);
    }
  }
}

// The slot of the largest entry of a cell; -1 if there is none.
template <typename T>
__device__ int64_t LargestOf(const Window& w, uint32_t cell, const int32_t* keys, const T* values,
                             int64_t slots) {
  int64_t largest = -1;
  float best = 0.0f;
  ForCell(w, cell, keys, slots, [&](int64_t slot) {
    const float v = static_cast<float>(values[slot]);
    if (largest >= 0 && !Beats(v, best)) return;
    largest = slot;
    best = v;
  });
  return largest;
}

// What the sum over a cell's entries, so many, is divided by.
__device__ __forceinline__ float Divisor(const Pool& s, uint32_t cell, int32_t stored) {
  if (s.mode == PoolMode::kOverSites) return SitesOf(s.w, cell);
  return s.mode == PoolMode::kOverStored ? static_cast<float>(stored) : 1.0f;
}

// The cells in use of one slab: a bit for each, and how many stand in front of each word.
struct Bitmap {
  uint32_t words[kSlabWords];
  int32_t before[kSlabWords];
  int32_t warps[kThreads / 32];
  int32_t earlier;  // cells in the slabs before
};

// Marks the cells of a slab; by all threads of a block.
__device__ void MarkCells(const Pool& s, const int32_t* keys, int64_t first_cell, Bitmap& bitmap) {
  for (int i = threadIdx.x; i < kSlabWords; i += kThreads) bitmap.words[i] = 0;
  __syncthreads();
  const int64_t cells = min(kSlab, s.w.output_sites - first_cell);
  const int64_t first_plane = first_cell / s.w.output_plane();
  const int64_t last_plane = (first_cell + cells - 1) / s.w.output_plane() + 1;
  const Extent first_extent(s.w, 0, first_plane), last_extent(s.w, 0, last_plane - 1);
  const int64_t first_key = first_extent.first * s.w.input_plane();
  const int64_t last_key = (last_extent.first + last_extent.count) * s.w.input_plane();
  for (int64_t i = LowerBound(keys, s.slots, first_key) + threadIdx.x; i < s.slots; i += kThreads) {
    const int32_t key = keys[i];
    if (key >= last_key) break;
    if (key < first_key) continue;
    for (uint32_t window = 0; window < s.windows; ++window) {
      const int64_t cell = CellOf(s, static_cast<uint32_t>(key), window) - first_cell;
      if (cell >= 0 && cell < cells) atomicOr(&bitmap.words[cell / 32], 1u << cell % 32);
    }
  }
  __syncthreads();
}

// Counts the cells in front of each word; returns how many there are. By all threads of a block.
__device__ int32_t RankCells(Bitmap& bitmap) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t own = 0;
  for (int i = 0; i < kWordsPerThread; ++i) {
    own += __popc(bitmap.words[threadIdx.x * kWordsPerThread + i]);
  }
  int32_t before = WarpExclusiveScan(own);
  if (lane == 31) bitmap.warps[warp] = before + own;
  __syncthreads();
  int32_t total = 0;
  for (int other = 0; other < kThreads / 32; ++other) {
    if (other < warp) before += bitmap.warps[other];
    total += bitmap.warps[other];
  }
  for (int i = 0; i < kWordsPerThread; ++i) {
    const int word = threadIdx.x * kWordsPerThread + i;
    bitmap.before[word] = before;
    before += __popc(bitmap.words[word]);
  }
  __syncthreads();
  return total;
}

// The cell of a slab that has `rank` cells in front of it.
__device__ int64_t CellAt(const Bitmap& bitmap, int32_t rank) {
  int word = 0;
  for (int step = kSlabWords / 2; step > 0; step /= 2) {
    if (bitmap.before[word + step] <= rank) word += step;
  }
  uint32_t bits = bitmap.words[word];
  for (int32_t i = bitmap.before[word]; i < rank; ++i) bits &= bits - 1;
  return word * 32 + __ffs(static_cast<int>(bits)) - 1;
}

// counts[key segment][slab]: the cells in use, for `count` key segments from `first`.
__global__ void __launch_bounds__(kThreads)
    CountKernel(Pool s, int64_t first, int64_t count, const int32_t* keys, int32_t* counts) {
  __shared__ Bitmap bitmap;
  for (int64_t task = blockIdx.x; task < count * SlabsOf(s); task += gridDim.x) {
    const int64_t segment = first + task / SlabsOf(s), slab = task % SlabsOf(s);
    MarkCells(s, keys + segment * s.slots, slab * kSlab, bitmap);
    const int32_t total = RankCells(bitmap);
    if (threadIdx.x == 0) counts[task] = total;
    __syncthreads();
  }
}

// Writes the cells of `count` segments from `first` in the order of their keys, `capacity` slots
// for each. With a shared support the first channel writes the keys. Three blocks of a
// multiprocessor leave the registers that it needs: left alone, the compiler spills some to fit in
// six.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    PoolKernel(Pool s, int64_t first, int64_t count, const int32_t* keys, const T* values,
               const int32_t* counts, int64_t capacity, int32_t* pooled_keys, T* pooled) {
  __shared__ Bitmap bitmap;
  for (int64_t task = blockIdx.x; task < count * SlabsOf(s); task += gridDim.x) {
    const int64_t segment = task / SlabsOf(s), slab = task % SlabsOf(s);
    const int64_t key_segment = s.KeySegment(first + segment);
    const int32_t* key = keys + key_segment * s.slots;
    const T* value = values + (first + segment) * s.slots;
    const int32_t* slab_counts = counts + (key_segment - s.KeySegment(first)) * SlabsOf(s);
    int32_t* out_keys = pooled_keys + s.KeySegment(segment) * capacity;
    const bool writes_keys = s.WritesKeys(segment);
    T* out = pooled + segment * capacity;

    if (threadIdx.x == 0) bitmap.earlier = 0;
    MarkCells(s, key, slab * kSlab, bitmap);
    int32_t earlier = 0;
    for (int64_t i = threadIdx.x; i < slab; i += kThreads) earlier += slab_counts[i];
    if (earlier != 0) atomicAdd(&bitmap.earlier, earlier);
    const int32_t total = RankCells(bitmap);
    for (int32_t rank = threadIdx.x; rank < total; rank += kThreads) {
      const int64_t cell = slab * kSlab + CellAt(bitmap, rank), place = bitmap.earlier + rank;
      if (place >= capacity) break;
      T result = T(0.0f);
      if (s.mode == PoolMode::kMax) {
        const int64_t slot = LargestOf(s.w, static_cast<uint32_t>(cell), key, value, s.slots);
        if (slot >= 0) result = value[slot];
      } else {
        float sum = 0.0f;
        int32_t stored = 0;
        ForCell(s.w, static_cast<uint32_t>(cell), key, s.slots, [&](int64_t slot) {
          sum += static_cast<float>(value[slot]);
          ++stored;
        });
        result = T(sum / Divisor(s, static_cast<uint32_t>(cell), stored));
      }
      if (writes_keys) out_keys[place] = static_cast<int32_t>(cell);
      out[place] = result;
    }
    if (slab == SlabsOf(s) - 1) {
      for (int64_t i = bitmap.earlier + total + threadIdx.x; i < capacity; i += kThreads) {
        if (writes_keys) out_keys[i] = static_cast<int32_t>(s.w.output_sites);
        out[i] = T(0.0f);
      }
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) ZeroKernel(int64_t count, T* values) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    values[i] = T(0.0f);
  }
}

// Behind ZeroKernel: values_bar of the largest entry of each kept cell.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    MaxBackwardKernel(PoolShape s, const int32_t* keys, const T* values, const int32_t* pooled_keys,
                      const T* cotangent, T* values_bar) {
  const int64_t cells = s.segments() * s.capacity, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < cells; i += stride) {
    const int64_t segment = i / s.capacity, key_segment = s.KeySegment(segment);
    const int32_t cell = pooled_keys[key_segment * s.capacity + i % s.capacity];
    if (cell < 0 || cell >= s.w.output_sites) continue;
    const int64_t slot = LargestOf(s.w, static_cast<uint32_t>(cell), keys + key_segment * s.slots,
                                   values + segment * s.value_slots, s.slots);
    if (slot >= 0) values_bar[segment * s.slots + slot] = cotangent[i];
  }
}

// What a cell with cotangent g has for the entry in a slot.
template <typename T>
__device__ float ShareOf(const Pool& s, uint32_t cell, const int32_t* keys, const T* values,
                         int64_t slot, float g) {
  if (s.mode == PoolMode::kMax) {
    return LargestOf(s.w, cell, keys, values, s.slots) == slot ? g : 0.0f;
  }
  int32_t stored = 0;
  if (s.mode == PoolMode::kOverStored) {
    ForCell(s.w, cell, keys, s.slots, [&](int64_t) { ++stored; });
  }
  return g / Divisor(s, cell, stored);
}

// Registers as for PoolKernel.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    SpreadBackwardKernel(Pool s, const int32_t* keys, const T* values, const int32_t* pooled_keys,
                         const T* cotangent, T* values_bar) {
  const int64_t entries = s.segments() * s.slots, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < entries; i += stride) {
    const int64_t segment = i / s.slots, key_segment = s.KeySegment(segment);
    const int32_t* key = keys + key_segment * s.slots;
    const int32_t* pooled = pooled_keys + key_segment * s.capacity;
    const int32_t own = key[i % s.slots];
    float sum = 0.0f;
    if (own >= 0 && own < s.w.input_sites) {
      for (uint32_t window = 0; window < s.windows; ++window) {
        const int64_t cell = CellOf(s, static_cast<uint32_t>(own), window);
        if (cell < 0) continue;
        const int64_t j = LowerBound(pooled, s.capacity, cell);
        if (j >= s.capacity || pooled[j] != static_cast<int32_t>(cell)) continue;
        const float g = static_cast<float>(cotangent[segment * s.capacity + j]);
        sum += ShareOf(s, static_cast<uint32_t>(cell), key, values + segment * s.value_slots,
                       i % s.slots, g);
      }
    }
    values_bar[i] = T(sum);
  }
}

struct PoolForward {
  using Call = PoolFwd;
  struct Plan {
    int64_t segments_at_once;  // where the selection cuts
    int64_t chunk;             // of the selection: cells of a block
  };
  // Counts of the slabs; where the selection cuts, the cells and what it needs itself.
  template <typename T>
  struct Layout {
    int64_t segments, cells;
    int32_t* counts;
    int32_t* keys;
    T* values;
    SelectWorkspace select;

    Layout(Carver& carver, const PoolShape& s, const Plan& plan)
        : segments(s.Cuts() ? plan.segments_at_once : s.segments()),
          cells(s.Cuts() ? segments * s.most_cells() : 0),
          counts(carver.Take<int32_t>(segments, SlabsOf(s))),
          keys(carver.Take<int32_t>(cells)),
          values(carver.Take<T>(cells)),
          select(carver, segments, s.Cuts() ? s.most_cells() : 0, plan.chunk) {}
  };

  // Blocks take slabs of cells; where the capacity cuts, for as many segments at a time as fit.
  template <typename T>
  static Plan Make(const PoolShape& s, const Tuning& tuning) {
    Plan plan = {s.segments(), s.most_cells()};
    if (!s.Cuts()) return plan;
    while (true) {
      plan.chunk = SelectChunk(plan.segments_at_once, s.most_cells(), tuning);
      if (plan.segments_at_once <= 1 ||
          SizeOf<Layout<T>>(s, plan) <= tuning.CudaWorkspace(s.w.sites())) {
        return plan;
      }
      plan.segments_at_once = CeilDiv(plan.segments_at_once, 2);
    }
  }

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, PoolFwd call, const PoolShape& shape, const Plan& plan,
                        const Layout<T>& own) {
    Pool s(shape);
    ILAJAX_RETURN_IF_ERROR(ReadMode(call.mode, s, s.mode));
    const int32_t* key = call.keys.typed_data();
    const T* value = Data<T>(call.values);
    int32_t* const pooled_keys = call.pooled_keys->typed_data();
    T* const pooled = Data<T>(*call.pooled);
    if (!s.Cuts()) {
      ILAJAX_RETURN_IF_ERROR(Launch<CountKernel>(GridFor(s.key_segments() * SlabsOf(s)), kThreads,
                                                 0, stream, s, 0, s.key_segments(), key,
                                                 own.counts));
      return Launch<PoolKernel<T>>(GridFor(s.segments() * SlabsOf(s)), kThreads, 0, stream, s, 0,
                                   s.segments(), key, value, own.counts, s.capacity, pooled_keys,
                                   pooled);
    }
    // Each channel has its own keys, or there is one, which is as good.
    for (int64_t first = 0; first < s.segments(); first += own.segments) {
      const int64_t count = std::min(s.segments() - first, own.segments);
      const dim3 grid = GridFor(count * SlabsOf(s));
      ILAJAX_RETURN_IF_ERROR(
          Launch<CountKernel>(grid, kThreads, 0, stream, s, first, count, key, own.counts));
      ILAJAX_RETURN_IF_ERROR(Launch<PoolKernel<T>>(grid, kThreads, 0, stream, s, first, count, key,
                                                   value, own.counts, s.most_cells(), own.keys,
                                                   own.values));
      const Entries<T> cells = {own.keys,       own.values,       count,         1,
                                s.most_cells(), s.w.output_sites, Select::kValue};
      ILAJAX_RETURN_IF_ERROR(LaunchSelect(stream, cells, plan.chunk, own.select,
                                          pooled_keys + first * s.capacity,
                                          pooled + first * s.capacity, s.capacity));
    }
    return ffi::Error::Success();
  }
};

struct PoolBackward {
  using Call = PoolBwd;

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, PoolBwd call, const PoolShape& shape) {
    Pool s(shape);
    ILAJAX_RETURN_IF_ERROR(ReadMode(call.mode, s, s.mode));
    const int64_t entries = s.segments() * s.slots;
    const int32_t *keys = call.keys.typed_data(), *pooled_keys = call.pooled_keys.typed_data();
    const T* cotangent = Data<T>(call.cotangent);
    T* values_bar = Data<T>(*call.values_bar);
    const dim3 grid = GridFor(CeilDiv(entries, kThreads));
    if (!s.plain || s.mode != PoolMode::kMax) {
      return Launch<SpreadBackwardKernel<T>>(grid, kThreads, 0, stream, s, keys,
                                             Data<T>(call.values), pooled_keys, cotangent,
                                             values_bar);
    }
    ILAJAX_RETURN_IF_ERROR(Launch<ZeroKernel<T>>(grid, kThreads, 0, stream, entries, values_bar));
    return Launch<MaxBackwardKernel<T>>(GridFor(CeilDiv(s.segments() * s.capacity, kThreads)),
                                        kThreads, 0, stream, s, keys, Data<T>(call.values),
                                        pooled_keys, cotangent, values_bar);
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CUDA_TARGET(PoolFwd, PoolForward);
ILAJAX_CUDA_TARGET(PoolBwd, PoolBackward);
