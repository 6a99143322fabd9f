// A grid seen as lines along its last axis, and a sample's stored entries sorted into its lines.
//
// All output sites of a line read the same input lines: one for each line of taps, the taps that
// differ along the last axis only. So a convolution goes from output line to output line, with a
// small buffer for one, and visits a handful of contiguous lists of entries.

#pragma once

#include <algorithm>
#include <cstring>

#include "xla_kernels/common/window.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {

// The window without axes of one site that no tap moves along, so that lines are as long as can be.
inline Window Squeeze(const Window& w) {
  Window squeezed = w;
  squeezed.rank = 0;
  for (int a = 0; a < w.rank; ++a) {
    const bool idle =
        w.input_shape[a] == 1 && w.window_shape[a] == 1 && w.low[a] == 0 && w.output_shape[a] == 1;
    if (idle && squeezed.rank + w.rank - a > 1) continue;
    const int to = squeezed.rank++;
    squeezed.input_shape[to] = w.input_shape[a];
    squeezed.window_shape[to] = w.window_shape[a];
    squeezed.strides[to] = w.strides[a];
    squeezed.dilation[to] = w.dilation[a];
    squeezed.low[to] = w.low[a];
    squeezed.output_shape[to] = w.output_shape[a];
    squeezed.input_dilation[to] = w.input_dilation[a];
  }
  return squeezed;
}

// The window along the last axis: tap t of output site o reads o * stride + t * dilation - low.
struct LineWindow {
  int64_t input_length, output_length, taps, stride, dilation, low;

  int64_t extent() const { return (taps - 1) * dilation + 1; }
  // How far entries reach past the ends of the output line, with a stride of 1.
  int64_t before() const { return std::max<int64_t>(extent() - 1 - low, 0); }
  int64_t after() const { return std::max<int64_t>(input_length + low - output_length, 0); }
};

// Where an entry goes through a tap, counted from output site `begin`; -1 outside [begin, end).
inline int64_t SiteReached(const LineWindow& line, int64_t place, int64_t tap, int64_t begin,
                           int64_t end) {
  int64_t p = place + line.low - tap * line.dilation;
  if (line.stride != 1) {
    if (p % line.stride != 0) return -1;
    p /= line.stride;
  }
  return p >= begin && p < end ? p - begin : -1;
}

struct Lines {
  LineWindow line;
  int axes;  // the leading ones
  int64_t input_shape[kMaxRank], output_shape[kMaxRank], strides[kMaxRank], low[kMaxRank];
  int64_t extents[kMaxRank];
  int64_t planes, input_planes;                    // of the leading axis; 1 where there is none
  int64_t plane_lines = 1, input_plane_lines = 1;  // lines of a plane
  int64_t plane_stride = 1, plane_low = 0, extent = 1;  // along the leading axis
  int64_t tap_lines;

  explicit Lines(const Window& w)
      : line{w.input_shape[w.rank - 1], w.output_shape[w.rank - 1], w.window_shape[w.rank - 1],
             w.strides[w.rank - 1],     w.dilation[w.rank - 1],     w.low[w.rank - 1]},
        axes(w.rank - 1),
        planes(axes > 0 ? w.output_shape[0] : 1),
        input_planes(axes > 0 ? w.input_shape[0] : 1),
        tap_lines(w.taps / line.taps) {
    for (int a = 0; a < axes; ++a) {
      input_shape[a] = w.input_shape[a], output_shape[a] = w.output_shape[a];
      strides[a] = w.strides[a], low[a] = w.low[a];
      extents[a] = (w.window_shape[a] - 1) * w.dilation[a] + 1;
      if (a == 0) continue;
      plane_lines *= w.output_shape[a], input_plane_lines *= w.input_shape[a];
    }
    if (axes > 0) plane_stride = w.strides[0], plane_low = w.low[0], extent = w.extent();
  }

  int64_t input_sites() const { return input_planes * input_plane_lines * line.input_length; }
  // Input lines that `output_planes` planes read, at most.
  int64_t InputLines(int64_t output_planes) const {
    return std::min((output_planes - 1) * plane_stride + extent, input_planes) * input_plane_lines;
  }
  // The input planes that output planes [begin, end) read.
  void InputPlanes(int64_t begin, int64_t end, int64_t& first, int64_t& last) const {
    first = std::clamp<int64_t>(begin * plane_stride - plane_low, 0, input_planes);
    last = std::clamp<int64_t>((end - 1) * plane_stride - plane_low + extent, first, input_planes);
  }
  // The output planes that read input planes [begin, end).
  void OutputPlanes(int64_t begin, int64_t end, int64_t& first, int64_t& last) const {
    const int64_t lowest = begin + plane_low - extent + 1, highest = end - 1 + plane_low;
    first = std::clamp<int64_t>(lowest <= 0 ? 0 : CeilDiv(lowest, plane_stride), 0, planes);
    last = std::clamp<int64_t>(highest < 0 ? 0 : highest / plane_stride + 1, first, planes);
  }
};

// A walk over output lines, which knows where each stands along the leading axes.
class LineWalk {
 public:
  LineWalk(const Lines& lines, int64_t output_line) : lines_(lines) {
    for (int a = lines.axes - 1; a >= 0; --a) {
      place_[a] = output_line % lines.output_shape[a];
      output_line /= lines.output_shape[a];
    }
    Turn();
  }

