// Submanifold convolution on the GPU, and its gradient: responses at the input's own sites.
//
// Forward: one thread a site, with a tile of output channels in its registers. For each tap it
// finds the neighbour by bisection (a neighbour's slot is no further away than its key, so that a
// step along the last axis costs one probe), then adds the neighbour's inputs times rows of
// weights, which all threads of a warp read at the same address. No shared memory, no barriers.
// Backward: values_bar is the same with mirrored taps and a transposed filter. weights_bar: a block
// takes a (run of sites, tap, 16 x 16 channels) and keeps a pair of channels in each thread; the
// runs are a fixed number, whose sums are added in order. So nothing depends on scheduling.
//
// The filter stands in the workspace as dense rows, for a block of channels at a time where it is
// large. Traffic: neighbours' values once for each tap with live weights and tile of 32 channels,
// mostly from the caches, since neighbours of consecutive sites lie together; features are written
// once, coalesced.

#include <algorithm>
#include <cstdint>

#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/cuda_select.cuh"
#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/window.h"
#include "xla_kernels/common/workspace.h"
#include "xla_kernels/submanifold.h"

namespace ilajax {
namespace {

constexpr int kSites = 128;     // sites of a block
constexpr int kThreads = 256;   // of the kernels that go over other things
constexpr int kTile = 32;       // channels in the registers of a thread,
constexpr int kNarrowTile = 8;  // and where no more are needed
constexpr int kPairs = 16;      // weights_bar: a block has kPairs x kPairs channels,
constexpr int kStep = 32;       // and takes so many sites at a time

// A dense filter of `block` columns, which are output channels from `first`; transposed: input
// channels.
//   rows f32[tap][row][block], live u8[tap][row][tile]
struct Filter {
  float* rows;
  uint8_t* live;
  int64_t taps, in_channels, out_channels, first, block;
  bool transposed;

  __host__ __device__ int64_t row_channels() const {
    return transposed ? out_channels : in_channels;
  }
  __host__ __device__ int64_t columns() const {
    const int64_t all = transposed ? in_channels : out_channels;
    return all - first < block ? all - first : block;
  }
  __host__ __device__ int64_t tile() const {
    return columns() <= kNarrowTile ? kNarrowTile : kTile;
  }
  __host__ __device__ int64_t tiles() const { return (columns() + tile() - 1) / tile(); }

  __device__ int64_t Row(int64_t tap, int64_t row) const { return tap * row_channels() + row; }
};

// Where a weight stands: its tap, input and output channel; false for padding.
__device__ bool Decode(const Filter& f, int32_t key, int64_t& tap, int64_t& ic, int64_t& oc) {
  if (key < 0 || key >= f.out_channels * f.in_channels * f.taps) return false;
  tap = key % f.taps;
  ic = key / f.taps % f.in_channels;
  oc = key / f.taps / f.in_channels;
  return true;
}

__global__ void __launch_bounds__(kThreads)
    ZeroKernel(Filter f, int64_t count, int32_t* responses) {
  const int64_t rows = f.taps * f.row_channels();
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t begin = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = begin; i < rows * f.block; i += stride) f.rows[i] = 0.0f;
  for (int64_t i = begin; i < rows * f.tiles(); i += stride) f.live[i] = 0;
  for (int64_t i = begin; i < count; i += stride) responses[i] = 0;
}

// Behind ZeroKernel: one thread a weight.
__global__ void __launch_bounds__(kThreads)
    FillKernel(Filter f, int64_t weights, const int32_t* kernel_keys, const float* values) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x; n < weights; n += stride) {
    int64_t tap, ic, oc;
    if (!Decode(f, kernel_keys[n], tap, ic, oc)) continue;
    const int64_t row = f.Row(tap, f.transposed ? oc : ic);
    const int64_t column = (f.transposed ? ic : oc) - f.first;
    if (column < 0 || column >= f.columns()) continue;
    f.rows[row * f.block + column] = values[n];
    f.live[row * f.tiles() + column / f.tile()] = 1;
  }
}

