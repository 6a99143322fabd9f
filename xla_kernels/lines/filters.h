// Filters as the CPU kernels use them, and the sums over them that both convolutions share.

#ifndef ILAJAX_XLA_KERNELS_LINES_FILTERS_H_
#define ILAJAX_XLA_KERNELS_LINES_FILTERS_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/window.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {

// The live weights as dense vectors over the output channels of a block, a multiple of 8 with zeros
// behind the last channel: weights[block][line of taps][ic][tap of the line][channel of the block].
struct Filters {
  int64_t block, blocks, in_channels, taps, line_taps;
  float* weights;
  uint8_t* live;         // [block][line of taps][ic][tap of the line]: any weight
  uint8_t* live_runs;    // [block][line of taps][ic]
  uint8_t* live_lines;   // [block][line of taps]
  uint8_t* live_taps;    // [block][line of taps][tap of the line]
  int32_t* tap_offsets;  // [taps][rank]
  bool finite = true;

  Filters(Carver& carver, const ConvShape& s, int64_t channel_block, int64_t taps_of_line)
      : block(channel_block),
        blocks(CeilDiv(s.out_channels, channel_block)),
        in_channels(s.in_channels),
        taps(s.w.taps),
        line_taps(taps_of_line),
        weights(carver.Take<float>(size())),
        live(carver.Take<uint8_t>(blocks * in_channels * taps)),
        live_runs(carver.Take<uint8_t>(blocks * tap_lines() * in_channels)),
        live_lines(carver.Take<uint8_t>(blocks * tap_lines())),
        live_taps(carver.Take<uint8_t>(blocks * taps)),
        tap_offsets(carver.Take<int32_t>(taps * kMaxRank)) {}

  int64_t tap_lines() const { return taps / line_taps; }
  // Floats in `weights`.
  int64_t size() const { return blocks * in_channels * taps * block; }

  // The number of the run of vectors that the taps of a line share.
  int64_t Run(int64_t b, int64_t tap_line, int64_t ic) const {
    return (b * tap_lines() + tap_line) * in_channels + ic;
  }
  int64_t Vector(int64_t b, int64_t ic, int64_t tap) const {
    return Run(b, tap / line_taps, ic) * line_taps + tap % line_taps;
  }

  // Where a weight stands in `weights`; -1 for padding.
  int64_t Place(int64_t key, int64_t out_channels) const {
    if (key < 0 || key >= out_channels * in_channels * taps) return -1;
    const int64_t tap = key % taps, ic = key / taps % in_channels, oc = key / taps / in_channels;
    return Vector(oc / block, ic, tap) * block + oc % block;
  }

  void Fill(const Window& w, int64_t count, int64_t out_channels, const int32_t* keys,
            const float* values) {
    std::memset(weights, 0, size() * sizeof(float));
    std::memset(live, 0, blocks * in_channels * taps);
    std::memset(live_runs, 0, blocks * tap_lines() * in_channels);
    std::memset(live_lines, 0, blocks * tap_lines());
    std::memset(live_taps, 0, blocks * taps);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t place = Place(keys[n], out_channels);
      if (place < 0) continue;
      const int64_t vector = place / block;
      weights[place] = values[n];
      const int64_t run = vector / line_taps, tap_line = run / in_channels;
      live[vector] = live_runs[run] = live_lines[tap_line] = 1;
      live_taps[tap_line * line_taps + vector % line_taps] = 1;
      finite &= std::isfinite(values[n]);
    }
    TapOffsets(w, tap_offsets);
  }

  // Takes what stands in vectors like these back to the list of weights, 0 at padding.
  void Gather(const int32_t* keys, int64_t count, int64_t out_channels, const float* from,
              float* values) const {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t place = Place(keys[n], out_channels);
      values[n] = place < 0 ? 0.0f : from[place];
    }
  }
};

// totals[group][n] = the sum over parts of sums[group][part][n], in their order.
inline void AddParts(const float* sums, int64_t groups, int64_t parts, int64_t count,
                     float* totals) {
  std::memset(totals, 0, groups * count * sizeof(float));
  for (int64_t group = 0; group < groups; ++group, totals += count) {
    for (int64_t part = 0; part < parts; ++part, sums += count) {
      for (int64_t n = 0; n < count; ++n) totals[n] += sums[n];
    }
  }
}

// The cotangents of kept outputs: keys s32[B, C or 1, K], values T[B, C, K].
template <typename T>
struct KeptCotangents {
  int64_t items, channels, capacity, sites;  // items of one group
  const int32_t* keys;
  const T* values;
  bool shared = false;

  // The gradient of a channel's bias: the sum over a group's kept outputs.
  float Sum(int64_t group, int64_t channel) const {
    float total = 0.0f;
    for (int64_t item = group * items; item < (group + 1) * items; ++item) {
      const int32_t* key = keys + (shared ? item : item * channels + channel) * capacity;
      const T* value = values + (item * channels + channel) * capacity;
      float sum = 0.0f;
      for (int64_t i = 0; i < capacity; ++i) {
        if (key[i] >= 0 && key[i] < sites) sum += static_cast<float>(value[i]);
      }
      total += sum;
    }
    return total;
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_LINES_FILTERS_H_
