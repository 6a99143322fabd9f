// The dense form of a convolution: input lines laid out site by site, and a list of live weights,
// one of which at a time is added along a whole line. Its work follows filled lines x live weights:
// it is the cheaper one where filters are pruned, or the grid is nearly full. Lines without an
// entry are never read.
//
// Its gradient is the same form of the transposed convolution, from the cotangents laid out so.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/simd.h"
#include "xla_kernels/lines/lines.h"

namespace ilajax {

// A weight, and where it reads: so many floats from the first site that its line of taps reads.
struct LiveTap {
  int32_t offset;
  float weight;
  int32_t number;  // in the list of weights
};

// How lines of `channels` are laid out: [line][channel][pitch], with zeros around each.
struct DenseLines {
  int64_t channels = 0, length = 0, before = 0, pitch = 0, vectors = 0;

  DenseLines() = default;
  // As output lines of `line` read them.
  DenseLines(const LineWindow& line, int64_t line_channels)
      : channels(line_channels),
        length(line.input_length),
        before(std::max<int64_t>(line.low, 0)),
        vectors(CeilDiv(line.output_length, kLanes)) {
    const int64_t read = before - line.low + vectors * kLanes + line.extent() - 1;
    pitch = CeilDiv(std::max(before + length, read), kLanes) * kLanes;
  }
  int64_t size() const { return channels * pitch; }  // floats of a line
};

// The live weights, a list for each (channel to sum up for, line of taps).
struct LiveTaps {
  int64_t targets, tap_lines, weights;
  int32_t* starts;  // [targets * tap_lines + 1], and one more while it is being filled
  LiveTap* taps;    // [weights]
  int32_t* lines;   // [tap_lines]: what the offsets along the leading axes make in lines

  LiveTaps(Carver& carver, int64_t target_channels, int64_t lines_of_taps, int64_t weight_count)
      : targets(target_channels),
        tap_lines(lines_of_taps),
        weights(weight_count),
        starts(carver.Take<int32_t>(targets * tap_lines + 2)),
        taps(carver.Take<LiveTap>(weights)),
        lines(carver.Take<int32_t>(tap_lines)) {}
  const int32_t* list(int64_t target) const { return starts + target * tap_lines; }
  int64_t count(int64_t first, int64_t last) const { return *list(last) - *list(first); }

  // With `transposed` targets are input channels, and taps come in reverse, as the gradient has it.
  void Fill(const Lines& of, const DenseLines& dense, const int32_t* tap_offsets,
            const int32_t* keys, const float* values, int64_t in_channels, bool transposed) {
    const int64_t per_line = of.line.taps, per_filter = per_line * tap_lines;
    const auto each = [&](auto&& f) {
      WeightPlace place(in_channels, transposed ? dense.channels : targets, per_filter);
      for (int64_t n = 0; n < weights; ++n) {
        if (!place.MoveTo(keys[n])) continue;
        const int64_t tap = transposed ? per_filter - 1 - place.tap : place.tap;
        const int64_t target = transposed ? place.in : place.out;
        f(target * tap_lines + tap / per_line, transposed ? place.out : place.in, tap % per_line,
          n);
      }
    };
    std::memset(starts, 0, (targets * tap_lines + 2) * sizeof(int32_t));
    each([&](int64_t list, int64_t, int64_t, int64_t) { ++starts[list + 2]; });
    for (int64_t i = 2; i < targets * tap_lines + 2; ++i) starts[i] += starts[i - 1];
    each([&](int64_t list, int64_t channel, int64_t tap, int64_t n) {
      const int64_t offset =
          channel * dense.pitch + dense.before - of.line.low + tap * of.line.dilation;
      taps[starts[list + 1]++] = {static_cast<int32_t>(offset), values[n], static_cast<int32_t>(n)};
    });
    for (int64_t t = 0; t < tap_lines; ++t) {
      lines[t] = 0;
      const int32_t* offsets = tap_offsets + t * per_line * (of.axes + 1);
      for (int a = 0; a < of.axes; ++a) {
        lines[t] = static_cast<int32_t>(lines[t] * of.input_shape[a] + offsets[a]);
      }
    }
  }
};

// Whether cheaper(how many lines of a sample hold entries of any channel, with keys in [begin, end)),
// which more lines only make false: then further channels need no look. Lines are counted by a
// bitmap in `words`; all of them where it does not fit there. `begin` is the first key of a line.
template <typename KeyOf, typename Cheaper>
bool FilledLinesAre(Cheaper&& cheaper, int64_t begin, int64_t end, int64_t length, int64_t channels,
                    int64_t slots, KeyOf&& key_of, uint64_t* words, int64_t word_count) {
  const int64_t lines = CeilDiv(end - begin, length), count = CeilDiv(lines, 64);
  if (count > word_count) return cheaper(lines);
  std::fill_n(words, count, 0);
  const Divider divider(length);
  for (int64_t channel = 0; channel < channels; ++channel) {
    const int32_t* key = key_of(channel);
    const Range range(key, slots, begin, end);
    for (int64_t i = range.first; i < range.last; ++i) {
      if (key[i] < begin || key[i] >= end) continue;
      const int64_t line = divider.Quotient(key[i] - begin);
      words[line / 64] |= uint64_t{1} << (line % 64);
    }
    int64_t filled = 0;
    for (int64_t i = 0; i < count; ++i) filled += __builtin_popcountll(words[i]);
    if (!cheaper(filled)) return false;
  }
  return true;
}

// Some lines of one sample.
struct DenseSlab {
  DenseLines layout;
  float* values = nullptr;
  uint8_t* filled = nullptr;  // [line]: whether it holds an entry; the others are not laid out
  int64_t first_line = 0, lines = 0;
  bool finite = true;

