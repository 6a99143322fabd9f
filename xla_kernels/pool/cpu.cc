// Pooling over non-overlapping cells on the CPU, and its gradient; a task for each segment.
//
// The coarse grid is walked in slabs, whose entries lie together. Each entry finds its cell in a
// small dense buffer (the best slot so far, or the sum), with a bitmap of the cells in use; those
// are read in the order of their keys into the running selection. One pass, and no sort. Backward
// walks the same slabs, finds the best slots again, and hands each kept cell's cotangent to its
// slot, or spreads it over the cell's entries.
//
// With a shared support the first channel writes the keys; nothing is cut then, so all channels
// agree.

#include <algorithm>
#include <cstring>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/pool/spec.h"

namespace ilajax {
namespace {

// From the keys of sites to those of their cells.
class CellKeys {
 public:
  CellKeys() = default;
  explicit CellKeys(const Window& w) : rank_(w.rank) {
    int64_t step = 1;
    for (int a = rank_ - 1; a >= 0; --a) {
      axes_[a] = {Divider(w.input_shape[a]), Divider(w.strides[a]), w.input_shape[a], step};
      step *= w.output_shape[a];
    }
  }

  int64_t Of(int64_t key) const {
    int64_t cell = 0;
    for (int a = rank_ - 1; a > 0; --a) {
      const Axis& axis = axes_[a];
      const int64_t above = axis.size.Quotient(key);
      cell += axis.stride.Quotient(key - above * axis.sites) * axis.step;
      key = above;
    }
    return cell + axes_[0].stride.Quotient(key) * axes_[0].step;
  }

 private:
  struct Axis {
    Divider size{1}, stride{1};
    int64_t sites = 0, step = 0;
  };
  int rank_ = 0;
  Axis axes_[kMaxRank];
};

struct PoolPlan {
  int64_t slab_planes;  // of the grid of cells, at once
  int64_t stage;
  int64_t workers;
};

struct Pool : PoolShape {
  const PoolPlan& plan;
  CellKeys cells;
  bool average = false;

  Pool(const PoolShape& s, const PoolPlan& p) : PoolShape(s), plan(p), cells(s.w) {}

  int64_t slab_sites() const { return SlabSites(w, plan); }
  static int64_t SlabSites(const Window& w, const PoolPlan& plan) {
    return std::min(plan.slab_planes, w.output_shape[0]) * w.output_plane();
  }
  // The input keys of cells in output planes [plane, plane + slab_planes).
  int64_t PlaneKey(int64_t plane) const {
    return std::min(plane * w.strides[0], w.input_shape[0]) * w.input_plane();
  }
};

// The cells of one slab: a worker's part of the workspace.
template <typename T>
struct Cells {
  float* values;   // the largest, or the sum; backward: the cotangent
  int32_t* slots;  // where the largest stands
  uint64_t* bitmap;
  uint64_t* stage;
  int32_t* digits;

  Cells(Carver& carver, const Window& w, const PoolPlan& plan)
      : values(carver.Take<float>(Pool::SlabSites(w, plan))),
        slots(carver.Take<int32_t>(Pool::SlabSites(w, plan))),
        bitmap(carver.Take<uint64_t>(CeilDiv(Pool::SlabSites(w, plan), 64))),
        stage(carver.Take<uint64_t>(plan.stage)),
        digits(carver.Take<int32_t>(kDigits)) {}

