// Direct sparse convolution with k-selection on the CPU, and its gradient.
//
// Forward, a task for each (sample, block of output channels). The grid is walked in slabs of rows
// of the leading axis. A slab's entries lie together in every input channel and are found by
// bisection; each is multiplied with the live taps of its channel and added to rows [site][channel
// of the block] of a buffer that stays in the cache. A bitmap marks the sites reached, so that only
// those are read, pushed into the running selection of their channel in the order of their keys,
// and set back to zero. The grid itself is never allocated, cleared or scanned: work follows stored
// entries x live taps, plus a bit a site.
//
// Backward, a task for each of a fixed number of runs of (sample, slab of input rows). The
// cotangents of kept outputs within reach are spread into such a buffer; then every stored input
// gathers from it what its own cotangent and the weights' need. Partial sums of the weights are
// added in the order of the tasks.
//
// A sum's order does not depend on threads or slabs: input channel, key, tap. Results are
// repeatable.

#include "xla_kernels/conv.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/filters.h"
#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {
namespace {

// A slab of rows [site][channel of the block] with a bitmap of the sites in use.
struct Slab {
  int64_t sites = 0, block = 0;
  float* rows = nullptr;
  uint64_t* bitmap = nullptr;

  void Carve(Carver& carver) {
    rows = carver.Take<float>(sites * block);
    bitmap = carver.Take<uint64_t>(CeilDiv(sites, 64));
  }
  void Clear() {
    std::memset(rows, 0, sites * block * sizeof(float));
    std::memset(bitmap, 0, CeilDiv(sites, 64) * sizeof(uint64_t));
  }
  void Mark(int64_t site) { bitmap[site >> 6] |= uint64_t{1} << (site & 63); }
  bool Marked(int64_t site) const { return bitmap[site >> 6] >> (site & 63) & 1; }

  // Calls f(site, row) for each marked site in ascending order, and clears row and mark.
  template <typename F>
  void Drain(F&& f) {
    for (int64_t word = 0; word < CeilDiv(sites, 64); ++word) {
      for (uint64_t bits = bitmap[word]; bits != 0; bits &= bits - 1) {
        const int64_t site = word * 64 + __builtin_ctzll(bits);
        float* row = rows + site * block;
        f(site, row);
        std::memset(row, 0, block * sizeof(float));
      }
      bitmap[word] = 0;
    }
  }
};

// The part of a segment whose keys lie in [begin, end): of broken keys some part, inside the
// segment.
struct Range {
  int64_t first, last;
  Range(const int32_t* keys, int64_t slots, int64_t begin, int64_t end) {
    first = std::lower_bound(keys, keys + slots, begin) - keys;
    last = std::lower_bound(keys + first, keys + slots, end) - keys;
  }
};

struct ForwardPlan {
  int64_t block, slab_rows, overflow, workers;
};

template <typename T>
struct ForwardWorker {
  Slab slab;
  int32_t* overflow_keys = nullptr;
  T* overflow_values = nullptr;
  RunningTopK<T>* best = nullptr;

  void Carve(Carver& carver, const ForwardPlan& plan) {
    slab.Carve(carver);
    overflow_keys = carver.Take<int32_t>(plan.block * plan.overflow);
    overflow_values = carver.Take<T>(plan.block * plan.overflow);
    best = carver.Take<RunningTopK<T>>(plan.block);
  }
};

template <typename T>
struct Forward {
  const ConvShape& s;
  const Window& w;
  const Filters& filters;
  const ForwardPlan& plan;
  Select select;
  const int32_t* keys;
  const T* values;
  const float* bias;
  int32_t* out_keys;
  T* out_values;
  int32_t* responses;