// The slot of the site at the tap's offset from slot i, or at minus that; -1 if there is none.
__device__ int64_t Neighbour(const Window& w, const int32_t* keys, int64_t slots, int64_t i,
                             int64_t tap, bool mirrored) {
  const int32_t own = keys[i];
  if (own < 0 || own >= w.input_sites) return -1;
  uint32_t place = static_cast<uint32_t>(own), rest = static_cast<uint32_t>(tap);
  int64_t key = 0, step = 1;
  for (int a = w.rank - 1; a >= 0; --a) {
    const uint32_t size = static_cast<uint32_t>(w.input_shape[a]);
    const uint32_t width = static_cast<uint32_t>(w.window_shape[a]);
    const int64_t offset = int64_t{rest % width} * w.dilation[a] - w.low[a];
    const int64_t p = int64_t{place % size} + (mirrored ? -offset : offset);
    if (p < 0 || p >= w.input_shape[a]) return -1;
    place /= size;
    rest /= width;
    key += p * step;
    step *= w.input_shape[a];
  }
  // Keys ascend, so the slots between two keys are no more than the keys.
  const int64_t first = max(key < own ? i - (own - key) : i, int64_t{0});
  const int64_t last = min(key < own ? i : i + (key - own), slots - 1);
  const int64_t slot = first + LowerBound(keys + first, last - first, key);
  return keys[slot] == key ? slot : -1;
}

// sums += x * weights. A zero factor adds nothing, not even against inf or NaN.
template <int kColumns>
__device__ void AddProducts(float x, const float* weights, float (&sums)[kColumns]) {
  if (x == 0.0f) return;
  if (x - x == 0.0f) {  // finite
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[j] += x * weights[j];
  } else {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (weights[j] != 0.0f) sums[j] += x * weights[j];
    }
  }
}

