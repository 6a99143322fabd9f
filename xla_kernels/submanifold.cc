// Submanifold convolution on the CPU, and its gradient: responses at the input's own sites.
//
// Work is cut into chunks of a sample's sites. For each tap the sites' neighbours are found by one
// merge, since the keys of neighbours ascend with the keys; then every live (tap, input channel)
// adds its row of weights to the sites' rows of responses, which stay in the cache. The gradient
// walks the same chunks with the taps mirrored: from the cotangents of the neighbours a site's
// inputs and the weights get theirs. Weights are summed up for a fixed number of runs of chunks,
// whose sums are added in order.
//
// A sum's order is tap, then input channel: repeatable, whatever the threads do.

#include "xla_kernels/submanifold.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/filters.h"
#include "xla_kernels/common/parallel.h"

namespace ilajax {
namespace {

constexpr int64_t kChunk = 256;  // sites of a task, as in ilajax/ops/_plans.py

// The neighbours of a chunk of sites.
struct Neighbours {
  const Window& w;
  const int32_t* keys;  // of the sample
  int64_t slots, begin, end;
  int32_t* places;  // [kChunk][rank]: positions along the axes
  int32_t* slot;    // [kChunk]: where the neighbour stands, or -1

  void Locate() {
    for (int64_t i = begin; i < end; ++i) {
      int64_t key = keys[i];
      const bool stored = key >= 0 && key < w.input_sites;
      for (int a = w.rank - 1; a >= 0; --a) {
        places[(i - begin) * w.rank + a] =
            stored ? static_cast<int32_t>(key % w.input_shape[a]) : int32_t{-1};
        key /= w.input_shape[a];
      }
    }
  }

  // Finds the sites at +(offset - low) of each site, or at -(offset - low).
  void Find(const int32_t* tap_offset, bool mirrored) {
    const int32_t* next = nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* place = places + (i - begin) * w.rank;
      int64_t key = 0;
      bool inside = place[0] >= 0;
      for (int a = 0; a < w.rank; ++a) {
        const int64_t step = tap_offset[a] - w.low[a];
        const int64_t p = place[a] + (mirrored ? -step : step);
        inside &= p >= 0 && p < w.input_shape[a];
        key = key * w.input_shape[a] + p;
      }
      slot[i - begin] = -1;
      if (!inside) continue;
      if (next == nullptr) next = std::lower_bound(keys, keys + slots, key);
      while (next < keys + slots && *next < key) ++next;
      if (next < keys + slots && *next == key) slot[i - begin] = static_cast<int32_t>(next - keys);
    }
  }
};

struct Worker {
  int32_t* places;
  int32_t* slot;
  float* rows;         // [kChunk][channel of the block]: responses, or cotangents of neighbours
  float* values_bar;   // [kChunk][ic]
  float* weights_bar;  // as Filters::rows

