// The geometry of a window for kernels, and its live taps.

#pragma once

#include <algorithm>

#include "xla_kernels/common/block.cuh"
#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/window.h"

namespace ilajax {

// A number below 2^31 (0 counts as 1), to divide others by: exactly, and in two instructions, where
// a division takes twenty. See Granlund and Montgomery, "Division by invariant integers using
// multiplication".
struct Divisor {
  uint32_t value = 1, factor = 1u << 31, shift = 31;

  Divisor() = default;
  constexpr explicit Divisor(int64_t d) : value(static_cast<uint32_t>(std::max<int64_t>(d, 1))) {
    while (uint64_t{1} << (shift - 31) < value) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  ILAJAX_HOST_DEVICE constexpr uint32_t Quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * factor >> shift);
  }
};

constexpr bool DividesExactly(uint32_t d) {
  constexpr uint32_t kLast = 0x7fffffff;
  const Divisor divisor(d);
  bool exact = true;
  for (const uint32_t multiple : {d, kLast / 2 / d * d, kLast / d * d}) {
    for (const uint32_t n : {multiple - 1, multiple, kLast}) {
      exact = exact && divisor.Quotient(n) == n / d;
    }
  }
  return exact;
}
static_assert(DividesExactly(1) && DividesExactly(2) && DividesExactly(3) && DividesExactly(641) &&
              DividesExactly(0x10001) && DividesExactly(0x40000001) && DividesExactly(0x7fffffff));

// A window of R axes; grids of lower rank get leading axes of one site. Positions are 32-bit and
// wrap: a site is read only where its position along every axis is inside the grid.
template <int R>
struct Axes {
  int32_t input[R], output[R], stride[R], low[R], dilation[R], window[R];
  uint32_t input_step[R], output_step[R];
  Divisor input_size[R], output_size[R], window_size[R];

  explicit Axes(const Window& w) {
    const int pad = R - w.rank;
    uint32_t in = 1, out = 1;
    for (int a = R - 1; a >= 0; --a) {
      const bool real = a >= pad;
      input[a] = real ? static_cast<int32_t>(w.input_shape[a - pad]) : 1;
      output[a] = real ? static_cast<int32_t>(w.output_shape[a - pad]) : 1;
      stride[a] = real ? static_cast<int32_t>(w.strides[a - pad]) : 1;
      low[a] = real ? static_cast<int32_t>(w.low[a - pad]) : 0;
      dilation[a] = real ? static_cast<int32_t>(w.dilation[a - pad]) : 1;
      window[a] = real ? static_cast<int32_t>(w.window_shape[a - pad]) : 1;
      input_step[a] = in;
      output_step[a] = out;
      input_size[a] = Divisor(input[a]);
      output_size[a] = Divisor(output[a]);
      window_size[a] = Divisor(window[a]);
      in *= static_cast<uint32_t>(input[a]);
      out *= static_cast<uint32_t>(output[a]);
    }
  }

  // The position of a site, along the first `kAxes` axes.
  template <int kAxes = R>
  __device__ static void Unravel(uint32_t key, const Divisor (&size)[R], int32_t (&position)[R]) {
#pragma unroll
    for (int a = kAxes - 1; a >= 1; --a) {
      const uint32_t rest = size[a].Quotient(key);
      position[a] = static_cast<int32_t>(key - rest * size[a].value);
      key = rest;
    }
    position[0] = static_cast<int32_t>(key);
  }

  // The key of a position in the input; it wraps where that is outside.
  __device__ __forceinline__ uint32_t InputKey(const int32_t (&position)[R]) const {
    uint32_t key = position[R - 1];
#pragma unroll
    for (int a = R - 2; a >= 0; --a) key += static_cast<uint32_t>(position[a]) * input_step[a];
    return key;
  }
};

// The taps that have any live weight, in ascending order, in shared memory: offsets along the axes,
// the flat offset in the grid where they are looked up, the tap; and for each of all taps the
// channels of a group live at it. Taps of a row that lie within the same 32 offsets, counted from 0,
// are a run: the first of them has a bit for each, at its offset, and the others have none.
template <int R>
struct TapList {
  struct alignas(16) Entry {
    int32_t offset[R];
    uint32_t flat;
    int32_t tap;
    uint32_t run;

    // The offset along the last axis from which a run's bits count.
    __device__ int32_t run_begin() const { return offset[R - 1] & ~31; }
  };
  int count = 0;
  int taps = 0;
  Entry* entries = nullptr;
  uint32_t* live = nullptr;  // [group][tap]: a bit for each channel of the group

  ILAJAX_HOST_DEVICE static int64_t SharedBytes(int64_t taps, int64_t groups) {
    return taps * sizeof(Entry) + (taps * groups + 3) / 4 * 16;
  }

