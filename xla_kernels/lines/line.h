// What both directions of a convolution know of a line: its entries, its taps and its buffer.

#ifndef ILAJAX_XLA_KERNELS_LINES_LINE_H_
#define ILAJAX_XLA_KERNELS_LINES_LINE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/lines/dense.h"
#include "xla_kernels/lines/filters.h"
#include "xla_kernels/lines/lines.h"

namespace ilajax {

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
  int64_t FilledLines(int64_t item, int64_t begin, int64_t end, int64_t length, float* scratch,
                      int64_t entries) const {
    return ilajax::FilledLines(
        begin, end, length, s.shared() ? 1 : s.in_channels, s.slots,
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
        list(carver.Take<TapLine>(blocks * most)),
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

// The buffer of one output line, or of a piece of it: values [site][channel of the block], and a bit
// for each site that may have some.
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
    data = carver.Take<float>(sites * block);
    bits = carver.Take<uint64_t>(words());
  }

  int64_t words() const { return CeilDiv(piece, 64); }
  void Clear() const {
    std::memset(data, 0, sites * block * sizeof(float));
    std::memset(bits, 0, words() * sizeof(uint64_t));
  }
  // The place of the first output site.
  float* first(const LineWindow& line) const { return data + (plain ? line.before() * block : 0); }
  // Where place 0 of an input line goes through tap 0, where the buffer is plain.
  float* origin(const LineWindow& line) const { return data + (line.before() + line.low) * block; }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_LINES_LINE_H_