// One direction of the convolution: from `in` T[items, rows of the filter, slots] to a block of the
// channels of `out` T[items, out_channels, slots].
template <typename T>
struct Apply {
  Window w;
  Filter filter;
  int64_t items, slots, out_channels;
  const int32_t* keys;
  const T* in;
  T* out;
  const float* bias;   // forward only, else null
  int32_t* responses;  // forward only: how many are not zero
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kSites) ApplyKernel(Apply<T> a) {
  const Filter& f = a.filter;
  const int64_t rows = f.row_channels(), tiles = f.tiles();
  const int64_t chunks = (a.slots + kSites - 1) / kSites;
  for (int64_t task = blockIdx.x; task < a.items * chunks * tiles; task += gridDim.x) {
    const int64_t tile = task % tiles, chunk = task / tiles % chunks, item = task / tiles / chunks;
    const int64_t i = chunk * kSites + threadIdx.x;
    const int32_t* keys = a.keys + item * a.slots;
    const T* in = a.in + item * rows * a.slots;
    float sums[kColumns] = {};
    for (int64_t tap = 0; tap < f.taps; ++tap) {
      const uint8_t* live = f.live + f.Row(tap, 0) * tiles + tile;
      const float* weights = f.rows + f.Row(tap, 0) * f.block + tile * kColumns;
      int64_t slot = -2;  // not looked for yet
      for (int64_t row = 0; row < rows; ++row, live += tiles, weights += f.block) {
        if (*live == 0) continue;
        if (slot == -2) {
          slot = i < a.slots ? Neighbour(a.w, keys, a.slots, i, tap, f.transposed) : -1;
        }
        if (slot < 0) break;
        AddProducts(static_cast<float>(in[row * a.slots + slot]), weights, sums);
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int64_t column = tile * kColumns + j;
      if (column >= f.columns()) break;  // the same in all threads
      const int64_t channel = f.first + column;
      const bool responds = sums[j] != 0.0f;
      float value = sums[j];
      if (a.bias != nullptr) {
        value = responds ? value + a.bias[channel] : 0.0f;
        const int32_t count = __popc(__ballot_sync(~0u, responds));
        if (threadIdx.x % 32 == 0 && count != 0) {
          atomicAdd(&a.responses[item * a.out_channels + channel], count);
        }
      }
      if (i < a.slots) a.out[(item * a.out_channels + channel) * a.slots + i] = T(value);
    }
  }
}

// A block of the weights' gradients: sums[group][part][tap][ic][block], over `parts` runs of sites.
template <typename T>
struct WeightSums {
  Window w;
  int64_t groups, items, parts, slots, in_channels, out_channels, first, block;  // items of a group
  const int32_t* keys;
  const T* values;
  const T* cotangent;
  float* sums;
};

template <typename T>
__global__ void __launch_bounds__(kPairs* kPairs) WeightSumsKernel(WeightSums<T> a) {
  __shared__ float x[kPairs][kStep + 1], g[kPairs][kStep + 1];  // + 1: no bank conflicts
  __shared__ int64_t neighbours[kStep];
  const int lane = threadIdx.x % kStep;
  const int64_t ic_tiles = (a.in_channels + kPairs - 1) / kPairs;
  const int64_t oc_tiles = (a.block + kPairs - 1) / kPairs;
  const int64_t chunks = (a.slots + kStep - 1) / kStep, units = a.items * chunks;
  const int64_t tasks = a.groups * a.parts * a.w.taps * ic_tiles * oc_tiles;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    int64_t rest = task;
    const int64_t first_oc = a.first + rest % oc_tiles * kPairs;
    const int64_t first_ic = (rest /= oc_tiles) % ic_tiles * kPairs;
    const int64_t tap = (rest /= ic_tiles) % a.w.taps;
    const int64_t part = (rest /= a.w.taps) % a.parts, group = rest / a.parts;
    float sum = 0.0f;
    for (int64_t unit = part * units / a.parts; unit < (part + 1) * units / a.parts; ++unit) {
      const int64_t item = group * a.items + unit / chunks, i = unit % chunks * kStep + lane;
      if (threadIdx.x < kStep) {
        neighbours[lane] =
            i < a.slots ? Neighbour(a.w, a.keys + item * a.slots, a.slots, i, tap, false) : -1;
      }
      __syncthreads();
      const int64_t slot = neighbours[lane];
      for (int c = threadIdx.x / kStep; c < kPairs; c += kPairs * kPairs / kStep) {
        const int64_t ic = first_ic + c, oc = first_oc + c;
        const T* value = a.values + (item * a.in_channels + ic) * a.slots;
        const T* cotangent = a.cotangent + (item * a.out_channels + oc) * a.slots;
        x[c][lane] = slot >= 0 && ic < a.in_channels ? static_cast<float>(value[slot]) : 0.0f;
        g[c][lane] = slot >= 0 && oc < a.out_channels ? static_cast<float>(cotangent[i]) : 0.0f;
      }
      __syncthreads();
      for (int site = 0; site < kStep; ++site) {
        const float xs = x[threadIdx.x / kPairs][site], gs = g[threadIdx.x % kPairs][site];
        if (xs != 0.0f && gs != 0.0f) sum += xs * gs;
      }
    }
    const int64_t ic = first_ic + threadIdx.x / kPairs;
    const int64_t column = first_oc - a.first + threadIdx.x % kPairs;
    if (ic < a.in_channels && column < a.block) {
      const int64_t row = ((group * a.parts + part) * a.w.taps + tap) * a.in_channels + ic;
      a.sums[row * a.block + column] = sum;
    }
    __syncthreads();
  }
}

// weights_bar[group][n] for the live weights of the block: the sum over the parts, in their order.
__global__ void __launch_bounds__(kThreads)
    GatherKernel(Filter f, int64_t groups, int64_t parts, int64_t weights,
                 const int32_t* kernel_keys, const float* sums, float* weights_bar) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < groups * weights;
       i += stride) {
    int64_t tap = 0, ic = 0, oc = f.first;
    const bool stored = Decode(f, kernel_keys[i % weights], tap, ic, oc);
    if (oc < f.first || oc >= f.first + f.columns()) continue;
    float total = 0.0f;
    for (int64_t part = 0; stored && part < parts; ++part) {
      const int64_t row = (i / weights * parts + part) * f.taps * f.in_channels + f.Row(tap, ic);
      total += sums[row * f.block + oc - f.first];
    }
    weights_bar[i] = total;
  }
}

