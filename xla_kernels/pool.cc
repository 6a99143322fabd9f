// Pooling over non-overlapping cells on the CPU, and its gradient; a task for each segment.
//
//   keys s32[B, C or 1, K], values T[B, C, K] -> pooled_keys s32[B, C or 1, K'], pooled T[B, C, K']
//
// The coarse grid is walked in slabs of rows of the leading axis, whose entries lie together. Each
// entry finds its cell in a small dense buffer (the best slot so far, or the sum), with a bitmap of
// the cells in use; those are read in the order of their keys into the running selection. One pass,
// and no sort. Backward walks the same slabs, finds the best slots again, and hands each kept
// cell's cotangent to its slot, or spreads it over the cell's entries.
//
// With a shared support the first channel writes the keys; nothing is cut then, so all channels
// agree.

#include "xla_kernels/pool.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/divider.h"
#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/workspace.h"

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

struct Pool : PoolShape {
  CellKeys cells;
  int64_t slab_rows = 0, room = 0, workers = 0;  // the plan

  int64_t slab_sites() const { return std::min(slab_rows, w.output_shape[0]) * w.output_row(); }
  // The input keys of cells in output rows [row, row + slab_rows).
  int64_t RowKey(int64_t row) const {
    return std::min(row * w.strides[0], w.input_shape[0]) * w.input_row();
  }

  static ffi::Error Read(const ffi::Buffer<ffi::S32>& keys, const ffi::AnyBuffer& values,
                         const ffi::Buffer<ffi::S32>& pooled_keys, const ffi::AnyBuffer& pooled,
                         std::string_view mode, Pool& s) {
    if (s.slab_rows < 1 || s.room < 1 || s.workers < 1) {
      return InvalidArgument("pool: the plan has an entry below 1");
    }
    s.cells = CellKeys(s.w);
    return PoolShape::Read(keys, values, pooled_keys, pooled, mode, s);
  }
};

// The cells of one slab.
template <typename T>
struct Cells {
  float* values = nullptr;   // the largest, or the sum; backward: the cotangent
  int32_t* slots = nullptr;  // where the largest stands
  uint64_t* bitmap = nullptr;
  uint64_t* stage = nullptr;
  int32_t* digits = nullptr;

  Cells(Carver& carver, const Pool& s)
      : values(carver.Take<float>(s.slab_sites())),
        slots(carver.Take<int32_t>(s.slab_sites())),
        bitmap(carver.Take<uint64_t>(CeilDiv(s.slab_sites(), 64))),
        stage(carver.Take<uint64_t>(s.room)),
        digits(carver.Take<int32_t>(kDigits)) {}

  bool Mark(int64_t cell) {
    const uint64_t bit = uint64_t{1} << (cell & 63);
    const bool marked = bitmap[cell >> 6] & bit;
    bitmap[cell >> 6] |= bit;
    return marked;
  }
  bool Marked(int64_t cell) const { return bitmap[cell >> 6] >> (cell & 63) & 1; }
};

// Sites of a cell inside the grid.
float SitesOf(const Window& w, int64_t cell) {
  int64_t sites = 1;
  for (int a = w.rank - 1; a >= 0; --a) {
    const int64_t p = cell % w.output_shape[a];
    cell /= w.output_shape[a];
    sites *= std::min(w.strides[a], w.input_shape[a] - p * w.strides[a]);
  }
  return static_cast<float>(sites);
}

// Calls f(slot, cell of the slab) for the entries whose cells lie in the slab of rows from `row`.
template <typename F>
void ForEntries(const Pool& s, const int32_t* key, int64_t row, F&& f) {
  const int64_t first = s.RowKey(row), last = s.RowKey(row + s.slab_rows);
  const int64_t base = row * s.w.output_row();
  const int32_t* end = key + s.slots;
  for (const int32_t* k = std::lower_bound(key, end, first); k != end && *k < last; ++k) {
    if (*k >= first) f(k - key, s.cells.Of(*k) - base);
  }
}

template <typename T>
void FindLargest(const Pool& s, const int32_t* key, const T* value, int64_t row, Cells<T>& cells) {
  ForEntries(s, key, row, [&](int64_t slot, int64_t cell) {
    const float v = static_cast<float>(value[slot]), best = cells.values[cell];
    // NaN beats numbers, and nothing beats NaN; of equal values the first stays.
    const bool beats = v > best || (v != v && best == best);
    if (cells.Mark(cell) && !beats) return;
    cells.values[cell] = v;
    cells.slots[cell] = static_cast<int32_t>(slot);
  });
}