  bool Mark(int64_t cell) {
    const uint64_t bit = uint64_t{1} << (cell & 63);
    const bool marked = bitmap[cell >> 6] & bit;
    bitmap[cell >> 6] |= bit;
    return marked;
  }
  bool Marked(int64_t cell) const { return bitmap[cell >> 6] >> (cell & 63) & 1; }
};

// Calls f(slot, cell of the slab) for the entries whose cells lie in the slab from `plane`.
template <typename F>
void ForEntries(const Pool& s, const int32_t* key, int64_t plane, F&& f) {
  const int64_t first = s.PlaneKey(plane), last = s.PlaneKey(plane + s.plan.slab_planes);
  const int64_t base = plane * s.w.output_plane();
  const int32_t* end = key + s.slots;
  for (const int32_t* k = std::lower_bound(key, end, first); k != end && *k < last; ++k) {
    if (*k >= first) f(k - key, s.cells.Of(*k) - base);
  }
}

template <typename T>
void FindLargest(const Pool& s, const int32_t* key, const T* value, int64_t plane,
                 Cells<T>& cells) {
  ForEntries(s, key, plane, [&](int64_t slot, int64_t cell) {
    const float v = static_cast<float>(value[slot]);
    if (cells.Mark(cell) && !Beats(v, cells.values[cell])) return;
    cells.values[cell] = v;
    cells.slots[cell] = static_cast<int32_t>(slot);
  });
}

template <typename T>
void PoolSegment(const Pool& s, const int32_t* key, const T* value, int32_t* pooled_key, T* pooled,
                 Cells<T>& cells) {
  RunningTopK<T> best(Select::kValue, s.capacity, pooled_key, pooled, s.plan.stage, cells.stage,
                      cells.digits);
  std::memset(cells.bitmap, 0, CeilDiv(s.slab_sites(), 64) * sizeof(uint64_t));
  for (int64_t plane = 0; plane < s.w.output_shape[0]; plane += s.plan.slab_planes) {
    if (s.average) {
      ForEntries(s, key, plane, [&](int64_t slot, int64_t cell) {
        const float v = static_cast<float>(value[slot]);
        cells.values[cell] = cells.Mark(cell) ? cells.values[cell] + v : v;
      });
    } else {
      FindLargest(s, key, value, plane, cells);
    }
    const int64_t base = plane * s.w.output_plane();
    for (int64_t word = 0; word < CeilDiv(s.slab_sites(), 64); ++word) {
      for (uint64_t bits = cells.bitmap[word]; bits != 0; bits &= bits - 1) {
        const int64_t cell = word * 64 + __builtin_ctzll(bits);
        const float v = cells.values[cell];
        best.Push(base + cell, T(s.average ? v / SitesOf(s.w, base + cell) : v));
      }
      cells.bitmap[word] = 0;
    }
  }
  best.Finish(s.w.output_sites);
}

template <typename T>
void UnpoolSegment(const Pool& s, const int32_t* key, const T* value, const int32_t* pooled_key,
                   const T* cotangent, T* value_bar, Cells<T>& cells) {
  std::fill(value_bar, value_bar + s.slots, T(0.0f));
  const int32_t* pooled_end = pooled_key + s.capacity;
  for (int64_t plane = 0; plane < s.w.output_shape[0]; plane += s.plan.slab_planes) {
    std::memset(cells.bitmap, 0, CeilDiv(s.slab_sites(), 64) * sizeof(uint64_t));
    if (!s.average) FindLargest(s, key, value, plane, cells);
    const int64_t base = plane * s.w.output_plane();
    const int64_t last =
        std::min(plane + s.plan.slab_planes, s.w.output_shape[0]) * s.w.output_plane();
    for (const int32_t* k = std::lower_bound(pooled_key, pooled_end, base);
         k != pooled_end && *k < last; ++k) {
      if (*k < base) continue;
      const int64_t cell = *k - base;
      const T g = cotangent[k - pooled_key];
      if (s.average) {
        cells.values[cell] = static_cast<float>(g) / SitesOf(s.w, *k);
        cells.Mark(cell);
      } else if (cells.Marked(cell)) {
        value_bar[cells.slots[cell]] = g;
      }
    }
    if (!s.average) continue;
    ForEntries(s, key, plane, [&](int64_t slot, int64_t cell) {
      if (cells.Marked(cell)) value_bar[slot] = T(cells.values[cell]);
    });
  }
}

// Plan and workspace of both directions.
template <typename Spec>
struct OfBoth {
  using Call = Spec;
  using Plan = PoolPlan;
  template <typename T>
  struct Layout {
    LayoutOfEach<Cells<T>> workers;

    Layout(Carver& carver, const PoolShape& s, const Plan& plan)
        : workers(carver, plan.workers, s.w, plan) {}
  };

  template <typename T>
  static Plan Make(const PoolShape& s, const Tuning& tuning) {
    const int64_t planes = tuning.slab_bytes / (s.w.output_plane() * 8);
    Plan plan = {std::clamp<int64_t>(planes, 1, s.w.output_shape[0]), StageOfSegment(s.capacity),
                 1};
    plan.workers =
        tuning.Workers(s.segments(), SizeOf<Cells<T>>(s.w, plan), tuning.CpuWorkspace(s.w.sites()));
    return plan;
  }

  // Calls body(segment, its key segment, cells) for all segments.
  template <typename T, typename Body>
  static void ForSegments(ffi::ThreadPool& pool, const PoolShape& s, const Plan& plan,
                          const Layout<T>& layout, Body&& body) {
    ParallelFor(pool, s.segments(), plan.workers, [&](int64_t segment, int64_t worker) {
      Cells<T> cells = layout.workers.At(worker, s.w, plan);
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
    ForSegments<T>(pool, s, plan, layout, [&](int64_t segment, int64_t keys, Cells<T>& cells) {
      PoolSegment(
          s, call.keys.typed_data() + keys * s.slots, Data<T>(call.values) + segment * s.slots,
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
    ForSegments<T>(pool, s, plan, layout, [&](int64_t segment, int64_t keys, Cells<T>& cells) {
      UnpoolSegment(s, call.keys.typed_data() + keys * s.slots,
                    Data<T>(call.values) + segment * s.slots,
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