  // Lays out lines [first, first + count). The caller has seen to it that there is room.
  // `key_of(channel)` and `value_of(channel)` give the segments.
  template <typename KeyOf, typename ValueOf>
  void Fill(int64_t first, int64_t count, int64_t slots, KeyOf&& key_of, ValueOf&& value_of) {
    first_line = first, lines = count;
    std::memset(filled, 0, count);
    const int64_t begin = first * layout.length, end = (first + count) * layout.length;
    const Divider divider(layout.length);
    uint32_t largest = 0;
    for (int64_t channel = 0; channel < layout.channels; ++channel) {
      const int32_t* key = key_of(channel);
      const auto* value = value_of(channel);
      float* to = values + channel * layout.pitch + layout.before;
      const Range range(key, slots, begin, end);
      for (int64_t i = range.first; i < range.last; ++i) {
        if (key[i] < begin || key[i] >= end) continue;
        const int64_t line = divider.Quotient(key[i] - begin);
        if (!filled[line]) {
          filled[line] = 1;
          std::memset(values + line * layout.size(), 0, layout.size() * sizeof(float));
        }
        const float x = static_cast<float>(value[i]);
        to[line * layout.size() + key[i] - begin - line * layout.length] += x;
        largest = std::max(largest, FloatBits(x) & 0x7f800000u);
      }
    }
    finite = largest != 0x7f800000u;
  }

  // Where each line of taps reads for the line that `walk` stands at; nullptr where nothing is.
  // Returns whether there is anything.
  bool Reads(const LineWalk& walk, const LiveTaps& taps, const int32_t* tap_offsets, int64_t step,
             const float** bases) const {
    bool any = false;
    for (int64_t t = 0; t < taps.tap_lines; ++t) {
      const int64_t read = walk.Reads(tap_offsets + t * step, taps.lines[t]) - first_line;
      const bool there = read >= 0 && read < lines && filled[read];
      bases[t] = there ? values + read * layout.size() : nullptr;
      any |= there;
    }
    return any;
  }
};

// The window of the gradient of the values, for strides of 1: what each input site's taps reach.
inline Window Transposed(const Window& w) {
  Window t = w;
  std::swap(t.input_sites, t.output_sites);
  for (int a = 0; a < w.rank; ++a) {
    t.input_shape[a] = w.output_shape[a], t.output_shape[a] = w.input_shape[a];
    t.low[a] = (w.window_shape[a] - 1) * w.dilation[a] - w.low[a];
  }
  return t;
}
inline bool HasStrides(const Window& w) {
  return std::any_of(w.strides, w.strides + w.rank, [](int64_t stride) { return stride != 1; });
}

// Whether the dense form of `lines` lines, of which `filled` hold entries, costs less than so many
// percent of the other. The prices are cycles, to a third or so: of a vector of sites for a tap, of
// a tap, of a list; and of the other form, of a vector that an entry adds to, of an entry, and of a
// channel on a line. `python -m benchmarks.dense_form` times both forms against the choice.
struct DenseCost {
  double vector, tap, list, entry_vector, entry, channel_line;

  bool IsCheaper(const DenseLines& dense, int64_t lines, int64_t filled, int64_t targets,
                 int64_t tap_lines, int64_t taps, int64_t entries, int64_t entry_vectors,
                 int64_t percent) const {
    const double along = taps * (dense.vectors * vector + CeilDiv(dense.vectors, 4) * tap);
    const double lists = targets * (tap_lines * list + dense.vectors * kLanes);
    const double other = entries * tap_lines * (entry_vectors * entry_vector + entry) +
                         lines * targets * channel_line;
    // Each filled line is read by every line of taps, from about twice as many lines.
    const int64_t read = std::min(lines, 2 * filled);
    return 100 * (filled * along + read * lists) < percent * other;
  }
};
constexpr DenseCost kDenseForward = {0.6, 1.5, 4.0, 1.2, 4.0, 0.0};
constexpr DenseCost kDenseBackward = {1.2, 3.0, 4.0, 2.5, 6.0, 150.0};

}  // namespace ilajax
