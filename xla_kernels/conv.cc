// Direct sparse convolution with k-selection on the CPU, and its gradient.
//
// The grid is seen as lines along its last axis (common/lines.h), and a convolution goes from
// output line to output line, each of which reads a handful of input lines, one for each line of
// taps. Its sums stand in a buffer [site][channel of a block] in the first-level cache. The grid
// itself is never allocated, cleared or scanned. An input line comes in one of three forms, chosen
// by what it holds:
//
//   entries   of all channels, sorted into the line. Each adds its weights to the sites it reaches;
//             work follows stored entries x live taps.
//   rows      of all channels, for each site in use, where most of them are stored there. A site's
//             channels are summed in registers (common/lines.h, conv_sort.inc).
//   dense     site by site, where filters are pruned or the grid is nearly full. One live weight at
//             a time is added along the line; work follows lines x live weights (conv_dense.h).
//
// A bitmap, the shifted bitmaps of the input lines, says which sites of a line to read, hand to the
// selection and clear.
//
// Forward (conv_sums.h, conv_forward.h), a task for each (sample, block of output channels, part of
// the rows). With several parts each part selects for itself, and the lists are merged at the end.
//
// Backward (conv_backward.h), a task for each of a fixed number of runs of (sample, slab of input
// rows). Each output line within reach gets the cotangents of its kept outputs, and every stored
// input of the lists gathers from there what its own cotangent and the weights' need; or the same
// in the dense form of the transposed convolution. Partial sums of the weights are added in the
// order of the tasks.
//
// Nothing depends on threads. A response's sum goes by line of taps, and within it as the form of
// the input line has it; forward, the form depends on the sample alone, and backward on the slab. A
// slab that holds an inf or NaN takes the careful loops. Results are repeatable.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/conv_backward.h"
#include "xla_kernels/conv_forward.h"
#include "xla_kernels/conv_gradient.h"

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
                       int64_t max_rows, int64_t dense_rows, int64_t dense_percent, int64_t room,
                       int64_t stage, int64_t parts, int64_t workers) {
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
  if (s.capacity < 1) return InvalidArgument("conv: the capacity is ", s.capacity);
  ILAJAX_RETURN_IF_ERROR(ReadSelect(select_name, select));
  if (out_values->element_type() != values.element_type()) {
    return InvalidArgument("conv: values and out_values have different dtypes");
  }
  w = Squeeze(w);
  const Lines lines(w);
  const ForwardPlan plan = {{channel_block, line_sites, max_rows, dense_rows, dense_percent, room},
                            stage,
                            parts,
                            workers};
  const LineBuffer buffer(lines.line, line_sites, channel_block);
  if (!IsBlock(channel_block) || !Fits(plan.sums, lines, s.in_channels, buffer) || parts < 1 ||
      parts > lines.rows || workers < 1 || stage / 2 <= buffer.piece) {
    return InvalidArgument("conv: the plan does not fit the shapes");
  }
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    Carver carver(workspace->untyped_data());
    SumsTables tables(s, w, lines, plan.sums);
    tables.Carve(carver);
    const int64_t blocks = tables.filters.blocks;
    float* padded_bias = carver.Take<float>(blocks * channel_block);
    PartSelections<T> selections = {
        parts, std::min(s.capacity, CeilDiv(lines.rows, parts) * (w.output_sites / lines.rows)),
        s.batch * s.out_channels};
    selections.Carve(carver);
    ForwardWorker<T> layout;
    layout.sums = SumsWorker(lines, plan.sums, buffer);
    const WorkerSlices slices(carver, *workspace, workers,
                              [&](Carver& own) { layout.Carve(own, lines, plan); });
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, slices.end()));
    tables.Fill(s, w, lines, kernel_keys.typed_data(), weights.typed_data());
    std::fill_n(padded_bias, blocks * channel_block, 0.0f);
    std::copy_n(bias.typed_data(), s.out_channels, padded_bias);
    if (parts > 1) std::fill_n(selections.digits, selections.segments * kDigits, 0);
    const StoredInput<T> input = {s, keys.typed_data(), Data<T>(values)};
    const LineSums<T> sums = {input, lines, tables, plan.sums};
    const Forward<T> forward = {sums,
                                plan,
                                select,
                                w.output_sites,
                                padded_bias,
                                out_keys->typed_data(),
                                Data<T>(*out_values),
                                responses->typed_data(),
                                selections};
    for (int64_t i = 0; i < workers; ++i) slices.Take(i, layout, lines, plan).sums.Clear(lines);
    ParallelFor(pool, s.batch * blocks * parts, workers, [&](int64_t task, int64_t id) {
      ForwardWorker<T> worker = slices.Take(id, layout, lines, plan);
      const int64_t rest = task / parts;
      DispatchLoops(channel_block, [&]<typename Loops, int kOctets>() {
        forward.template Run<Loops, kOctets>(rest / blocks, rest % blocks, task % parts, worker);
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
                       int64_t dense_rows, int64_t dense_percent, int64_t room, int64_t parts,
                       int64_t workers) {
  Window w;
  ConvShape s;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(ConvShape::Read(keys, values, kernel_keys, weights, out_keys, w, s));
  return ConvGradient(
      "conv", pool, s, w, false,
      {channel_block, line_sites, slab_rows, dense_rows, dense_percent, room, parts, workers},
      {keys, values, kernel_keys, weights, out_keys, cotangent, values_bar, weights_bar, bias_bar,
       workspace});
}

}  // namespace

ffi::Error ConvGradient(std::string_view op, ffi::ThreadPool& pool, const ConvShape& s,
                        Window window, bool out_shared, const GradientPlan& plan,
                        GradientBuffers b) {
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("cotangent", b.cotangent, {s.batch, s.out_channels, s.capacity}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("values_bar", *b.values_bar, {s.batch, s.in_channels, s.slots}));
  const auto dtype = b.values.element_type();
  if (b.cotangent.element_type() != dtype || b.values_bar->element_type() != dtype) {
    return InvalidArgument(op, ": values, cotangent and values_bar have different dtypes");
  }
  const auto sums = b.weights_bar->dimensions();
  const int64_t groups = sums.size() == 2 ? sums[0] : 0;
  if (groups < 1 || s.batch % groups != 0) {
    return InvalidArgument(op, ": a batch of ", s.batch, " does not hold ", groups, " groups");
  }
  ILAJAX_RETURN_IF_ERROR(CheckShape("weights_bar", *b.weights_bar, {groups, s.weights}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("bias_bar", *b.bias_bar, {groups, s.out_channels}));
  const Window w = Squeeze(window);
  const Lines lines(w), transposed(Transposed(w));
  const LineBuffer buffer(lines.line, plan.line_sites, plan.block);
  if (!IsBlock(plan.block) || plan.line_sites < 1 || plan.slab_rows < 1 || plan.room < 1 ||
      plan.parts < 1 || plan.workers < 1 || plan.dense_rows < 0 ||
      (plan.dense_rows > 0 && (HasStrides(w) || !buffer.plain))) {
    return InvalidArgument(op, ": the plan does not fit the shapes");
  }

  return DispatchFloat(dtype, [&]<typename T>() -> ffi::Error {
    Carver carver(b.workspace->untyped_data());
    Filters filters = {plan.block, CeilDiv(s.out_channels, plan.block), s.in_channels, w.taps,
                       lines.line.taps};
    filters.Carve(carver);
    TapLines tap_lines = {filters.blocks, lines.tap_lines};
    tap_lines.Carve(carver);
    const bool has_dense = plan.dense_rows > 0;
    DenseGradient dense = {transposed,
                           DenseLines(transposed.line, s.out_channels),
                           {s.in_channels, lines.tap_lines, s.weights}};
    if (has_dense) dense.taps.Carve(carver);
    float* part_sums = carver.Take<float>(groups * plan.parts * s.weights);
    BackwardWorker layout;
    layout.line = buffer;
    const int64_t slab_lines = std::min(plan.slab_rows, lines.input_rows) * lines.input_row_lines;
    layout.entries = {slab_lines,
                      buffer.plain ? LineEntries::Words(slab_lines, lines.line.input_length) : 0,
                      plan.room, true};
    const WorkerSlices slices(carver, *b.workspace, plan.workers,
                              [&](Carver& own) { layout.Carve(own, lines, filters, plan, dense); });
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace(op, *b.workspace, slices.end()));
    const int32_t* kernel_keys = b.kernel_keys.typed_data();
    filters.Fill(w, s.weights, s.out_channels, kernel_keys, b.weights.typed_data());
    tap_lines.Fill(lines, filters);
    if (has_dense) {
      dense.taps.Fill(transposed, dense.layout, filters.tap_offsets, kernel_keys,
                      b.weights.typed_data(), s.in_channels, true);
    }
    const int64_t live = has_dense ? dense.taps.count(0, s.in_channels) : 0;
    std::memset(b.values_bar->untyped_data(), 0, b.values_bar->size_bytes());
    const StoredInput<T> input = {s, b.keys.typed_data(), Data<T>(b.values)};
    const Backward<T> backward = {input,
                                  lines,
                                  filters,
                                  tap_lines,
                                  dense,
                                  plan,
                                  b.out_keys.typed_data(),
                                  out_shared,
                                  Data<T>(b.cotangent),
                                  Data<T>(*b.values_bar)};
    for (int64_t i = 0; i < plan.workers; ++i) {
      const BackwardWorker worker = slices.Take(i, layout, lines, filters, plan, dense);
      worker.line.Clear();
      if (has_dense) std::fill_n(worker.own, dense.layout.vectors * kLanes, 0.0f);
    }
    const int64_t slabs = CeilDiv(lines.input_rows, plan.slab_rows);
    const int64_t units = s.batch / groups * slabs;
    ParallelFor(pool, groups * plan.parts, plan.workers, [&](int64_t task, int64_t id) {
      BackwardWorker worker = slices.Take(id, layout, lines, filters, plan, dense);
      std::memset(worker.weights_bar, 0, filters.size() * sizeof(float));
      std::fill_n(worker.products, live * kLanes, 0.0f);
      const int64_t group = task / plan.parts, part = task % plan.parts;
      for (int64_t unit = part * units / plan.parts; unit < (part + 1) * units / plan.parts;
           ++unit) {
        const int64_t item = group * (s.batch / groups) + unit / slabs;
        const int64_t row = unit % slabs * plan.slab_rows;
        DispatchLoops(plan.block, [&]<typename Loops, int kOctets>() {
          backward.template Run<Loops, kOctets>(
              item, row, std::min(row + plan.slab_rows, lines.input_rows), worker);
        });
      }
      float* part_sum = part_sums + task * s.weights;
      filters.Gather(kernel_keys, s.weights, s.out_channels, worker.weights_bar, part_sum);
      for (int64_t i = 0; i < live; ++i) {
        const float* lanes = worker.products + i * kLanes;
        part_sum[dense.taps.taps[i].number] += std::accumulate(lanes, lanes + kLanes, 0.0f);
      }
    });
    AddParts(part_sums, groups, plan.parts, s.weights, b.weights_bar->typed_data());
    const KeptCotangents<T> kept = {s.batch / groups, s.out_channels,          s.capacity,
                                    w.output_sites,   b.out_keys.typed_data(), Data<T>(b.cotangent),
                                    out_shared};
    ParallelFor(pool, groups * s.out_channels, plan.workers, [&](int64_t task, int64_t) {
      b.bias_bar->typed_data()[task] = kept.Sum(task / s.out_channels, task % s.out_channels);
    });
    return ffi::Error::Success();
  });
}

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
                                  .Attr<int64_t>("dense_percent")
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
                                  .Attr<int64_t>("dense_percent")
                                  .Attr<int64_t>("room")
                                  .Attr<int64_t>("parts")
                                  .Attr<int64_t>("workers"));
