// Direct sparse convolution with k-selection on the CPU, and its gradient.
//
// The grid is seen as lines along its last axis (common/lines.h). A sample's entries are sorted
// into their input lines, over all channels, slab by slab of rows of the leading axis. Then each
// output line gathers a handful of contiguous lists, one for each line of taps, in a buffer
// [site][channel of a block] that stays in the first-level cache; a bitmap, the shifted bitmaps of
// the input lines, says which sites to read, hand to the selection and clear. The grid itself is
// never allocated, cleared or scanned: work follows stored entries x live taps, plus a few
// operations a line, and a bit a site.
//
// Forward, a task for each (sample, block of output channels, part of the rows). With several parts
// each part selects for itself, and the lists are merged at the end.
//
// Backward, a task for each of a fixed number of runs of (sample, slab of input rows). Each output
// line within reach gets the cotangents of its kept outputs, and every stored input of the lists
// gathers from there what its own cotangent and the weights' need. Partial sums of the weights are
// added in the order of the tasks.
//
// Nothing depends on threads. A response's sum goes by line of taps, input channel, place, tap (in
// a narrow layer by tap last), whatever the slabs and parts; only where a slab holds an inf or NaN
// do its sums take the careful loops' order. Results are repeatable.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/conv_backward.h"
#include "xla_kernels/conv_forward.h"

namespace ilajax {
namespace {

ffi::Error ConvFwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::Buffer<ffi::S32>> out_keys,
                       ffi::Result<ffi::AnyBuffer> out_values,
                       ffi::Result<ffi::Buffer<ffi::S32>> responses,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, std::string_view select_name,
                       Span input_shape, Span window_shape, Span strides, Span dilation, Span low,
                       Span output_shape, int64_t channel_block, int64_t line_sites,
                       int64_t max_rows, int64_t dense_rows, int64_t room, int64_t stage,
                       int64_t parts, int64_t workers) {
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
  w = Squeeze(w);
  const Lines lines(w);
  const LineBuffer buffer(lines.line, line_sites, channel_block);
  if (line_sites < 1 || max_rows < 1 || room < 1 || parts < 1 || parts > lines.rows ||
      workers < 1 || stage / 2 <= buffer.piece || !IsBlock(channel_block)) {
    return InvalidArgument("conv: the plan does not fit the shapes");
  }
  const DenseLines dense_lines(lines.line, s.in_channels);
  if (dense_rows < 0 || dense_rows > max_rows ||
      (dense_rows > 0 &&
       (!buffer.plain || lines.InputLines(dense_rows) * dense_lines.size() > 4 * room))) {
    return InvalidArgument("conv: the plan's dense form does not fit the shapes");
  }
  const ForwardPlan plan = {channel_block, line_sites, max_rows, dense_rows,
                            room,          stage,      parts,    workers};
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    Carver carver(workspace->untyped_data());
    Filters filters = {plan.block, CeilDiv(s.out_channels, plan.block), s.in_channels, w.taps,
                       lines.line.taps};
    filters.Carve(carver);
    TapLines tap_lines = {filters.blocks, lines.tap_lines};
    tap_lines.Carve(carver);
    LiveTaps live_taps = {s.out_channels, lines.tap_lines, s.weights};
    if (dense_rows > 0) live_taps.Carve(carver);
    float* padded_bias = carver.Take<float>(filters.blocks * plan.block);
    PartSelections<T> selections = {
        parts, std::min(s.capacity, CeilDiv(lines.rows, parts) * (w.output_sites / lines.rows)),
        s.batch * s.out_channels};
    selections.Carve(carver);
    ForwardWorker<T> layout;
    layout.line = buffer;
    layout.entries = {lines.InputLines(plan.max_rows), CeilDiv(lines.line.input_length, 64), room};
    const WorkerSlices slices(carver, *workspace, workers,
                              [&](Carver& own) { layout.Carve(own, lines, plan); });
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, slices.end()));
    filters.Fill(w, s.weights, s.out_channels, kernel_keys.typed_data(), weights.typed_data());
    tap_lines.Fill(lines, filters);
    if (dense_rows > 0) {
      live_taps.Fill(lines, dense_lines, filters.tap_offsets, kernel_keys.typed_data(),
                     weights.typed_data(), s.in_channels, false);
    }
    std::fill_n(padded_bias, filters.blocks * plan.block, 0.0f);
    std::copy_n(bias.typed_data(), s.out_channels, padded_bias);
    if (parts > 1) std::fill_n(selections.digits, selections.segments * kDigits, 0);
    const Forward<T> forward = {s,
                                lines,
                                filters,
                                tap_lines,
                                dense_lines,
                                live_taps,
                                plan,
                                select,
                                w.output_sites,
                                keys.typed_data(),
                                Data<T>(values),
                                padded_bias,
                                out_keys->typed_data(),
                                Data<T>(*out_values),
                                responses->typed_data(),
                                selections};
    for (int64_t i = 0; i < workers; ++i) {
      const ForwardWorker<T> worker = slices.Take(i, layout, lines, plan);
      worker.line.Clear();
      std::fill_n(worker.read_bits, (lines.line.taps + 1) * worker.entries.words, 0);
    }
    ParallelFor(pool, s.batch * filters.blocks * parts, workers, [&](int64_t task, int64_t id) {
      ForwardWorker<T> worker = slices.Take(id, layout, lines, plan);
      const int64_t rest = task / parts;
      DispatchLoops(plan.block, [&]<typename Loops, int kOctets>() {
        forward.template Run<Loops, kOctets>(rest / filters.blocks, rest % filters.blocks,
                                             task % parts, worker);
      });
    });
    if (parts == 1) return ffi::Error::Success();
    ParallelFor(pool, s.batch * s.out_channels, workers, [&](int64_t segment, int64_t) {
      responses->typed_data()[segment] =
          selections.Merge(segment, select, s.capacity, w.output_sites,
                           out_keys->typed_data() + segment * s.capacity,
                           Data<T>(*out_values) + segment * s.capacity);
    });
    return ffi::Error::Success();
  });
}