  __device__ uint32_t Live(int group, int tap) const { return live[group * taps + tap]; }

  // `flags` u8[channels][taps], with `step` from one channel to the next; `grid_step` of the grid
  // where they are looked up. `shared` is aligned to 16 bytes. All threads of the block call it.
  __device__ void Fill(const Axes<R>& axes, const uint32_t (&grid_step)[R], const uint8_t* flags,
                       int channels, int64_t step, int all_taps, void* shared) {
    taps = all_taps;
    entries = static_cast<Entry*>(shared);
    live = reinterpret_cast<uint32_t*>(entries + taps);
    __shared__ int found;
    const int groups = (channels + 31) / 32;
    for (int i = threadIdx.x; i < groups * taps; i += blockDim.x) live[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < channels * taps; i += blockDim.x) {
      const int channel = i / taps, tap = i - channel * taps;
      if (flags[channel * step + tap])
        atomicOr(&live[channel / 32 * taps + tap], 1u << (channel % 32));
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      int n = 0;
      for (int base = 0; base < taps; base += 32) {
        const int tap = base + threadIdx.x;
        uint32_t any = 0;
        for (int g = 0; g < groups && tap < taps; ++g) any |= live[g * taps + tap];
        const unsigned all = __ballot_sync(kWarp, any != 0);
        if (any != 0) {
          Entry& entry = entries[n + __popc(all & ((1u << threadIdx.x) - 1))];
          Axes<R>::Unravel(tap, axes.window_size, entry.offset);
          entry.flat = 0;
          for (int a = 0; a < R; ++a) {
            entry.offset[a] *= axes.dilation[a];
            entry.flat += static_cast<uint32_t>(entry.offset[a]) * grid_step[a];
          }
          entry.tap = tap;
        }
        n += __popc(all);
      }
      if (threadIdx.x == 0) found = n;
    }
    __syncthreads();
    count = found;
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
      const auto in_run = [&](int other) {
        const Divisor& row = axes.window_size[R - 1];
        return row.Quotient(entries[other].tap) == row.Quotient(entries[k].tap) &&
               entries[other].run_begin() == entries[k].run_begin();
      };
      uint32_t run = 0;
      if (k == 0 || !in_run(k - 1)) {
        for (int n = k; n < count && in_run(n); ++n) run |= 1u << (entries[n].offset[R - 1] & 31);
      }
      entries[k].run = run;
    }
    __syncthreads();
  }
};

// The filters as dense vectors over a block of output channels, one for each input channel and tap:
// f32[blocks][Cin][taps][block], with flags u8[blocks][Cin][taps] that tell which have a live
// weight.
struct DenseFilters {
  int block = 0, in_channels = 0, out_channels = 0, taps = 0;
  float* weights = nullptr;
  uint8_t* live = nullptr;

  ILAJAX_HOST_DEVICE int blocks() const { return (out_channels + block - 1) / block; }
  // The number of the first vector of an input channel.
  ILAJAX_HOST_DEVICE int64_t Vectors(int b, int ic) const {
    return (int64_t{b} * in_channels + ic) * taps;
  }

  template <typename Carver>
  void Carve(Carver& carver) {
    weights = carver.template Take<float>(Vectors(blocks(), 0), block);
    live = carver.template Take<uint8_t>(Vectors(blocks(), 0));
  }

  // Fills the vectors of one (block, input channel); a block of threads calls it. Of weights with
  // one key, which breaks their contract, any one wins, by the order of threads.
  __device__ void Fill(int b, int ic, const int32_t* keys, const float* values, int count) const {
    float* vectors = weights + Vectors(b, ic) * block;
    uint8_t* flags = live + Vectors(b, ic);
    for (int i = threadIdx.x; i < taps * block; i += blockDim.x) vectors[i] = 0.0f;
    for (int i = threadIdx.x; i < taps; i += blockDim.x) flags[i] = 0;
    __syncthreads();
    const int lane = threadIdx.x & 31;
    for (int j = threadIdx.x >> 5; j < min(block, out_channels - b * block); j += blockDim.x >> 5) {
      const int64_t begin = (int64_t{b * block + j} * in_channels + ic) * taps;
      const int first = WarpLowerBound(keys, count, begin);
      const int last = WarpLowerBound(keys, count, begin + taps);
      for (int n = first + lane; n < last; n += 32) {
        const int64_t tap = keys[n] - begin;
        if (tap < 0 || tap >= taps) continue;
        vectors[tap * block + j] = values[n];
        StoreRelaxed(&flags[tap], uint8_t{1});
      }
    }
  }
};

}  // namespace ilajax
