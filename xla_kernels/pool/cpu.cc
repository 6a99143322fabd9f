// Pooling over windows on the CPU, and its gradient; a task for each segment.
//
// The coarse grid is walked in slabs, whose entries lie together. A block of entries at a time
// finds its cells, in loops that compilers turn into vectors, and is then taken into a small dense
// buffer with a word for each cell: the best slot so far, or the sum. Neither has a branch that
// depends on data. A byte for each line of the cache says where the buffer is in use; there it is
// read, in the order of the keys, and cleared. One pass, and no sort. Where windows overlap, a
// block is taken once for each window that may hold a site, and slabs have entries in common.
//
// Backward walks the same slabs, finds the best slots again, and hands each kept cell's cotangent
// to its slot, or spreads it over the cell's entries. Where windows overlap, it walks slabs of the
// fine grid, with all the cells that their entries lie in, and an entry adds up what these have
// for it: no sum depends on the order of tasks, and each is rounded once.
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

// The windows that hold a site, where that is not one for each. Along an axis site p lies in the
// windows (p + low) / apart - j for j < reach, if that has j * apart + rest < width.
struct WindowKeys {
  struct Axis {
    Quotient size, apart_quotient;
    uint32_t sites, step, windows, width, apart, reach;
    int32_t low;
  };
  int rank;
  Axis axes[kMaxRank];
  bool narrow = true;

  WindowKeys(const PoolShape& s, int64_t slab_planes) : rank(s.w.rank) {
    const auto u32 = [](int64_t n) { return static_cast<uint32_t>(n); };
    const Window& w = s.w;
    int64_t planes = (slab_planes - 1) * w.strides[0] + w.window_shape[0];
    planes = std::min(planes, w.input_shape[0]);
    int64_t step = 1, bound = planes * w.input_plane();
    for (int a = rank - 1; a >= 0; --a) {
      const int64_t low = a == 0 ? w.window_shape[0] : std::max<int64_t>(w.low[a], 0);
      const int64_t places = (a == 0 ? planes : w.input_shape[a]) + low;
      axes[a] = {Quotient(w.input_shape[a], bound),
                 Quotient(w.strides[a], places),
                 u32(w.input_shape[a]),
                 u32(step),
                 u32(w.output_shape[a]),
                 u32(w.window_shape[a]),
                 u32(w.strides[a]),
                 u32(s.Reach(a)),
                 static_cast<int32_t>(w.low[a])};
      narrow &= axes[a].size.narrow && axes[a].apart_quotient.narrow;
      step *= w.output_shape[a];
      bound = CeilDiv(bound, w.input_shape[a]);
    }
  }
};

// SitesOf, for many cells at once: along most axes all cells have as many sites.
struct CellSizes {
  struct Axis {
    Quotient step, size;
    uint32_t cells, sites, apart, width;
    int32_t low;
  };
  uint32_t even = 1;  // sites of a cell along the axes where all cells have as many
  int uneven = 0;     // the other axes
  Axis axes[kMaxRank];

