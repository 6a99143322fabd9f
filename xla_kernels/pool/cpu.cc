// Pooling over non-overlapping cells on the CPU, and its gradient; a task for each segment.
//
// The coarse grid is walked in slabs, whose entries lie together. A block of entries at a time
// finds its cells, in loops that compilers turn into vectors, and is then taken into a small dense
// buffer with a word for each cell: the best slot so far, or the sum. Neither has a branch that
// depends on data. A byte for each line of the cache says where the buffer is in use; there it is
// read, in the order of the keys, and cleared. One pass, and no sort. Backward walks the same
// slabs, finds the best slots again, and hands each kept cell's cotangent to its slot, or spreads
// it over the cell's entries.
//
// With a shared support the first channel writes the keys; nothing is cut then, so all channels
// agree.

#include <algorithm>
#include <cstring>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/simd.h"
#include "xla_kernels/pool/spec.h"

namespace ilajax {
namespace {

constexpr int64_t kBlock = 256;  // entries, or cells, handled at once

// n / d for n < bound <= 2^31, by a multiplication of 32 bits. It is narrow if the product has no
// more, as with a power of two or on a grid that is not long: vectors like that better.
struct Quotient {
  uint32_t inverse = 1;
  int shift = 0;
  bool narrow = true;

  Quotient() = default;
  Quotient(int64_t d, int64_t bound) {
    // Rounding the inverse up adds n * error / (d << shift) to the quotient: less than 1 / d.
    int64_t up = 1;
    while ((up * d - (int64_t{1} << shift)) * (bound - 1) >= int64_t{1} << shift) {
      ++shift;
      up = ((int64_t{1} << shift) + d - 1) / d;
    }
    inverse = static_cast<uint32_t>(up);
    narrow = shift < 32 && up * (bound - 1) <= 0xffffffff;
  }

  template <bool kNarrow>
  uint32_t Of(uint32_t n) const {
    if constexpr (kNarrow) return n * inverse >> shift;
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * inverse >> shift);
  }
};

// How the key of a site, counted from the first of its slab, becomes that of its cell.
struct CellKeys {
  struct Axis {
    Quotient size, stride;
    uint32_t sites = 1, step = 0;  // sites along it; how far apart the keys of its cells are
  };
  int rank;  // 2 at least: a line gets a leading axis of one plane
  Axis axes[kMaxRank];
  bool narrow_first = true, narrow = true;  // the first quotient, by the last size; and the others

  CellKeys(const Window& w, int64_t slab_sites) : rank(std::max(w.rank, 2)) {
    int64_t step = 1, bound = slab_sites;
    for (int a = w.rank - 1; a >= 0; --a) {
      const int64_t sites = w.input_shape[a];
      Axis& axis = axes[a + rank - w.rank];
      axis = {Quotient(sites, bound), Quotient(w.strides[a], sites), static_cast<uint32_t>(sites),
              static_cast<uint32_t>(step)};
      narrow &= axis.stride.narrow;
      (a == w.rank - 1 ? narrow_first : narrow) &= axis.size.narrow;
      step *= w.output_shape[a];
      bound = CeilDiv(bound, sites);
    }
  }
};

// SitesOf, for many cells at once: along most axes all cells have as many sites.
struct CellSizes {
  struct Axis {
    Quotient step, size;
    uint32_t cells = 0, inner = 0, last = 0;  // cells along it, and how many sites these have
  };
  uint32_t even = 1;  // sites of a cell along the axes where all cells have as many
  int uneven = 0;     // the other axes
  Axis axes[kMaxRank];

  explicit CellSizes(const Window& w) {
    int64_t step = 1;
    for (int a = w.rank - 1; a >= 0; --a) {
      const int64_t cells = w.output_shape[a], inner = std::min(w.strides[a], w.input_shape[a]);
      const int64_t last = w.input_shape[a] - (cells - 1) * w.strides[a];
      if (last == inner) {
        even *= static_cast<uint32_t>(inner);
      } else {
        axes[uneven++] = {Quotient(step, w.output_sites), Quotient(cells, w.output_sites),
                          static_cast<uint32_t>(cells), static_cast<uint32_t>(inner),
                          static_cast<uint32_t>(last)};
      }
      step *= cells;
    }
  }
};

struct PoolPlan {
  int64_t slab_planes;  // of the grid of cells, at once
  int64_t stage;
  int64_t workers;
};

// Planes of cells, and the sites in them: the first of each, and how many.
struct Slab {
  uint32_t first_cell, cells, first_site, sites;
};

struct Pool : PoolShape {
  const PoolPlan& plan;
  CellKeys cell_keys;
  CellSizes cell_sizes;
  bool average = false;