// bias_bar[group][oc]: the sum of the cotangents at stored sites; a block each.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    BiasKernel(SubmanifoldShape s, int64_t groups, int64_t sites, const int32_t* keys,
               const T* cotangent, float* bias_bar) {
  __shared__ float sums[kThreads];
  const int64_t items = s.batch / groups;
  for (int64_t task = blockIdx.x; task < groups * s.out_channels; task += gridDim.x) {
    const int64_t group = task / s.out_channels, oc = task % s.out_channels;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < items * s.slots; i += kThreads) {
      const int64_t item = group * items + i / s.slots, slot = i % s.slots;
      const int32_t key = keys[item * s.slots + slot];
      if (key < 0 || key >= sites) continue;
      sum += static_cast<float>(cotangent[(item * s.out_channels + oc) * s.slots + slot]);
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) bias_bar[task] = sums[0];
    __syncthreads();
  }
}

// Makes the filter of the block of columns from `first`.
ffi::Error Fill(cudaStream_t stream, const SubmanifoldShape& s, const Filter& f,
                const int32_t* kernel_keys, const float* weights, int64_t count,
                int32_t* responses) {
  // Without rows there are responses still, all 0.
  const int64_t cells = std::max(f.taps * f.row_channels() * f.block, count);
  ILAJAX_RETURN_IF_ERROR(Launch<ZeroKernel>(GridFor(CeilDiv(cells, kThreads)), kThreads, 0, stream,
                                            f, count, responses));
  return Launch<FillKernel>(GridFor(CeilDiv(s.weights, kThreads)), kThreads, 0, stream, f,
                            s.weights, kernel_keys, weights);
}

template <typename T>
ffi::Error ApplyFilter(cudaStream_t stream, const Apply<T>& a) {
  const dim3 grid = GridFor(a.items * CeilDiv(a.slots, kSites) * a.filter.tiles());
  if (a.filter.tile() == kNarrowTile) {
    return Launch<ApplyKernel<T, kNarrowTile>>(grid, kSites, 0, stream, a);
  }
  return Launch<ApplyKernel<T, kTile>>(grid, kSites, 0, stream, a);
}

// The filter in the workspace; `channels` are its columns in all, `block` of them at a time.
Filter CarveFilter(Carver& carver, const Window& w, const SubmanifoldShape& s, int64_t block,
                   bool transposed) {
  Filter f = {nullptr, nullptr, w.taps, s.in_channels, s.out_channels, 0, block, transposed};
  f.rows = carver.Take<float>(w.taps * f.row_channels() * block);
  f.live = carver.Take<uint8_t>(w.taps * f.row_channels() * CeilDiv(block, kNarrowTile));
  return f;
}

ffi::Error SubmanifoldFwdImpl(cudaStream_t stream, ffi::Buffer<ffi::S32> keys,
                              ffi::AnyBuffer values, ffi::Buffer<ffi::S32> kernel_keys,
                              ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::F32> bias,
                              ffi::Result<ffi::AnyBuffer> features,
                              ffi::Result<ffi::Buffer<ffi::S32>> responses,
                              ffi::Result<ffi::Buffer<ffi::U8>> workspace, Span input_shape,
                              Span window_shape, Span strides, Span dilation, Span low,
                              Span output_shape, int64_t channel_block) {
  Window w;
  SubmanifoldShape s;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(
      SubmanifoldShape::Read(keys, values, kernel_keys, weights, *features, w, s));
  ILAJAX_RETURN_IF_ERROR(CheckShape("submanifold: bias", bias, {s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("submanifold: responses", *responses, {s.batch, s.out_channels}));
  if (channel_block < kTile || channel_block % kTile != 0) {
    return InvalidArgument("submanifold: channel_block must be a multiple of ", kTile);
  }
  Carver carver(workspace->untyped_data());
  Filter f = CarveFilter(carver, w, s, channel_block, false);
  ILAJAX_RETURN_IF_ERROR(CheckWorkspace("submanifold", *workspace, carver.used()));
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    for (f.first = 0; f.first < s.out_channels; f.first += channel_block) {
      ILAJAX_RETURN_IF_ERROR(Fill(stream, s, f, kernel_keys.typed_data(), weights.typed_data(),
                                  f.first == 0 ? s.batch * s.out_channels : 0,
                                  responses->typed_data()));
      const Apply<T> apply = {w,
                              f,
                              s.batch,
                              s.slots,
                              s.out_channels,
                              keys.typed_data(),
                              Data<T>(values),
                              Data<T>(*features),
                              bias.typed_data(),
                              responses->typed_data()};
      ILAJAX_RETURN_IF_ERROR(ApplyFilter(stream, apply));
    }
    return ffi::Error::Success();
  });
}

