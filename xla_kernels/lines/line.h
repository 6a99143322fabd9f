// What both directions of a convolution share: filters, taps, a line's buffer, and plans.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/tuning.h"
#include "xla_kernels/lines/dense.h"
#include "xla_kernels/lines/lines.h"

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
        live(carver.Take<uint8_t>(blocks, in_channels, taps)),
        live_runs(carver.Take<uint8_t>(blocks, tap_lines(), in_channels)),
        live_lines(carver.Take<uint8_t>(blocks, tap_lines())),
        live_taps(carver.Take<uint8_t>(blocks, taps)),
        tap_offsets(carver.Take<int32_t>(taps, kMaxRank)) {}

  int64_t tap_lines() const { return taps / line_taps; }
  // Floats in `weights`.
  int64_t size() const { return blocks * in_channels * taps * block; }

  // The number of the run of vectors that the taps of a line share.
  int64_t Run(int64_t b, int64_t tap_line, int64_t ic) const {
    return (b * tap_lines() + tap_line) * in_channels + ic;
  }

  // Calls f(n, the run of weight n, its tap in the line, its channel in the block) for those of the
  // weights [begin, end) that are not padding.
  template <typename F>
  void ForWeights(const int32_t* keys, int64_t begin, int64_t end, int64_t out_channels,
                  F&& f) const {
    WeightPlace place(in_channels, out_channels, taps);
    for (int64_t n = begin; n < end; ++n) {
      if (!place.MoveTo(keys[n])) continue;
      const uint32_t tap = static_cast<uint32_t>(place.tap),
                     line = static_cast<uint32_t>(line_taps);
      const uint32_t out = static_cast<uint32_t>(place.out), width = static_cast<uint32_t>(block);
      f(n, Run(out / width, tap / line, place.in), tap % line, out % width);
    }
  }

  void Fill(const Window& w, int64_t count, int64_t out_channels, const int32_t* keys,
            const float* values) {
    std::memset(weights, 0, size() * sizeof(float));
    std::memset(live, 0, blocks * in_channels * taps);
    std::memset(live_runs, 0, blocks * tap_lines() * in_channels);
    std::memset(live_lines, 0, blocks * tap_lines());
    std::memset(live_taps, 0, blocks * taps);
    ForWeights(keys, 0, count, out_channels, [&](int64_t n, int64_t run, int64_t tap, int64_t j) {
      const int64_t vector = run * line_taps + tap, line = run / in_channels;
      weights[vector * block + j] = values[n];
      live[vector] = live_runs[run] = live_lines[line] = 1;
      live_taps[line * line_taps + tap] = 1;
      finite &= std::isfinite(values[n]);
    });
    TapOffsets(w, tap_offsets);
  }
};

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

// The stored entries of the input: keys s32[B, Cin or 1, K], values T[B, Cin, K].
template <typename T>
struct StoredInput {
  const ConvShape& s;
  const int32_t* keys;
  const T* values;

  const int32_t* Keys(int64_t item, int64_t ic) const { return keys + s.KeyOffset(item, ic); }
  const T* Values(int64_t item, int64_t ic) const {
    return values + (item * s.in_channels + ic) * s.slots;
  }
  // Entries of channels [ic_begin, ic_end) with keys in [begin, end).
  int64_t Count(int64_t item, int64_t ic_begin, int64_t ic_end, int64_t begin, int64_t end) const {
    int64_t count = 0;
    for (int64_t ic = ic_begin; ic < ic_end; ++ic) {
      const Range range(Keys(item, ic), s.slots, begin, end);
      count += range.last - range.first;
    }
    return count;
  }
  // See dense.h; `scratch` is that of `entries` sorted entries, 16 bytes each.
  template <typename Cheaper>
  bool FilledLinesAre(Cheaper&& cheaper, int64_t item, int64_t begin, int64_t end, int64_t length,
                      float* scratch, int64_t entries) const {
    return ilajax::FilledLinesAre(
        cheaper, begin, end, length, s.shared() ? 1 : s.in_channels, s.slots,
        [&](int64_t ic) { return Keys(item, ic); }, reinterpret_cast<uint64_t*>(scratch),
        2 * entries);
  }
};

// What an output line reads through one line of taps.
struct Segment {
  int32_t begin, end;    // entries or sites, see LineEntries
  const float* weights;  // [ic][tap][channel of the block]
  const uint8_t* live;   // [ic]
  bool all_live;
};

// The weights of all segments, and where their gradients go.
struct GradientWeights {
  const float* weights;     // Filters::weights
  const float* transposed;  // see GradientTables; nullptr: there are none
  float* bars;              // as the weights
};

// A line of taps that has live weights in a block of output channels.
struct TapLine {
  const int32_t* offsets;  // along the leading axes
  int64_t lines;           // what they make in input lines
  const float* weights;    // as in Segment
  const uint8_t* live;
  const uint8_t* live_taps;  // [tap]: in any input channel
  bool all_live;             // each input channel has a weight
  bool all_taps;             // and each tap
};

// Where a block of output channels stages its responses.
struct Candidates {
  const float* bias;
  int32_t* length;  // entries staged so far
  float* least;     // what a rank must not be less than; NaN: anything will do
  int32_t* counts;  // candidates seen
  uint64_t* stage;  // [channel][size]
  int64_t size;
  float floor;        // what a value has to exceed; NaN: nothing
  int32_t rank_mask;  // the bits of a value that rank it
};

// The lines of taps, a list for each block of output channels.
struct TapLines {
  int64_t blocks, most;
  TapLine* list;    // [block][most]
  int64_t* counts;  // [block]