  Pool(const PoolShape& s, const PoolPlan& p)
      : PoolShape(s), plan(p), cell_keys(s.w, SlabSites(s.w, p)), cell_sizes(s.w) {}

  static int64_t SlabCells(const Window& w, const PoolPlan& plan) {
    return std::min(plan.slab_planes, w.output_shape[0]) * w.output_plane();
  }
  static int64_t SlabSites(const Window& w, const PoolPlan& plan) {
    return std::min(plan.slab_planes * w.strides[0], w.input_shape[0]) * w.input_plane();
  }

  // Calls f(slab) for all slabs.
  template <typename F>
  void ForSlabs(F&& f) const {
    for (int64_t plane = 0; plane < w.output_shape[0]; plane += plan.slab_planes) {
      const int64_t end = std::min(plane + plan.slab_planes, w.output_shape[0]);
      const int64_t site = plane * w.strides[0] * w.input_plane();
      const int64_t end_site = std::min(end * w.strides[0], w.input_shape[0]) * w.input_plane();
      f(Slab{static_cast<uint32_t>(plane * w.output_plane()),
             static_cast<uint32_t>((end - plane) * w.output_plane()), static_cast<uint32_t>(site),
             static_cast<uint32_t>(end_site - site)});
    }
  }
};

// Where the keys below `end` end that begin at `from`.
inline int64_t EndOf(const int32_t* keys, int64_t from, int64_t count, int64_t end) {
  return std::lower_bound(keys + from, keys + count, end) - keys;
}

// --- The cells of a slab -------------------------------------------------------------------------

// A cell's word, when a slot may have its largest value; the largest word wins. That is so by
// Beats: NaN comes first, of equal values the first slot. Adding 0 makes one of the two zeros.
inline uint64_t SlotWord(float value, uint32_t slot) {
  const uint32_t bits = FloatBits(value + 0.0f);
  const uint32_t flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
  const uint32_t nan = 0u - static_cast<uint32_t>(value != value);
  return static_cast<uint64_t>((bits ^ flip) | nan) << 32 | ~slot;
}
inline uint32_t SlotOf(uint64_t word) { return ~static_cast<uint32_t>(word); }

// A cell's word with its sum. The sign is turned, so that an empty cell has -0, which any value
// replaces when it is added.
inline uint64_t SumWord(float sum) { return uint64_t{1} << 32 | (FloatBits(sum) ^ 0x80000000u); }
inline float SumOf(uint64_t word) { return BitsFloat(static_cast<uint32_t>(word) ^ 0x80000000u); }

// A worker's part of the workspace. All words are 0 between two slabs.
struct Cells {
  static constexpr int64_t kGroup = 8;  // cells, a line of the cache

  int64_t rows;     // of eight groups
  uint64_t* words;  // of each cell, 0 where it is empty; behind them one for sites outside
  uint64_t* used;   // a byte for each group: 1 where some cell may be in use
  uint64_t* stage;
  int32_t* digits;
  bool* cleared;

  Cells(Carver& carver, const Window& w, const PoolPlan& plan)
      : rows(CeilDiv(Pool::SlabCells(w, plan), 8 * kGroup)),
        words(carver.Take<uint64_t>(rows * 8 * kGroup + 1)),
        used(carver.Take<uint64_t>(rows + 1)),
        stage(carver.Take<uint64_t>(plan.stage)),
        digits(carver.Take<int32_t>(kDigits)),
        cleared(carver.Take<bool>(1)) {}

  uint32_t outside() const { return static_cast<uint32_t>(rows * 8 * kGroup); }