ffi::Error SubmanifoldBwdImpl(
    cudaStream_t stream, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
    ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights, ffi::AnyBuffer cotangent,
    ffi::Result<ffi::AnyBuffer> values_bar, ffi::Result<ffi::Buffer<ffi::F32>> weights_bar,
    ffi::Result<ffi::Buffer<ffi::F32>> bias_bar, ffi::Result<ffi::Buffer<ffi::U8>> workspace,
    Span input_shape, Span window_shape, Span strides, Span dilation, Span low, Span output_shape,
    int64_t in_block, int64_t out_block, int64_t parts) {
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
  if (in_block < kTile || in_block % kTile != 0 || out_block < 1 || parts < 1) {
    return InvalidArgument("submanifold: the plan is out of range");
  }
  // The two halves use the workspace one after the other.
  Carver carver(workspace->untyped_data()), sums_carver(workspace->untyped_data());
  Filter f = CarveFilter(carver, w, s, in_block, true);
  float* sums = sums_carver.Take<float>(groups * parts * w.taps * s.in_channels * out_block);
  ILAJAX_RETURN_IF_ERROR(CheckWorkspace("submanifold", *workspace, carver.used()));
  ILAJAX_RETURN_IF_ERROR(CheckWorkspace("submanifold", *workspace, sums_carver.used()));
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    for (f.first = 0; f.first < s.in_channels; f.first += in_block) {
      ILAJAX_RETURN_IF_ERROR(
          Fill(stream, s, f, kernel_keys.typed_data(), weights.typed_data(), 0, nullptr));
      const Apply<T> apply = {w,
                              f,
                              s.batch,
                              s.slots,
                              s.in_channels,
                              keys.typed_data(),
                              Data<T>(cotangent),
                              Data<T>(*values_bar),
                              nullptr,
                              nullptr};
      ILAJAX_RETURN_IF_ERROR(ApplyFilter(stream, apply));
    }
    for (int64_t first = 0; first < s.out_channels; first += out_block) {
      const WeightSums<T> a = {w,
                               groups,
                               s.batch / groups,
                               parts,
                               s.slots,
                               s.in_channels,
                               s.out_channels,
                               first,
                               out_block,
                               keys.typed_data(),
                               Data<T>(values),
                               Data<T>(cotangent),
                               sums};
      const int64_t tiles = CeilDiv(s.in_channels, kPairs) * CeilDiv(out_block, kPairs);
      ILAJAX_RETURN_IF_ERROR(Launch<WeightSumsKernel<T>>(GridFor(groups * parts * w.taps * tiles),
                                                         kPairs * kPairs, 0, stream, a));
      const Filter columns = {nullptr,        nullptr, w.taps,    s.in_channels,
                              s.out_channels, first,   out_block, false};
      ILAJAX_RETURN_IF_ERROR(Launch<GatherKernel>(
          GridFor(CeilDiv(groups * s.weights, kThreads)), kThreads, 0, stream, columns, groups,
          parts, s.weights, kernel_keys.typed_data(), sums, weights_bar->typed_data()));
    }
    return Launch<BiasKernel<T>>(GridFor(groups * s.out_channels), kThreads, 0, stream, s, groups,
                                 w.input_sites, keys.typed_data(), Data<T>(cotangent),
                                 bias_bar->typed_data());
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(SubmanifoldFwd, ilajax::SubmanifoldFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<ilajax::Stream>()
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
                                  .Attr<int64_t>("channel_block"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SubmanifoldBwd, ilajax::SubmanifoldBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<ilajax::Stream>()
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
                                  .Attr<int64_t>("in_block")
                                  .Attr<int64_t>("out_block")
                                  .Attr<int64_t>("parts"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