  Worker(Carver carver, const Window& w, const Filters& filters, bool backward)
      : places(carver.Take<int32_t>(kChunk * w.rank)),
        slot(carver.Take<int32_t>(kChunk)),
        rows(carver.Take<float>(kChunk * filters.block)),
        values_bar(carver.Take<float>(backward ? kChunk * filters.in_channels : 0)),
        weights_bar(carver.Take<float>(backward ? filters.size() : 0)),
        bytes(carver.used()) {}
  int64_t bytes;
};

template <typename T>
bool SampleFinite(const SubmanifoldShape& s, const T* values, int64_t item, int64_t channels) {
  return AllFinite(values + item * channels * s.slots, channels * s.slots);
}

ffi::Error SubmanifoldFwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys,
                              ffi::AnyBuffer values, ffi::Buffer<ffi::S32> kernel_keys,
                              ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::F32> bias,
                              ffi::Result<ffi::AnyBuffer> features,
                              ffi::Result<ffi::Buffer<ffi::S32>> responses,
                              ffi::Result<ffi::Buffer<ffi::U8>> workspace, Span input_shape,
                              Span window_shape, Span strides, Span dilation, Span low,
                              Span output_shape, int64_t channel_block, int64_t workers) {
  Window w;
  SubmanifoldShape s;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(
      SubmanifoldShape::Read(keys, values, kernel_keys, weights, *features, w, s));
  ILAJAX_RETURN_IF_ERROR(CheckShape("submanifold: bias", bias, {s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("submanifold: responses", *responses, {s.batch, s.out_channels}));
  if (channel_block < 1 || workers < 1) {
    return InvalidArgument("submanifold: the plan has an entry below 1");
  }
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    const int64_t chunks = CeilDiv(s.slots, kChunk), units = s.batch * chunks;
    Carver carver(workspace->untyped_data());
    Filters filters = {channel_block, CeilDiv(s.out_channels, channel_block), s.in_channels, w.taps,
                       w.window_shape[w.rank - 1]};
    filters.Carve(carver);
    uint8_t* finite = carver.Take<uint8_t>(s.batch);
    int32_t* counts = carver.Take<int32_t>(units * s.out_channels);
    const int64_t begin = carver.used();
    const int64_t bytes = Worker(Carver(nullptr), w, filters, false).bytes;
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("submanifold", *workspace, begin + workers * bytes));
    filters.Fill(w, s.weights, s.out_channels, kernel_keys.typed_data(), weights.typed_data());
    ParallelFor(pool, s.batch, workers, [&](int64_t item, int64_t) {
      finite[item] = filters.finite && SampleFinite(s, Data<T>(values), item, s.in_channels);
    });
    auto run = [&]<int kBlock>(int64_t unit, int64_t id) {
      char* base = static_cast<char*>(workspace->untyped_data()) + begin + id * bytes;
      const Worker own(Carver(base), w, filters, false);
      const int64_t item = unit / chunks, first = unit % chunks * kChunk;
      Neighbours near = {w,       keys.typed_data() + item * s.slots, s.slots,
                         first,   std::min(first + kChunk, s.slots),  own.places,
                         own.slot};
      near.Locate();
      for (int64_t block = 0; block < filters.blocks; ++block) {
        std::memset(own.rows, 0, kChunk * channel_block * sizeof(float));
        for (int64_t tap = 0; tap < w.taps; ++tap) {
          near.Find(filters.tap_offsets + tap * w.rank, false);
          for (int64_t ic = 0; ic < s.in_channels; ++ic) {
            const int64_t row = filters.Row(block, ic, tap);
            if (!filters.live[row]) continue;
            const T* value = Data<T>(values) + (item * s.in_channels + ic) * s.slots;
            for (int64_t i = 0; i < near.end - first; ++i) {
              if (own.slot[i] < 0) continue;
              AddProducts<kBlock>(own.rows + i * channel_block, filters.rows + row * channel_block,
                                  static_cast<float>(value[own.slot[i]]), channel_block,
                                  finite[item]);
            }
          }
        }
        for (int64_t j = 0; j < std::min(channel_block, s.out_channels - block * channel_block);
             ++j) {
          const int64_t oc = block * channel_block + j;
          T* feature = Data<T>(*features) + (item * s.out_channels + oc) * s.slots;
          int32_t count = 0;
          for (int64_t i = first; i < near.end; ++i) {
            const float response = own.rows[(i - first) * channel_block + j];
            count += response != 0.0f;
            feature[i] = T(response != 0.0f ? response + bias.typed_data()[oc] : 0.0f);
          }
          counts[unit * s.out_channels + oc] = count;
        }
      }
    };
    ParallelFor(pool, units, workers, [&](int64_t unit, int64_t id) {
      DispatchBlock(channel_block,
                    [&]<int kBlock>() { run.template operator()<kBlock>(unit, id); });
    });
    for (int64_t segment = 0; segment < s.batch * s.out_channels; ++segment) {
      const int64_t item = segment / s.out_channels, oc = segment % s.out_channels;
      int32_t count = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        count += counts[(item * chunks + chunk) * s.out_channels + oc];
      }
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
    int64_t channel_block, int64_t parts, int64_t workers) {
  Window w;
  SubmanifoldShape s;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(
      SubmanifoldShape::Read(keys, values, kernel_keys, weights, cotangent, w, s));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("submanifold: values_bar", *values_bar, {s.batch, s.in_channels, s.slots}));
  if (values_bar->element_type() != values.element_type()) {
    return InvalidArgument("submanifold: values and values_bar have different dtypes");
  }
  const int64_t groups = weights_bar->dimensions().size() == 2 ? weights_bar->dimensions()[0] : 0;
  if (groups < 1 || s.batch % groups != 0) {
    return InvalidArgument("submanifold: a batch of ", s.batch, " does not hold ", groups,
                           " groups");
  }
  ILAJAX_RETURN_IF_ERROR(CheckShape("submanifold: weights_bar", *weights_bar, {groups, s.weights}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("submanifold: bias_bar", *bias_bar, {groups, s.out_channels}));
  if (channel_block < 1 || parts < 1 || workers < 1) {
    return InvalidArgument("submanifold: the plan has an entry below 1");
  }
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    const int64_t chunks = CeilDiv(s.slots, kChunk), units = s.batch / groups * chunks;
    Carver carver(workspace->untyped_data());
    Filters filters = {channel_block, CeilDiv(s.out_channels, channel_block), s.in_channels, w.taps,
                       w.window_shape[w.rank - 1]};
    filters.Carve(carver);
    uint8_t* finite = carver.Take<uint8_t>(s.batch);
    float* part_sums = carver.Take<float>(groups * parts * s.weights);
    const int64_t begin = carver.used();
    const int64_t bytes = Worker(Carver(nullptr), w, filters, true).bytes;
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("submanifold", *workspace, begin + workers * bytes));
    filters.Fill(w, s.weights, s.out_channels, kernel_keys.typed_data(), weights.typed_data());
    ParallelFor(pool, s.batch, workers, [&](int64_t item, int64_t) {
      finite[item] = filters.finite && SampleFinite(s, Data<T>(values), item, s.in_channels) &&
                     SampleFinite(s, Data<T>(cotangent), item, s.out_channels);
    });
    auto run = [&]<int kBlock>(int64_t item, int64_t first, const Worker& own) {
      Neighbours near = {w,       keys.typed_data() + item * s.slots, s.slots,
                         first,   std::min(first + kChunk, s.slots),  own.places,
                         own.slot};
      near.Locate();
      const int64_t count = near.end - first;
      std::memset(own.values_bar, 0, kChunk * s.in_channels * sizeof(float));
      std::memset(own.rows, 0, kChunk * channel_block * sizeof(float));
      for (int64_t block = 0; block < filters.blocks; ++block) {
        const int64_t channels = std::min(channel_block, s.out_channels - block * channel_block);
        for (int64_t tap = 0; tap < w.taps; ++tap) {
          near.Find(filters.tap_offsets + tap * w.rank, true);
          for (int64_t j = 0; j < channel_block; ++j) {
            const int64_t oc = block * channel_block + std::min(j, channels - 1);
            const T* g = Data<T>(cotangent) + (item * s.out_channels + oc) * s.slots;
            for (int64_t i = 0; i < count; ++i) {
              own.rows[i * channel_block + j] =
                  j < channels && own.slot[i] >= 0 ? static_cast<float>(g[own.slot[i]]) : 0.0f;
            }
          }
          for (int64_t ic = 0; ic < s.in_channels; ++ic) {
            const int64_t row = filters.Row(block, ic, tap);
            if (!filters.live[row]) continue;
            const T* value = Data<T>(values) + (item * s.in_channels + ic) * s.slots + first;
            for (int64_t i = 0; i < count; ++i) {
              if (own.slot[i] < 0) continue;
              const float* g = own.rows + i * channel_block;
              own.values_bar[i * s.in_channels + ic] +=
                  Dot<kBlock>(g, filters.rows + row * channel_block, channel_block, finite[item]);
              AddProducts<kBlock>(own.weights_bar + row * channel_block, g,
                                  static_cast<float>(value[i]), channel_block, finite[item]);
            }
          }
        }
      }
      for (int64_t ic = 0; ic < s.in_channels; ++ic) {
        T* value_bar = Data<T>(*values_bar) + (item * s.in_channels + ic) * s.slots + first;
        for (int64_t i = 0; i < count; ++i)
          value_bar[i] = T(own.values_bar[i * s.in_channels + ic]);
      }
    };
    ParallelFor(pool, groups * parts, workers, [&](int64_t task, int64_t id) {
      char* base = static_cast<char*>(workspace->untyped_data()) + begin + id * bytes;
      const Worker own(Carver(base), w, filters, true);
      std::memset(own.weights_bar, 0, filters.size() * sizeof(float));
      const int64_t group = task / parts, part = task % parts;
      for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
        const int64_t item = group * (s.batch / groups) + unit / chunks;
        DispatchBlock(channel_block, [&]<int kBlock>() {
          run.template operator()<kBlock>(item, unit % chunks * kChunk, own);
        });
      }
      filters.Gather(kernel_keys.typed_data(), s.weights, s.out_channels, own.weights_bar,
                     part_sums + task * s.weights);
    });
    AddParts(part_sums, groups, parts, s.weights, weights_bar->typed_data());
    const KeptCotangents<T> kept = {s.batch / groups,  s.out_channels,     s.slots, w.output_sites,
                                    keys.typed_data(), Data<T>(cotangent), true};
    ParallelFor(pool, groups * s.out_channels, workers, [&](int64_t task, int64_t) {
      bias_bar->typed_data()[task] = kept.Sum(task / s.out_channels, task % s.out_channels);
    });
    return ffi::Error::Success();
  });
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
                                  .Attr<int64_t>("parts")
                                  .Attr<int64_t>("workers"));