  void Next() {
    for (int a = lines_.axes - 1; a >= 0 && ++place_[a] == lines_.output_shape[a]; --a) {
      place_[a] = 0;
    }
    Turn();
  }

  // The input line that a line of taps reads, -1 outside the grid. `offsets` are its offsets along
  // the leading axes, and `lines` what they make in lines.
  int64_t Reads(const int32_t* offsets, int64_t lines) const {
    bool inside = true;
    for (int a = 0; a < lines_.axes && !whole_; ++a) {
      inside &= static_cast<uint64_t>(base_[a] + offsets[a]) <
                static_cast<uint64_t>(lines_.input_shape[a]);
    }
    return inside ? first_ + lines : -1;
  }

 private:
  void Turn() {
    first_ = 0, whole_ = true;
    for (int a = 0; a < lines_.axes; ++a) {
      base_[a] = place_[a] * lines_.strides[a] - lines_.low[a];
      whole_ &= base_[a] >= 0 && base_[a] + lines_.extents[a] <= lines_.input_shape[a];
      first_ = first_ * lines_.input_shape[a] + base_[a];
    }
  }

  const Lines& lines_;
  int64_t place_[kMaxRank], base_[kMaxRank];
  int64_t first_ = 0;   // the line at `base_`, as if the grid had no end
  bool whole_ = false;  // all of the window is inside the grid
};

// The slots of a segment whose keys lie in [begin, end): of broken keys some slots of the segment.
struct Range {
  int64_t first, last;
  Range(const int32_t* keys, int64_t slots, int64_t begin, int64_t end) {
    first = std::lower_bound(keys, keys + slots, begin) - keys;
    last = std::lower_bound(keys + first, keys + slots, end) - keys;
  }
};

// Which entries of one sample to sort: those of channels [channel_begin, channel_end) with keys in
// [begin, end), which lie in `lines` lines of `length` sites from `first_line`.
struct SortRange {
  int64_t first_line, lines, length, slots, begin, end, channel_begin, channel_end;
  int64_t count;  // of the entries; of broken keys fewer may be
  bool shared;    // the channels have one list of keys
};

// A stored entry, sorted into its line.
struct Entry {
  int32_t place;    // along the line
  int32_t channel;  // of the input
  float value;
  union {
    int32_t weights;  // forward: where the channel's weights stand among those of a line of taps
    float bar;        // backward: the gradient of the value
  };
};

// What some lines of one sample store, in one of two forms:
//
//   entries   [line][channel][place]
//   stacks    where many channels are stored at a site: values [site][channel], then the sites'
//             places, and backward the values' gradients [site][channel]
//
// There are four floats for each entry, with gradients six. Stacks are made wherever they fit there:
// if a site stores a quarter of its channels or somewhat more, with gradients a third.
struct LineEntries {
  int64_t words = 0;      // of the bitmap; 0: there is none, and no stacks
  bool gradient = false;  // stacks have gradients
  int64_t first_line = 0, lines = 0, length = 0, channels = 0, sites = 0;
  bool stacked = false;
  bool finite = true;         // all values are
  int32_t* starts = nullptr;  // [most lines + 2]: of lines, in entries or sites
  uint64_t* bits = nullptr;   // [words]: the sites in use
  int32_t* ranks = nullptr;   // [words]: sites in use before the word's
  float* data = nullptr;

  LineEntries() = default;
  // Of at most so many lines and entries.
  LineEntries(Carver& carver, int64_t max_lines, int64_t line_length, bool has_stacks,
              int64_t max_entries, bool has_gradient)
      : words(has_stacks ? max_lines * line_length / 64 + 2 : 0),
        gradient(has_gradient),
        starts(carver.Take<int32_t>(max_lines + 2)),
        bits(carver.Take<uint64_t>(words)),
        ranks(carver.Take<int32_t>(words)),
        data(carver.Take<float>(max_entries, (gradient ? 6 : 4))) {}

  // Whether stacks of so many entries have room.
  bool CanStack(int64_t entries) const {
    return gradient ? sites * (2 * channels + 1) <= 6 * entries
                    : sites * (channels + 1) <= 4 * entries;
  }

  bool Holds(int64_t line) const { return line >= first_line && line < first_line + lines; }
  int32_t begin(int64_t line) const { return starts[line - first_line]; }
  int32_t end(int64_t line) const { return starts[line - first_line + 1]; }

  Entry* entries(int64_t i) const { return reinterpret_cast<Entry*>(data) + i; }
  float* stack(int64_t site) const { return data + site * channels; }
  int32_t* places(int64_t site) const {
    return reinterpret_cast<int32_t*>(data + sites * channels) + site;
  }
  float* bars(int64_t site) const { return data + sites * (channels + 1) + site * channels; }

  // to |= the bitmap of a line.
  void MarkLine(int64_t line, uint64_t* to) const {
    const int64_t first = (line - first_line) * length, shift = first & 63;
    const uint64_t* from = bits + first / 64;
    for (int64_t at = 0; at < length; at += 64, ++from) {
      uint64_t word = *from >> shift;
      if (shift != 0) word |= from[1] << (64 - shift);
      if (length - at < 64) word &= (uint64_t{1} << (length - at)) - 1;
      to[at / 64] |= word;
    }
  }
};

}  // namespace ilajax