  // Before a worker's first segment.
  void Clear() {
    if (*cleared) return;
    std::memset(words, 0, (outside() + 1) * sizeof(uint64_t));
    std::memset(used, 0, (rows + 1) * sizeof(uint64_t));
    *cleared = true;
  }
};

}  // namespace
}  // namespace ilajax

namespace ilajax::baseline {
#include "xla_kernels/pool/segment.inc"
}  // namespace ilajax::baseline

ILAJAX_BEGIN_AVX2
namespace ilajax::avx2 {
#if ILAJAX_HAS_AVX2_TARGET
#include "xla_kernels/pool/segment.inc"
#else
using baseline::Loops;
#endif
}  // namespace ilajax::avx2
ILAJAX_END_TARGET

namespace ilajax {
namespace {

// Plan and workspace of both directions.
template <typename Spec>
struct OfBoth {
  using Call = Spec;
  using Plan = PoolPlan;
  template <typename T>
  struct Layout {
    LayoutOfEach<Cells> workers;

    Layout(Carver& carver, const PoolShape& s, const Plan& plan)
        : workers(carver, plan.workers, s.w, plan) {}
  };

  template <typename T>
  static Plan Make(const PoolShape& s, const Tuning& tuning) {
    const int64_t planes = tuning.slab_bytes / (s.w.output_plane() * 8);
    Plan plan = {std::clamp<int64_t>(planes, 1, s.w.output_shape[0]), StageOfSegment(s.capacity),
                 1};
    plan.workers =
        tuning.Workers(s.segments(), SizeOf<Cells>(s.w, plan), tuning.CpuWorkspace(s.w.sites()));
    return plan;
  }

  // Calls body(segment, its key segment, cells) for all segments.
  template <typename T, typename Body>
  static void ForSegments(ffi::ThreadPool& pool, const PoolShape& s, const Plan& plan,
                          const Layout<T>& layout, Body&& body) {
    for (int64_t i = 0; i < plan.workers; ++i) *layout.workers.At(i, s.w, plan).cleared = false;
    ParallelFor(pool, s.segments(), plan.workers, [&](int64_t segment, int64_t worker) {
      Cells cells = layout.workers.At(worker, s.w, plan);
      cells.Clear();
      body(segment, s.KeySegment(segment), cells);
    });
  }
};

struct PoolForward : OfBoth<PoolFwd> {
  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, PoolFwd call, const PoolShape& shape,
                        const Plan& plan, const Layout<T>& layout) {
    Pool s(shape, plan);
    ILAJAX_RETURN_IF_ERROR(ReadMode(call.mode, s.average));
    const auto run = HasAvx2() ? avx2::Loops::kPool<T> : baseline::Loops::kPool<T>;
    ForSegments<T>(pool, s, plan, layout, [&](int64_t segment, int64_t keys, Cells& cells) {
      run(s, call.keys.typed_data() + keys * s.slots, Data<T>(call.values) + segment * s.slots,
          s.WritesKeys(segment) ? call.pooled_keys->typed_data() + keys * s.capacity : nullptr,
          Data<T>(*call.pooled) + segment * s.capacity, cells);
    });
    return ffi::Error::Success();
  }
};

struct PoolBackward : OfBoth<PoolBwd> {
  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, PoolBwd call, const PoolShape& shape,
                        const Plan& plan, const Layout<T>& layout) {
    Pool s(shape, plan);
    ILAJAX_RETURN_IF_ERROR(ReadMode(call.mode, s.average));
    const auto run = HasAvx2() ? avx2::Loops::kUnpool<T> : baseline::Loops::kUnpool<T>;
    ForSegments<T>(pool, s, plan, layout, [&](int64_t segment, int64_t keys, Cells& cells) {
      run(s, call.keys.typed_data() + keys * s.slots, Data<T>(call.values) + segment * s.slots,
          call.pooled_keys.typed_data() + keys * s.capacity,
          Data<T>(call.cotangent) + segment * s.capacity,
          Data<T>(*call.values_bar) + segment * s.slots, cells);
    });
    return ffi::Error::Success();
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(PoolFwd, PoolForward);
ILAJAX_CPU_TARGET(PoolBwd, PoolBackward);