  template <int kBlock>
  void Run(int64_t item, int64_t block, ForwardWorker<T>& worker) const {
    const int64_t first = block * plan.block;
    const int64_t channels = std::min(plan.block, s.out_channels - first);
    int32_t* candidates = responses + item * s.out_channels + first;
    for (int64_t j = 0; j < channels; ++j) {
      const int64_t segment = item * s.out_channels + first + j;
      worker.best[j] = RunningTopK<T>(select, s.capacity, out_keys + segment * s.capacity,
                                      out_values + segment * s.capacity, plan.overflow,
                                      worker.overflow_keys + j * plan.overflow,
                                      worker.overflow_values + j * plan.overflow);
      candidates[j] = 0;
    }
    const bool finite = filters.finite &&
                        AllFinite(values + item * s.in_channels * s.slots, s.in_channels * s.slots);
    for (int64_t row = 0; row < w.output_shape[0]; row += plan.slab_rows) {
      const int64_t end = std::min(row + plan.slab_rows, w.output_shape[0]);
      if (!Accumulate<kBlock>(item, block, row, end, finite, worker.slab)) continue;
      const int64_t base = row * w.output_row();
      worker.slab.Drain([&](int64_t site, const float* response) {
        for (int64_t j = 0; j < channels; ++j) {
          if (response[j] == 0.0f) continue;
          const T value(response[j] + bias[first + j]);
          if (!IsCandidate(static_cast<float>(value), select)) continue;
          ++candidates[j];
          worker.best[j].Push(base + site, value);
        }
      });
    }
    for (int64_t j = 0; j < channels; ++j) worker.best[j].Finish(w.output_sites);
  }

  // Adds up the responses of output rows [begin, end). Returns whether any entry is within reach.
  template <int kBlock>
  bool Accumulate(int64_t item, int64_t block, int64_t begin, int64_t end, bool finite,
                  Slab& slab) const {
    const int64_t low = begin * w.strides[0] - w.low[0];
    const int64_t high = (end - 1) * w.strides[0] - w.low[0] + w.extent();
    const int64_t first = std::clamp<int64_t>(low, 0, w.input_shape[0]) * w.input_row();
    const int64_t last = std::clamp<int64_t>(high, 0, w.input_shape[0]) * w.input_row();
    TapWalk walk(w, begin, end);
    bool any = false;
    for (int64_t ic = 0; ic < s.in_channels; ++ic) {
      const int32_t* key = keys + s.KeyOffset(item, ic);
      const T* value = values + (item * s.in_channels + ic) * s.slots;
      const float* rows = filters.rows + filters.Row(block, ic, 0) * plan.block;
      const uint8_t* live = filters.live + filters.Row(block, ic, 0);
      const Range range(key, s.slots, first, last);
      for (int64_t i = range.first; i < range.last; ++i) {
        if (key[i] < first || key[i] >= last) continue;
        const float x = static_cast<float>(value[i]);
        if (x == 0.0f) continue;
        any = true;
        walk.Seek(key[i]);
        for (int64_t tap = 0; tap < w.taps; ++tap) {
          if (!live[tap]) continue;
          const int64_t site = walk.Reach(filters.tap_offsets + tap * TapWalk::kTapOffsets);
          if (site < 0) continue;
          slab.Mark(site);
          AddProducts<kBlock>(slab.rows + site * plan.block, rows + tap * plan.block, x, plan.block,
                              finite);
        }
      }
    }
    return any;
  }
};

ffi::Error ConvFwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::Buffer<ffi::S32>> out_keys,
                       ffi::Result<ffi::AnyBuffer> out_values,
                       ffi::Result<ffi::Buffer<ffi::S32>> responses,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, std::string_view select_name,
                       Span input_shape, Span window_shape, Span strides, Span dilation, Span low,
                       Span output_shape, int64_t channel_block, int64_t slab_rows,
                       int64_t overflow, int64_t workers) {
  Window w;
  ConvShape s;
  Select select;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(ConvShape::Read(keys, values, kernel_keys, weights, *out_keys, w, s));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: bias", bias, {s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: out_values", *out_values, {s.batch, s.out_channels, s.capacity}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: responses", *responses, {s.batch, s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(ReadSelect(select_name, select));
  if (out_values->element_type() != values.element_type()) {
    return InvalidArgument("conv: values and out_values have different dtypes");
  }
  if (channel_block < 1 || slab_rows < 1 || overflow < 1 || workers < 1) {
    return InvalidArgument("conv: the plan has an entry below 1");
  }
  const ForwardPlan plan = {channel_block, slab_rows, overflow, workers};
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    Carver carver(workspace->untyped_data());
    Filters filters = {plan.block, CeilDiv(s.out_channels, plan.block), s.in_channels, w.taps};
    filters.Carve(carver);
    ForwardWorker<T> layout;
    layout.slab = {std::min(plan.slab_rows, w.output_shape[0]) * w.output_row(), plan.block};
    const int64_t begin = carver.used();
    layout.Carve(carver, plan);
    const int64_t bytes = carver.used() - begin;
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, begin + workers * bytes));
    filters.Fill(w, s.weights, s.out_channels, kernel_keys.typed_data(), weights.typed_data());
    const Forward<T> forward = {s,
                                w,
                                filters,
                                plan,
                                select,
                                keys.typed_data(),
                                Data<T>(values),
                                bias.typed_data(),
                                out_keys->typed_data(),
                                Data<T>(*out_values),
                                responses->typed_data()};
    char* base = static_cast<char*>(workspace->untyped_data()) + begin;
    for (int64_t i = 0; i < workers; ++i) {
      ForwardWorker<T> worker = layout;
      Carver own(base + i * bytes);
      worker.Carve(own, plan);
      worker.slab.Clear();
    }
    ParallelFor(pool, s.batch * filters.blocks, workers, [&](int64_t task, int64_t id) {
      ForwardWorker<T> worker = layout;
      Carver own(base + id * bytes);
      worker.Carve(own, plan);
      DispatchBlock(plan.block, [&]<int kBlock>() {
        forward.template Run<kBlock>(task / filters.blocks, task % filters.blocks, worker);
      });
    });
    return ffi::Error::Success();
  });
}