  TapLines(Carver& carver, int64_t channel_blocks, int64_t lines_of_taps)
      : blocks(channel_blocks),
        most(lines_of_taps),
        list(carver.Take<TapLine>(blocks, most)),
        counts(carver.Take<int64_t>(blocks)) {}
  const TapLine* begin(int64_t block) const { return list + block * most; }
  const TapLine* end(int64_t block) const { return begin(block) + counts[block]; }

  void Fill(const Lines& lines, const Filters& filters) {
    for (int64_t block = 0; block < blocks; ++block) {
      counts[block] = 0;
      for (int64_t t = 0; t < most; ++t) {
        if (!filters.live_lines[block * most + t]) continue;
        const int32_t* offsets = filters.tap_offsets + t * lines.line.taps * (lines.axes + 1);
        const int64_t run = filters.Run(block, t, 0);
        TapLine& tap_line = list[block * most + counts[block]++];
        tap_line = {
            offsets,
            0,
            filters.weights + run * lines.line.taps * filters.block,
            filters.live_runs + run,
            filters.live_taps + (block * most + t) * lines.line.taps,
            std::all_of(filters.live_runs + run, filters.live_runs + run + filters.in_channels,
                        [](uint8_t live) { return live != 0; }),
            std::all_of(filters.live_taps + (block * most + t) * lines.line.taps,
                        filters.live_taps + (block * most + t + 1) * lines.line.taps,
                        [](uint8_t live) { return live != 0; })};
        for (int a = 0; a < lines.axes; ++a) {
          tap_line.lines = tap_line.lines * lines.input_shape[a] + offsets[a];
        }
      }
    }
  }
};

// The buffer of one output line, or of a piece of it: values [site][channel of the block], and a
// bit for each site that may have some.
struct LineBuffer {
  int64_t sites, block;  // of the plan
  bool plain;            // stride 1, and with what taps reach past the ends
  int64_t piece;         // output sites that it takes at once
  float* data = nullptr;
  uint64_t* bits = nullptr;

  // Without memory.
  LineBuffer(const LineWindow& line, int64_t line_sites, int64_t channel_block)
      : sites(line_sites),
        block(channel_block),
        plain(line.stride == 1 && line.output_length + line.before() + line.after() <= sites),
        piece(plain ? line.output_length : std::min(line.output_length, sites)) {}
  LineBuffer(Carver& carver, const LineWindow& line, int64_t line_sites, int64_t channel_block)
      : LineBuffer(line, line_sites, channel_block) {
    data = carver.Take<float>(sites, block);
    bits = carver.Take<uint64_t>(words());
  }

  int64_t words() const { return CeilDiv(piece, 64); }
  void Clear() const {
    std::memset(data, 0, sites * block * sizeof(float));
    std::memset(bits, 0, words() * sizeof(uint64_t));
  }
  // The place of the first output site.
  float* first(const LineWindow& line) const { return first(line, data); }
  float* first(const LineWindow& line, float* of) const {
    return of + (plain ? line.before() * block : 0);
  }
  // Where place 0 of an input line goes through tap 0, where the buffer is plain.
  float* origin(const LineWindow& line) const { return data + (line.before() + line.low) * block; }
};

// The width of a block of output channels: a multiple of 8, up to 32.
inline int64_t BlockOf(int64_t out_channels) {
  const int64_t blocks = CeilDiv(out_channels, 32);
  return CeilDiv(CeilDiv(out_channels, blocks), kLanes) * kLanes;
}
inline bool IsBlock(int64_t channels) {
  return channels % kLanes == 0 && channels >= 8 && channels <= 32;
}

// Sites of a line's buffer: a whole line, with what taps reach past its ends, if the cache holds
// it.
inline int64_t LineSites(const LineWindow& line, int64_t block, const Tuning& tuning) {
  const int64_t most = std::max<int64_t>(1, tuning.line_bytes / (block * sizeof(float)));
  const int64_t around = line.stride == 1 ? line.before() + line.after() : 0;
  const int64_t whole = line.output_length + around;
  return whole <= most ? whole : std::min(line.output_length, most);
}

// Entries that are sorted at once: those of a few planes if they are spread over the grid.
inline int64_t EntriesAtOnce(const Lines& lines, const ConvShape& s, int64_t budget,
                             const Tuning& tuning) {
  if (tuning.entries > 0) return tuning.entries;
  const int64_t few_planes =
      s.in_channels * CeilDiv(s.slots, lines.input_planes) * 4 * lines.extent;
  return std::min(s.in_channels * s.slots,
                  std::max<int64_t>(1 << 17, std::min(few_planes, budget / 64)));
}

// Of `planes` output planes of `lines`, how many read no more input lines than can be laid out
// densely at once; 0: the dense form is not to be used. Only plain lines have one, and where
// entries are rare it never is the cheaper.
inline int64_t DensePlanes(const ConvShape& s, const Lines& lines, const DenseLines& dense,
                           const LineBuffer& buffer, int64_t planes, int64_t live_tap_bytes,
                           int64_t budget, const Tuning& tuning) {
  if (!buffer.plain || s.slots * tuning.dense_share < s.w.input_sites) return 0;
  if (live_tap_bytes > budget / 16) return 0;
  const int64_t fit = tuning.dense_bytes / static_cast<int64_t>(sizeof(float)) / dense.size();
  if (lines.InputLines(planes) <= fit) return planes;
  const int64_t steps = fit / lines.input_plane_lines - lines.extent;
  return steps < 0 ? 0 : std::min(planes, steps / lines.plane_stride + 1);
}

// Into how many parts the output planes go, to make a few tasks for every thread.
inline int64_t PartsOf(int64_t planes, int64_t tasks, const Tuning& tuning) {
  if (tasks >= tuning.tasks / 2) return 1;
  return std::min(CeilDiv(tuning.tasks, std::max<int64_t>(tasks, 1)), planes);
}

}  // namespace ilajax