ffi::Error ConvBwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::S32> out_keys, ffi::AnyBuffer cotangent,
                       ffi::Result<ffi::AnyBuffer> values_bar,
                       ffi::Result<ffi::Buffer<ffi::F32>> weights_bar,
                       ffi::Result<ffi::Buffer<ffi::F32>> bias_bar,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, Span input_shape,
                       Span window_shape, Span strides, Span dilation, Span low, Span output_shape,
                       int64_t channel_block, int64_t line_sites, int64_t slab_rows,
                       int64_t dense_rows, int64_t room, int64_t parts, int64_t workers) {
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
  w = Squeeze(w);
  const Lines lines(w);
  if (line_sites < 1 || slab_rows < 1 || room < 1 || parts < 1 || workers < 1 ||
      !IsBlock(channel_block)) {
    return InvalidArgument("conv: the plan does not fit the shapes");
  }
  const LineBuffer buffer(lines.line, line_sites, channel_block);
  if (dense_rows < 0 || (dense_rows > 0 && (HasStrides(w) || !buffer.plain))) {
    return InvalidArgument("conv: the plan's dense form does not fit the shapes");
  }
  const Lines transposed(Transposed(w));
  const BackwardPlan plan = {channel_block, line_sites, slab_rows, dense_rows,
                             room,          parts,      workers};

  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    Carver carver(workspace->untyped_data());
    Filters filters = {plan.block, CeilDiv(s.out_channels, plan.block), s.in_channels, w.taps,
                       lines.line.taps};
    filters.Carve(carver);
    TapLines tap_lines = {filters.blocks, lines.tap_lines};
    tap_lines.Carve(carver);
    DenseGradient dense = {transposed,
                           DenseLines(transposed.line, s.out_channels),
                           {s.in_channels, lines.tap_lines, s.weights}};
    if (dense_rows > 0) dense.taps.Carve(carver);
    float* part_sums = carver.Take<float>(groups * parts * s.weights);
    BackwardWorker layout;
    layout.line = buffer;
    layout.entries = {std::min(slab_rows, lines.input_rows) * lines.input_row_lines, 0, room};
    const WorkerSlices slices(carver, *workspace, workers,
                              [&](Carver& own) { layout.Carve(own, lines, filters, plan, dense); });
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, slices.end()));
    filters.Fill(w, s.weights, s.out_channels, kernel_keys.typed_data(), weights.typed_data());
    tap_lines.Fill(lines, filters);
    if (dense_rows > 0) {
      dense.taps.Fill(transposed, dense.layout, filters.tap_offsets, kernel_keys.typed_data(),
                      weights.typed_data(), s.in_channels, true);
    }
    std::memset(values_bar->untyped_data(), 0, values_bar->size_bytes());
    const Backward<T> backward = {s,
                                  lines,
                                  filters,
                                  tap_lines,
                                  dense,
                                  plan,
                                  keys.typed_data(),
                                  Data<T>(values),
                                  out_keys.typed_data(),
                                  Data<T>(cotangent),
                                  Data<T>(*values_bar)};
    for (int64_t i = 0; i < workers; ++i) {
      const BackwardWorker worker = slices.Take(i, layout, lines, filters, plan, dense);
      worker.line.Clear();
      if (dense_rows > 0) std::fill_n(worker.own, dense.layout.vectors * kLanes, 0.0f);
    }
    const int64_t slabs = CeilDiv(lines.input_rows, slab_rows);
    const int64_t units = s.batch / groups * slabs;
    ParallelFor(pool, groups * parts, workers, [&](int64_t task, int64_t id) {
      BackwardWorker worker = slices.Take(id, layout, lines, filters, plan, dense);
      std::memset(worker.weights_bar, 0, filters.size() * sizeof(float));
      const int64_t live = dense_rows > 0 ? dense.taps.count(0, s.in_channels) : 0;
      std::fill_n(worker.products, live * kLanes, 0.0f);
      const int64_t group = task / parts, part = task % parts;
      for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
        const int64_t item = group * (s.batch / groups) + unit / slabs;
        const int64_t row = unit % slabs * slab_rows;
        DispatchLoops(plan.block, [&]<typename Loops, int kOctets>() {
          backward.template Run<Loops, kOctets>(
              item, row, std::min(row + slab_rows, lines.input_rows), worker);
        });
      }
      filters.Gather(kernel_keys.typed_data(), s.weights, s.out_channels, worker.weights_bar,
                     part_sums + task * s.weights);
      for (int64_t i = 0; i < live; ++i) {
        const float* lanes = worker.products + i * kLanes;
        part_sums[task * s.weights + dense.taps.taps[i].number] +=
            std::accumulate(lanes, lanes + kLanes, 0.0f);
      }
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
                                  .Attr<int64_t>("line_sites")
                                  .Attr<int64_t>("max_rows")
                                  .Attr<int64_t>("dense_rows")
                                  .Attr<int64_t>("room")
                                  .Attr<int64_t>("stage")
                                  .Attr<int64_t>("parts")
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
                                  .Attr<int64_t>("line_sites")
                                  .Attr<int64_t>("slab_rows")
                                  .Attr<int64_t>("dense_rows")
                                  .Attr<int64_t>("room")
                                  .Attr<int64_t>("parts")
                                  .Attr<int64_t>("workers"));