struct BackwardPlan {
  int64_t block, slab_rows, parts, workers;
};

struct BackwardWorker {
  Slab slab;
  float* weights_bar = nullptr;  // as Filters::rows
  float* values_bar = nullptr;   // [ic][entry of the slab], added up over the blocks
  int64_t entries = 0;           // its room; only broken keys have more entries in a slab

  void Carve(Carver& carver, const Filters& filters) {
    slab.Carve(carver);
    weights_bar = carver.Take<float>(filters.size());
    values_bar = carver.Take<float>(entries);
  }
};

template <typename T>
struct Backward {
  const ConvShape& s;
  const Window& w;
  const Filters& filters;
  const BackwardPlan& plan;
  const int32_t* keys;
  const T* values;
  const int32_t* out_keys;
  const T* cotangent;
  T* values_bar;

  // Input rows [begin, end) of a sample.
  template <int kBlock>
  void Run(int64_t item, int64_t begin, int64_t end, BackwardWorker& worker) const {
    // The output rows within reach.
    const int64_t stride = w.strides[0];
    const int64_t lowest = begin + w.low[0] - w.extent() + 1, highest = end - 1 + w.low[0];
    const int64_t row_begin =
        std::clamp<int64_t>(lowest <= 0 ? 0 : CeilDiv(lowest, stride), 0, w.output_shape[0]);
    const int64_t row_end =
        std::clamp<int64_t>(highest < 0 ? 0 : highest / stride + 1, row_begin, w.output_shape[0]);
    const bool finite =
        filters.finite &&
        AllFinite(values + item * s.in_channels * s.slots, s.in_channels * s.slots) &&
        AllFinite(cotangent + item * s.out_channels * s.capacity, s.out_channels * s.capacity);
    const int64_t first = begin * w.input_row(), last = end * w.input_row();
    for (int64_t block = 0; block < filters.blocks; ++block) {
      Spread(item, block, row_begin, row_end, worker.slab);
      TapWalk walk(w, row_begin, row_end);
      int64_t entry = 0;
      for (int64_t ic = 0; ic < s.in_channels; ++ic) {
        const int32_t* key = keys + s.KeyOffset(item, ic);
        const T* value = values + (item * s.in_channels + ic) * s.slots;
        T* value_bar = values_bar + (item * s.in_channels + ic) * s.slots;
        const int64_t row = filters.Row(block, ic, 0);
        const Range range(key, s.slots, first, last);
        for (int64_t i = range.first; i < range.last; ++i) {
          if (key[i] < first || key[i] >= last) continue;
          if (filters.blocks > 1 && entry == worker.entries) break;
          const float x = static_cast<float>(value[i]);
          float sum = block == 0 ? 0.0f : worker.values_bar[entry];
          walk.Seek(key[i]);
          for (int64_t tap = 0; tap < w.taps; ++tap) {
            if (!filters.live[row + tap]) continue;
            const int64_t site = walk.Reach(filters.tap_offsets + tap * TapWalk::kTapOffsets);
            if (site < 0 || !worker.slab.Marked(site)) continue;
            const float* g = worker.slab.rows + site * plan.block;
            sum += Dot<kBlock>(g, filters.rows + (row + tap) * plan.block, plan.block, finite);
            AddProducts<kBlock>(worker.weights_bar + (row + tap) * plan.block, g, x, plan.block,
                                finite);
          }
          if (filters.blocks > 1) worker.values_bar[entry++] = sum;
          if (block == filters.blocks - 1) value_bar[i] = T(sum);
        }
      }
      worker.slab.Drain([](int64_t, const float*) {});
    }
  }