template <typename T>
void PoolSegment(const Pool& s, const int32_t* key, const T* value, int32_t* pooled_key, T* pooled,
                 Cells<T>& cells) {
  RunningTopK<T> best(Select::kValue, s.capacity, pooled_key, pooled, s.room, cells.stage,
                      cells.digits);
  std::memset(cells.bitmap, 0, CeilDiv(s.slab_sites(), 64) * sizeof(uint64_t));
  for (int64_t row = 0; row < s.w.output_shape[0]; row += s.slab_rows) {
    if (s.average) {
      ForEntries(s, key, row, [&](int64_t slot, int64_t cell) {
        const float v = static_cast<float>(value[slot]);
        cells.values[cell] = cells.Mark(cell) ? cells.values[cell] + v : v;
      });
    } else {
      FindLargest(s, key, value, row, cells);
    }
    const int64_t base = row * s.w.output_row();
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
  for (int64_t row = 0; row < s.w.output_shape[0]; row += s.slab_rows) {
    std::memset(cells.bitmap, 0, CeilDiv(s.slab_sites(), 64) * sizeof(uint64_t));
    if (!s.average) FindLargest(s, key, value, row, cells);
    const int64_t base = row * s.w.output_row();
    const int64_t last = std::min(row + s.slab_rows, s.w.output_shape[0]) * s.w.output_row();
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
    ForEntries(s, key, row, [&](int64_t slot, int64_t cell) {
      if (cells.Marked(cell)) value_bar[slot] = T(cells.values[cell]);
    });
  }
}

// Calls body(segment, cells) for all segments; `cells` is the worker's part of the workspace.
template <typename T, typename F>
ffi::Error ForSegments(ffi::ThreadPool& pool, const Pool& s, ffi::Buffer<ffi::U8> workspace,
                       F&& body) {
  Carver sizes(nullptr);
  Cells<T>(sizes, s);
  ILAJAX_RETURN_IF_ERROR(CheckWorkspace("pool", workspace, s.workers * sizes.used()));
  ParallelFor(pool, s.segments(), s.workers, [&](int64_t segment, int64_t worker) {
    char* base = static_cast<char*>(workspace.untyped_data()) + worker * sizes.used();
    Carver carver(base);
    Cells<T> cells(carver, s);
    body(segment, cells);
  });
  return ffi::Error::Success();
}

ffi::Error PoolFwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Result<ffi::Buffer<ffi::S32>> pooled_keys,
                       ffi::Result<ffi::AnyBuffer> pooled,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, std::string_view mode,
                       Span input_shape, Span window_shape, Span strides, Span dilation, Span low,
                       Span output_shape, int64_t slab_rows, int64_t room, int64_t workers) {
  Pool s;
  s.slab_rows = slab_rows, s.room = room, s.workers = workers;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, s.w));
  ILAJAX_RETURN_IF_ERROR(Pool::Read(keys, values, *pooled_keys, *pooled, mode, s));
  if (s.capacity < 1) return InvalidArgument("pool: the capacity is ", s.capacity);
  return DispatchFloat(values.element_type(), [&]<typename T>() {
    return ForSegments<T>(pool, s, *workspace, [&](int64_t segment, Cells<T>& cells) {
      const int64_t key_segment = s.KeySegment(segment);
      const bool writes_keys = !s.shared || segment % s.channels == 0;
      PoolSegment(s, keys.typed_data() + key_segment * s.slots, Data<T>(values) + segment * s.slots,
                  writes_keys ? pooled_keys->typed_data() + key_segment * s.capacity : nullptr,
                  Data<T>(*pooled) + segment * s.capacity, cells);
    });
  });
}

ffi::Error PoolBwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> pooled_keys, ffi::AnyBuffer cotangent,
                       ffi::Result<ffi::AnyBuffer> values_bar,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, std::string_view mode,
                       Span input_shape, Span window_shape, Span strides, Span dilation, Span low,
                       Span output_shape, int64_t slab_rows, int64_t room, int64_t workers) {
  Pool s;
  s.slab_rows = slab_rows, s.room = room, s.workers = workers;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, s.w));
  ILAJAX_RETURN_IF_ERROR(Pool::Read(keys, values, pooled_keys, cotangent, mode, s));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("pool: values_bar", *values_bar, {s.batch, s.channels, s.slots}));
  if (values_bar->element_type() != values.element_type()) {
    return InvalidArgument("pool: values and values_bar have different dtypes");
  }
  return DispatchFloat(values.element_type(), [&]<typename T>() {
    return ForSegments<T>(pool, s, *workspace, [&](int64_t segment, Cells<T>& cells) {
      const int64_t key_segment = s.KeySegment(segment);
      UnpoolSegment(s, keys.typed_data() + key_segment * s.slots,
                    Data<T>(values) + segment * s.slots,
                    pooled_keys.typed_data() + key_segment * s.capacity,
                    Data<T>(cotangent) + segment * s.capacity,
                    Data<T>(*values_bar) + segment * s.slots, cells);
    });
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(PoolFwd, ilajax::PoolFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // pooled_keys
                                  .Ret<xla::ffi::AnyBuffer>()              // pooled
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<std::string_view>("mode")
                                  .Attr<ilajax::Span>("input_shape")
                                  .Attr<ilajax::Span>("window_shape")
                                  .Attr<ilajax::Span>("strides")
                                  .Attr<ilajax::Span>("dilation")
                                  .Attr<ilajax::Span>("low")
                                  .Attr<ilajax::Span>("output_shape")
                                  .Attr<int64_t>("slab_rows")
                                  .Attr<int64_t>("room")
                                  .Attr<int64_t>("workers"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(PoolBwd, ilajax::PoolBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // pooled_keys
                                  .Arg<xla::ffi::AnyBuffer>()              // cotangent of pooled
                                  .Ret<xla::ffi::AnyBuffer>()              // values_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<std::string_view>("mode")
                                  .Attr<ilajax::Span>("input_shape")
                                  .Attr<ilajax::Span>("window_shape")
                                  .Attr<ilajax::Span>("strides")
                                  .Attr<ilajax::Span>("dilation")
                                  .Attr<ilajax::Span>("low")
                                  .Attr<ilajax::Span>("output_shape")
                                  .Attr<int64_t>("slab_rows")
                                  .Attr<int64_t>("room")
                                  .Attr<int64_t>("workers"));
