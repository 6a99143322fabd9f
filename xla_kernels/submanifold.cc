// Submanifold convolution on the CPU, and its gradient: responses at the input's own sites.
//
// The sums are those of conv.cc, line by line (conv_sums.h); of each line the sites that the input
// stores are put out, nothing is selected. The gradient is that of a convolution that kept these.

#include "xla_kernels/submanifold.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/conv_gradient.h"
#include "xla_kernels/conv_sums.h"

namespace ilajax {
namespace {

ConvShape AsConv(const SubmanifoldShape& s) {
  return {s.batch, s.in_channels, s.slots, s.weights, s.out_channels, s.slots, true};
}

template <typename T>
struct AtSites {
  const LineSums<T>& sums;
  const float* bias;
  T* features;

  // The sites of output rows [row, last), for a block of output channels. Counts responses that are
  // not zero, [B, Cout].
  template <typename Loops, int kOctets>
  void Run(int64_t item, int64_t block, int64_t row, int64_t last, int32_t* counts,
           SumsWorker& worker) const {
    const ConvShape& s = sums.s;
    const int64_t width = sums.plan.block, first = block * width;
    const int64_t channels = std::min(width, s.out_channels - first);
    const int32_t* key = sums.input.Keys(item, 0);
    T* feature = features + (item * s.out_channels + first) * s.slots;
    int32_t* count = counts + item * s.out_channels + first;
    int64_t slot = -1;
    sums.template Run<Loops, kOctets>(
        item, block, row, last, worker, [&](int64_t first_key, int64_t sites) {
          // Lines come in ascending order, so that the first one alone needs a search.
          if (slot < 0) slot = std::lower_bound(key, key + s.slots, first_key) - key;
          float* rows = worker.line.first(sums.lines.line);
          for (; slot < s.slots && key[slot] < first_key + sites; ++slot) {
            const int64_t site = key[slot] - first_key;
            if (site < 0) continue;
            for (int64_t j = 0; j < channels; ++j) {
              const float response = rows[site * width + j];
              count[j] += response != 0.0f;
              feature[j * s.slots + slot] = T(response != 0.0f ? response + bias[first + j] : 0.0f);
            }
          }
          for (int64_t word = 0; word < CeilDiv(sites, 64); ++word) {
            for (uint64_t& rest = worker.line.bits[word]; rest != 0; rest &= rest - 1) {
              std::memset(rows + (word * 64 + __builtin_ctzll(rest)) * width, 0,
                          width * sizeof(float));
            }
          }
        });
  }
};

ffi::Error SubmanifoldFwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys,
                              ffi::AnyBuffer values, ffi::Buffer<ffi::S32> kernel_keys,
                              ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::F32> bias,
                              ffi::Result<ffi::AnyBuffer> features,
                              ffi::Result<ffi::Buffer<ffi::S32>> responses,
                              ffi::Result<ffi::Buffer<ffi::U8>> workspace, Span input_shape,
                              Span window_shape, Span strides, Span dilation, Span low,
                              Span output_shape, int64_t channel_block, int64_t line_sites,
                              int64_t max_rows, int64_t dense_rows, int64_t dense_percent,
                              int64_t room, int64_t parts, int64_t workers) {
  Window w;
  SubmanifoldShape shape;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(
      SubmanifoldShape::Read(keys, values, kernel_keys, weights, *features, w, shape));
  const ConvShape s = AsConv(shape);
  ILAJAX_RETURN_IF_ERROR(CheckShape("submanifold: bias", bias, {s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("submanifold: responses", *responses, {s.batch, s.out_channels}));
  w = Squeeze(w);
  const Lines lines(w);
  const SumsPlan plan = {channel_block, line_sites, max_rows, dense_rows, dense_percent, room};
  const LineBuffer buffer(lines.line, line_sites, channel_block);
  if (!IsBlock(channel_block) || !Fits(plan, lines, s.in_channels, buffer) || parts < 1 ||
      parts > lines.rows || workers < 1) {
    return InvalidArgument("submanifold: the plan does not fit the shapes");
  }
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    Carver carver(workspace->untyped_data());
    SumsTables tables(s, w, lines, plan);
    tables.Carve(carver);
    const int64_t segments = s.batch * s.out_channels;
    int32_t* counts = carver.Take<int32_t>(parts * segments);
    const SumsWorker layout(lines, plan, buffer);
    const WorkerSlices slices(carver, *workspace, workers,
                              [&](Carver& own) { SumsWorker(layout).Carve(own, lines); });
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("submanifold", *workspace, slices.end()));
    tables.Fill(s, w, lines, kernel_keys.typed_data(), weights.typed_data());
    std::memset(features->untyped_data(), 0, features->size_bytes());
    std::fill_n(counts, parts * segments, 0);
    const StoredInput<T> input = {s, keys.typed_data(), Data<T>(values)};
    const LineSums<T> sums = {input, lines, tables, plan};
    const AtSites<T> at_sites = {sums, bias.typed_data(), Data<T>(*features)};
    for (int64_t i = 0; i < workers; ++i) slices.Take(i, layout, lines).Clear(lines);
    const int64_t blocks = tables.filters.blocks;
    ParallelFor(pool, s.batch * blocks * parts, workers, [&](int64_t task, int64_t id) {
      SumsWorker worker = slices.Take(id, layout, lines);
      const int64_t rest = task / parts, part = task % parts;
      DispatchLoops(channel_block, [&]<typename Loops, int kOctets>() {
        at_sites.template Run<Loops, kOctets>(
            rest / blocks, rest % blocks, part * lines.rows / parts,
            (part + 1) * lines.rows / parts, counts + part * segments, worker);
      });
    });
    for (int64_t segment = 0; segment < segments; ++segment) {
      int32_t count = 0;
      for (int64_t part = 0; part < parts; ++part) count += counts[part * segments + segment];
      responses->typed_data()[segment] = count;
    }
    return ffi::Error::Success();
  });
}

ffi::Error SubmanifoldBwdImpl(
    ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
    ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights, ffi::AnyBuffer cotangent,
    ffi::Result<ffi::AnyBuffer> values_bar, ffi::Result<ffi::Buffer<ffi::F32>> weights_bar,
    ffi::Result<ffi::Buffer<ffi::F32>> bias_bar, ffi::Result<ffi::Buffer<ffi::U8>> workspace,
    Span input_shape, Span window_shape, Span strides, Span dilation, Span low, Span output_shape,
    int64_t channel_block, int64_t line_sites, int64_t slab_rows, int64_t dense_rows,
    int64_t dense_percent, int64_t room, int64_t parts, int64_t workers) {
  Window w;
  SubmanifoldShape s;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(
      SubmanifoldShape::Read(keys, values, kernel_keys, weights, cotangent, w, s));
  return ConvGradient(
      "submanifold", pool, AsConv(s), w, true,
      {channel_block, line_sites, slab_rows, dense_rows, dense_percent, room, parts, workers},
      {keys, values, kernel_keys, weights, keys, cotangent, values_bar, weights_bar, bias_bar,
       workspace});
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SubmanifoldFwd, ilajax::SubmanifoldFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kernel_keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // bias
                                  .Ret<xla::ffi::AnyBuffer>()              // features
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // responses
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
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
                                  .Attr<int64_t>("parts")
                                  .Attr<int64_t>("workers"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SubmanifoldBwd, ilajax::SubmanifoldBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kernel_keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weights
                                  .Arg<xla::ffi::AnyBuffer>()              // cotangent of features
                                  .Ret<xla::ffi::AnyBuffer>()              // values_bar
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