  // Spreads the cotangents of kept outputs in rows [begin, end) into the slab.
  void Spread(int64_t item, int64_t block, int64_t begin, int64_t end, Slab& slab) const {
    const int64_t first = begin * w.output_row(), last = end * w.output_row();
    for (int64_t j = 0; j < std::min(plan.block, s.out_channels - block * plan.block); ++j) {
      const int64_t segment = (item * s.out_channels + block * plan.block + j) * s.capacity;
      const int32_t* key = out_keys + segment;
      const Range range(key, s.capacity, first, last);
      for (int64_t i = range.first; i < range.last; ++i) {
        if (key[i] < first || key[i] >= last) continue;
        const float g = static_cast<float>(cotangent[segment + i]);
        if (g == 0.0f) continue;
        slab.rows[(key[i] - first) * plan.block + j] = g;
        slab.Mark(key[i] - first);
      }
    }
  }
};

ffi::Error ConvBwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::S32> out_keys, ffi::AnyBuffer cotangent,
                       ffi::Result<ffi::AnyBuffer> values_bar,
                       ffi::Result<ffi::Buffer<ffi::F32>> weights_bar,
                       ffi::Result<ffi::Buffer<ffi::F32>> bias_bar,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, Span input_shape,
                       Span window_shape, Span strides, Span dilation, Span low, Span output_shape,
                       int64_t channel_block, int64_t slab_rows, int64_t parts, int64_t workers) {
  Window w;
  ConvShape s;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(ConvShape::Read(keys, values, kernel_keys, weights, out_keys, w, s));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: cotangent", cotangent, {s.batch, s.out_channels, s.capacity}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: values_bar", *values_bar, {s.batch, s.in_channels, s.slots}));
  if (cotangent.element_type() != values.element_type() ||
      values_bar->element_type() != values.element_type()) {
    return InvalidArgument("conv: values, cotangent and values_bar have different dtypes");
  }
  const int64_t groups = weights_bar->dimensions().size() == 2 ? weights_bar->dimensions()[0] : 0;
  if (groups < 1 || s.batch % groups != 0) {
    return InvalidArgument("conv: a batch of ", s.batch, " does not hold ", groups, " groups");
  }
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: weights_bar", *weights_bar, {groups, s.weights}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: bias_bar", *bias_bar, {groups, s.out_channels}));
  if (channel_block < 1 || slab_rows < 1 || parts < 1 || workers < 1) {
    return InvalidArgument("conv: the plan has an entry below 1");
  }
  const BackwardPlan plan = {channel_block, slab_rows, parts, workers};

  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    Carver carver(workspace->untyped_data());
    Filters filters = {plan.block, CeilDiv(s.out_channels, plan.block), s.in_channels, w.taps};
    filters.Carve(carver);
    float* part_sums = carver.Take<float>(groups * parts * s.weights);
    BackwardWorker layout;
    const int64_t reach =
        (std::min(slab_rows, w.input_shape[0]) + w.extent() - 2) / w.strides[0] + 1;
    layout.slab = {std::min(reach, w.output_shape[0]) * w.output_row(), plan.block};
    const int64_t slab_sites = std::min(slab_rows, w.input_shape[0]) * w.input_row();
    layout.entries = filters.blocks == 1 ? 0 : s.in_channels * std::min(s.slots, slab_sites);
    const int64_t begin = carver.used();
    layout.Carve(carver, filters);
    const int64_t bytes = carver.used() - begin;
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, begin + workers * bytes));
    filters.Fill(w, s.weights, s.out_channels, kernel_keys.typed_data(), weights.typed_data());
    std::memset(values_bar->untyped_data(), 0, values_bar->size_bytes());
    const Backward<T> backward = {s,
                                  w,
                                  filters,
                                  plan,
                                  keys.typed_data(),
                                  Data<T>(values),
                                  out_keys.typed_data(),
                                  Data<T>(cotangent),
                                  Data<T>(*values_bar)};
    char* base = static_cast<char*>(workspace->untyped_data()) + begin;
    for (int64_t i = 0; i < workers; ++i) {
      BackwardWorker worker = layout;
      Carver own(base + i * bytes);
      worker.Carve(own, filters);
      worker.slab.Clear();
    }
    const int64_t slabs = CeilDiv(w.input_shape[0], slab_rows);
    const int64_t units = s.batch / groups * slabs;
    ParallelFor(pool, groups * parts, workers, [&](int64_t task, int64_t id) {
      BackwardWorker worker = layout;
      Carver own(base + id * bytes);
      worker.Carve(own, filters);
      std::memset(worker.weights_bar, 0, filters.size() * sizeof(float));
      const int64_t group = task / parts, part = task % parts;
      for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
        const int64_t item = group * (s.batch / groups) + unit / slabs;
        const int64_t row = unit % slabs * slab_rows;
        DispatchBlock(plan.block, [&]<int kBlock>() {
          backward.template Run<kBlock>(item, row, std::min(row + slab_rows, w.input_shape[0]),
                                        worker);
        });
      }
      filters.Gather(kernel_keys.typed_data(), s.weights, s.out_channels, worker.weights_bar,
                     part_sums + task * s.weights);
    });
    AddParts(part_sums, groups, parts, s.weights, weights_bar->typed_data());
    const KeptCotangents<T> kept = {s.batch / groups, s.out_channels,        s.capacity,
                                    w.output_sites,   out_keys.typed_data(), Data<T>(cotangent)};
    ParallelFor(pool, groups * s.out_channels, workers, [&](int64_t task, int64_t) {
      bias_bar->typed_data()[task] = kept.Sum(task / s.out_channels, task % s.out_channels);
    });
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(ConvFwd, ilajax::ConvFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kernel_keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // bias
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // out_keys
                                  .Ret<xla::ffi::AnyBuffer>()              // out_values
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // responses
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<std::string_view>("select")
                                  .Attr<ilajax::Span>("input_shape")
                                  .Attr<ilajax::Span>("window_shape")
                                  .Attr<ilajax::Span>("strides")
                                  .Attr<ilajax::Span>("dilation")
                                  .Attr<ilajax::Span>("low")
                                  .Attr<ilajax::Span>("output_shape")
                                  .Attr<int64_t>("channel_block")
                                  .Attr<int64_t>("slab_rows")
                                  .Attr<int64_t>("overflow")
                                  .Attr<int64_t>("workers"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ConvBwd, ilajax::ConvBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kernel_keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // out_keys
                                  .Arg<xla::ffi::AnyBuffer>()  // cotangent of out_values
                                  .Ret<xla::ffi::AnyBuffer>()  // values_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // weights_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // bias_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<ilajax::Span>("input_shape")
                                  .Attr<ilajax::Span>("window_shape")
                                  .Attr<ilajax::Span>("strides")
                                  .Attr<ilajax::Span>("dilation")
                                  .Attr<ilajax::Span>("low")
                                  .Attr<ilajax::Span>("output_shape")
                                  .Attr<int64_t>("channel_block")
                                  .Attr<int64_t>("slab_rows")
                                  .Attr<int64_t>("parts")
                                  .Attr<int64_t>("workers"));