  explicit CellSizes(const Window& w) {
    int64_t step = 1;
    for (int a = w.rank - 1; a >= 0; --a) {
      const int64_t cells = w.output_shape[a], most = std::min(w.window_shape[a], w.input_shape[a]);
      const int64_t first = Extent(w, a, 0).count, last = Extent(w, a, cells - 1).count;
      if (first == most && last == most) {
        even *= static_cast<uint32_t>(most);
      } else {
        axes[uneven++] = {
            Quotient(step, w.output_sites),      Quotient(cells, w.output_sites),
            static_cast<uint32_t>(cells),        static_cast<uint32_t>(w.input_shape[a]),
            static_cast<uint32_t>(w.strides[a]), static_cast<uint32_t>(w.window_shape[a]),
            static_cast<int32_t>(w.low[a])};
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
  uint32_t planes = 0, into = 0;  // of cells; how far into the first one the sites begin
};

struct Pool : PoolShape {
  const PoolPlan& plan;
  bool plain;  // whether each site lies in one cell
  CellKeys cell_keys;
  WindowKeys window_keys;
  CellSizes cell_sizes;
  PoolMode mode = PoolMode::kMax;

  Pool(const PoolShape& s, const PoolPlan& p)
      : PoolShape(s),
        plan(p),
        plain(s.Plain()),
        cell_keys(s.w, SlabSites(s.w, p)),
        window_keys(s, std::min(p.slab_planes, s.w.output_shape[0])),
        cell_sizes(s.w) {}

  static int64_t SlabCells(const Window& w, const PoolPlan& plan) {
    return std::min(plan.slab_planes, w.output_shape[0]) * w.output_plane();
  }
  static int64_t SlabSites(const Window& w, const PoolPlan& plan) {
    return std::min(plan.slab_planes * w.strides[0], w.input_shape[0]) * w.input_plane();
  }

  // The planes [first, end) of cells, and their sites.
  Slab SlabOf(int64_t first, int64_t end) const {
    const auto inside = [&](int64_t plane) {
      return std::clamp<int64_t>(plane, 0, w.input_shape[0]);
    };
    const int64_t start = first * w.strides[0] - w.low[0];
    const int64_t from = inside(start);
    const int64_t to = inside((end - 1) * w.strides[0] - w.low[0] + w.window_shape[0]);
    const auto u32 = [](int64_t n) { return static_cast<uint32_t>(n); };
    return {u32(first * w.output_plane()),
            u32((end - first) * w.output_plane()),
            u32(from * w.input_plane()),
            u32(std::max<int64_t>(to - from, 0) * w.input_plane()),
            u32(end - first),
            u32(from - start)};
  }

  // Calls f(slab) for all slabs.
  template <typename F>
  void ForSlabs(F&& f) const {
    for (int64_t plane = 0; plane < w.output_shape[0]; plane += plan.slab_planes) {
      f(SlabOf(plane, std::min(plane + plan.slab_planes, w.output_shape[0])));
    }
  }

  // Calls f(slab, end) for all slabs of the fine grid, where each begins where the last one ended:
  // the cells of the slab hold all entries up to site `end`, wherever else these lie too.
  template <typename F>
  void ForFineSlabs(F&& f) const {
    const int64_t apart = w.strides[0], low = w.low[0], sites = w.input_shape[0];
    for (int64_t plane = 0; plane < sites;) {
      // The first cell whose end lies behind the plane.
      const int64_t behind = plane + low - w.window_shape[0] + 1;
      const int64_t first = behind > 0 ? CeilDiv(behind, apart) : 0;
      if (first >= w.output_shape[0]) return f(Slab{}, w.input_sites);
      const int64_t end = std::min(first + plan.slab_planes, w.output_shape[0]);
      plane = end == w.output_shape[0] ? sites : std::min(end * apart - low, sites);
      f(SlabOf(first, end), plane * w.input_plane());
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

// A cell's word with the number of its entries and their sum, and with one more. The sum's sign is
// turned, so that an empty cell has -0, which any value replaces when it is added.
inline float SumOf(uint64_t word) { return BitsFloat(static_cast<uint32_t>(word) ^ 0x80000000u); }
inline uint64_t CountOf(uint64_t word) { return word >> 32; }
inline uint64_t WithOneMore(uint64_t word, float value) {
  return (CountOf(word) + 1) << 32 | (FloatBits(value + SumOf(word)) ^ 0x80000000u);
}

// A cell's word in the gradient: what its entries share, and above it the number of them, or of a
// maximum the complement of its slot. 0 there: no entry has been taken into the cell.
inline uint64_t SharedBySum(uint64_t word) { return CountOf(word) << 32; }
inline uint64_t SharedBySlot(uint64_t word) { return word << 32; }
inline uint64_t WithShare(uint64_t word, float share) {
  return word >> 32 << 32 | FloatBits(share);
}
inline float ShareOf(uint64_t word) { return BitsFloat(static_cast<uint32_t>(word)); }
inline bool IsOf(uint64_t word, int64_t slot) {
  return static_cast<uint32_t>(word >> 32) == ~static_cast<uint32_t>(slot);
}

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
    // As many planes as hold a site: the gradient needs them at once.
    const int64_t planes = std::max(tuning.slab_bytes / (s.w.output_plane() * 8), s.Reach(0));
    Plan plan = {std::min(planes, s.w.output_shape[0]), StageOfSegment(s.capacity), 1};
    plan.workers =
        tuning.Workers(s.segments(), SizeOf<Cells>(s.w, plan), tuning.CpuWorkspace(s.w.sites()));
    return plan;
  }

  static bool Fits(const PoolShape& s, const Plan& plan) {
    return plan.slab_planes >= std::min(s.Reach(0), s.w.output_shape[0]) && plan.stage >= 1 &&
           plan.workers >= 1;
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
    ILAJAX_RETURN_IF_ERROR(ReadMode(call.mode, s, s.mode));
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
    ILAJAX_RETURN_IF_ERROR(ReadMode(call.mode, s, s.mode));
    const auto run = HasAvx2() ? avx2::Loops::kUnpool<T> : baseline::Loops::kUnpool<T>;
    ForSegments<T>(pool, s, plan, layout, [&](int64_t segment, int64_t keys, Cells& cells) {
      run(s, call.keys.typed_data() + keys * s.slots,
          Data<T>(call.values) + segment * s.value_slots,
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
