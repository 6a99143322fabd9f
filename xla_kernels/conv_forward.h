// The forward pass of conv.cc.

#ifndef ILAJAX_XLA_KERNELS_CONV_FORWARD_H_
#define ILAJAX_XLA_KERNELS_CONV_FORWARD_H_

#include <algorithm>
#include <cstdint>

#include "xla_kernels/common/selection.h"
#include "xla_kernels/conv.h"
#include "xla_kernels/conv_line.h"

namespace ilajax {

struct ForwardPlan {
  int64_t block, line_sites, max_rows, dense_rows, room, stage, parts, workers;
};

template <typename T>
struct ForwardWorker {
  LineBuffer line;
  LineEntries entries;
  Segment* segments = nullptr;
  uint64_t* read_bits = nullptr;  // sites that an output line reads, see Dilate; zero between lines
  RunningTopK<T>* best = nullptr;
  int32_t* digits = nullptr;      // their counts, where there is one part
  const float** bases = nullptr;  // [line of taps]: what the dense form reads
  Candidates candidates = {};
  int64_t free_stage = 0;  // room that each stage has at least

  void Carve(Carver& carver, const Lines& lines, const ForwardPlan& plan) {
    line.Carve(carver);
    entries.Carve(carver);
    segments = carver.Take<Segment>(lines.tap_lines);
    read_bits = carver.Take<uint64_t>((lines.line.taps + 1) * entries.words);
    bases = carver.Take<const float*>(lines.tap_lines);
    best = carver.Take<RunningTopK<T>>(plan.block);
    digits = carver.Take<int32_t>(plan.parts == 1 ? plan.block * kDigits : 0);
    candidates.length = carver.Take<int32_t>(plan.block);
    candidates.least = carver.Take<float>(plan.block);
    candidates.counts = carver.Take<int32_t>(plan.block);
    candidates.stage = carver.Take<uint64_t>(plan.block * plan.stage);
    candidates.room = plan.stage;
  }
};

// What one part of the rows keeps of each segment, where there are several: [segment][part].
template <typename T>
struct PartSelections {
  int64_t parts = 1, capacity = 0, segments = 0;
  int32_t* keys = nullptr;  // [segment][part][capacity]
  T* values = nullptr;
  int32_t* stored = nullptr;  // [segment][part]
  int32_t* counts = nullptr;  // candidates
  int32_t* digits = nullptr;  // [segment]: all parts' candidates by the first digit of their rank

  void Carve(Carver& carver) {
    if (parts == 1) return;
    keys = carver.Take<int32_t>(segments * parts * capacity);
    values = carver.Take<T>(segments * parts * capacity);
    stored = carver.Take<int32_t>(segments * parts);
    counts = carver.Take<int32_t>(segments * parts);
    digits = carver.Take<int32_t>(segments * kDigits);
  }

  // Puts the best of all parts into the output, and returns the number of candidates.
  int32_t Merge(int64_t segment, Select select, int64_t wanted, int64_t padding, int32_t* out_keys,
                T* out_values) const {
    int64_t count = 0;
    int32_t candidates = 0;
    for (int64_t part = segment * parts; part < (segment + 1) * parts; ++part) {
      count += stored[part];
      candidates += counts[part];
    }
    auto rank = [&](int64_t i) { return RankBits(static_cast<float>(values[i]), select); };
    const RankCut cut(
        count, wanted,
        [&](auto&& f) {
          for (int64_t part = segment * parts; part < (segment + 1) * parts; ++part) {
            for (int64_t i = 0; i < stored[part]; ++i) f(rank(part * capacity + i));
          }
        },
        digits + segment * kDigits);
    int64_t kept = 0, ties = cut.ties;
    for (int64_t part = segment * parts; part < (segment + 1) * parts; ++part) {
      const int64_t first = part * capacity;
      if (count <= wanted) {
        std::copy_n(keys + first, stored[part], out_keys + kept);
        std::copy_n(values + first, stored[part], out_values + kept);
        kept += stored[part];
        continue;
      }
      for (int64_t i = first; i < first + stored[part] && kept < wanted; ++i) {
        const bool keep = cut.Keeps(rank(i), ties);
        out_keys[kept] = keys[i];
        out_values[kept] = values[i];
        kept += keep;
      }
    }
    std::fill(out_keys + kept, out_keys + wanted, static_cast<int32_t>(padding));
    std::fill(out_values + kept, out_values + wanted, T(0.0f));
    return candidates;
  }
};

template <typename T>
struct Forward {
  const ConvShape& s;
  const Lines& lines;
  const Filters& filters;
  const TapLines& tap_lines;
  const DenseLines& dense_lines;
  const LiveTaps& live_taps;
  const ForwardPlan& plan;
  Select select;
  int64_t output_sites;
  const int32_t* keys;
  const T* values;
  const float* bias;  // [blocks * block]
  int32_t* out_keys;
  T* out_values;
  int32_t* responses;
  const PartSelections<T>& selections;

  const int32_t* KeysOf(int64_t item, int64_t ic) const { return keys + s.KeyOffset(item, ic); }
  const T* ValuesOf(int64_t item, int64_t ic) const {
    return values + (item * s.in_channels + ic) * s.slots;
  }

  // Where the weights of an input channel stand among those of a line of taps.
  int64_t WeightsOf(int64_t ic) const { return ic * lines.line.taps * plan.block; }

  template <typename Loops, int kOctets>
  void Run(int64_t item, int64_t block, int64_t part, ForwardWorker<T>& worker) const {
    const int64_t first = block * plan.block;
    const int64_t channels = std::min(plan.block, s.out_channels - first);
    Candidates& c = worker.candidates;
    c.bias = bias + first;
    c.floor = select == Select::kPositive ? 0.0f : __builtin_nanf("");
    c.rank_mask = select == Select::kMagnitude ? 0x7fffffff : -1;
    for (int64_t j = 0; j < plan.block; ++j) {
      c.length[j] = c.counts[j] = 0;
      c.least[j] = __builtin_nanf("");
      if (j >= channels) continue;
      const int64_t segment = item * s.out_channels + first + j, list = segment * plan.parts + part;
      const bool whole = plan.parts == 1;
      worker.best[j] = RunningTopK<T>(
          select, whole ? s.capacity : selections.capacity,
          whole ? out_keys + segment * s.capacity : selections.keys + list * selections.capacity,
          whole ? out_values + segment * s.capacity
                : selections.values + list * selections.capacity,
          plan.stage, c.stage + j * plan.stage,
          whole ? worker.digits + j * kDigits : selections.digits + segment * kDigits, !whole,
          s.capacity);
    }
    const int64_t last = (part + 1) * lines.rows / plan.parts;
    const bool dense = DensePays(item, first, channels);
    for (int64_t row = part * lines.rows / plan.parts; row < last;) {
      int64_t rows = std::min(dense ? plan.dense_rows : plan.max_rows, last - row);
      if (dense && RunDense<Loops, kOctets>(item, block, row, rows, worker)) {
        row += rows;
        continue;
      }
      if (SortSlab<Loops>(item, row, rows, worker)) {
        LineWalk walk(lines, row * lines.row_lines);
        for (int64_t line = row * lines.row_lines; line < (row + rows) * lines.row_lines; ++line) {
          RunLine<Loops, kOctets>(item, block, line, walk, worker);
          walk.Next();
        }
      }
      row += rows;
    }
    for (int64_t j = 0; j < channels; ++j) {
      const int64_t segment = item * s.out_channels + first + j, list = segment * plan.parts + part;
      const int64_t stored = worker.best[j].Close(c.length[j]);
      if (plan.parts == 1) {
        worker.best[j].Finish(output_sites);
        responses[segment] = c.counts[j];
      } else {
        selections.stored[list] = static_cast<int32_t>(stored);
        selections.counts[list] = c.counts[j];
      }
    }
  }

  bool DensePays(int64_t item, int64_t first, int64_t channels) const {
    if (plan.dense_rows == 0 || !filters.finite) return false;
    int64_t entries = 0;
    for (int64_t ic = 0; ic < s.in_channels; ++ic) {
      const Range range(KeysOf(item, ic), s.slots, 0, lines.input_sites());
      entries += range.last - range.first;
    }
    return kDenseForward.Pays(dense_lines, lines.rows * lines.row_lines, channels, lines.tap_lines,
                              live_taps.count(first, first + channels), entries,
                              lines.line.taps * plan.block / kLanes);
  }

  // The dense form for output rows [row, row + rows); false where a value is not finite.
  template <typename Loops, int kOctets>
  bool RunDense(int64_t item, int64_t block, int64_t row, int64_t rows,
                ForwardWorker<T>& worker) const {
    const int64_t length = lines.line.output_length, first = block * plan.block;
    const int64_t channels = std::min(plan.block, s.out_channels - first);
    int64_t begin, end;
    lines.InputRows(row, row + rows, begin, end);
    DenseSlab slab = {dense_lines, 0, 0, reinterpret_cast<float*>(worker.entries.entries)};
    slab.Fill(
        begin * lines.input_row_lines, (end - begin) * lines.input_row_lines, s.slots,
        [&](int64_t ic) { return KeysOf(item, ic); },
        [&](int64_t ic) { return ValuesOf(item, ic); });
    if (!slab.finite) return false;
    LineWalk walk(lines, row * lines.row_lines);
    for (int64_t line = row * lines.row_lines; line < (row + rows) * lines.row_lines; ++line) {
      slab.Reads(walk, live_taps, filters.tap_offsets, lines.line.taps * (lines.axes + 1),
                 worker.bases);
      walk.Next();
      Loops::template kRespondAlong<kOctets>(live_taps.taps, live_taps.list(first), channels,
                                             lines.tap_lines, worker.bases, length,
                                             worker.line.first(lines.line));
      for (int64_t i = 0; i < length; i += 64) {
        worker.line.bits[i / 64] = ~uint64_t{0} >> std::max<int64_t>(64 - (length - i), 0);
      }
      TakeResponses<Loops, kOctets>(block, line * length, length, worker);
    }
    return true;
  }

  // Sorts the input lines of as many of `rows` output rows from `row` as there is room for, and
  // sets `rows` to that. Lines that go in pieces, and a row that alone has too many entries, stay
  // unsorted. Returns whether there are any entries.
  template <typename Loops>
  bool SortSlab(int64_t item, int64_t row, int64_t& rows, ForwardWorker<T>& worker) const {
    LineEntries& entries = worker.entries;
    const int64_t length = lines.line.input_length;
    for (;; rows = CeilDiv(rows, 2)) {
      int64_t first, last, count = 0;
      lines.InputRows(row, row + rows, first, last);
      first *= lines.input_row_lines, last *= lines.input_row_lines;
      for (int64_t ic = 0; ic < s.in_channels; ++ic) {
        const Range range(KeysOf(item, ic), s.slots, first * length, last * length);
        count += range.last - range.first;
      }
      if (count > entries.room && rows > 1) continue;
      entries.lines = 0;
      if (count <= entries.room && worker.line.piece == lines.line.output_length) {
        const auto sort = [&](bool rows) {
          Loops::Sort(
              first, last - first, length, s.slots, first * length, last * length, 0, s.in_channels,
              rows, [&](int64_t ic) { return KeysOf(item, ic); },
              [&](int64_t ic) { return ValuesOf(item, ic); },
              [&](int64_t ic, int64_t) { return WeightsOf(ic); }, entries);
        };
        const bool rows = worker.line.plain && filters.finite && s.in_channels > 1;
        sort(rows);
        // The careful loops take entries.
        if (rows && !entries.finite) sort(false);
      }
      return count > 0;
    }
  }

  template <typename Loops, int kOctets>
  void RunLine(int64_t item, int64_t block, int64_t line, const LineWalk& walk,
               ForwardWorker<T>& worker) const {
    const LineBuffer& buffer = worker.line;
    const bool sorted = worker.entries.lines > 0;
    const bool plain = buffer.plain && filters.finite && worker.entries.finite;
    uint64_t* read_bits = worker.read_bits;
    const int64_t words = worker.entries.words;
    for (int64_t begin = 0; begin < lines.line.output_length; begin += buffer.piece) {
      const int64_t end = std::min(begin + buffer.piece, lines.line.output_length);
      bool any = false;
      Segment* segment = worker.segments;
      for (const TapLine* t = tap_lines.begin(block); t != tap_lines.end(block); ++t) {
        const int64_t read = walk.Reads(t->offsets, t->lines);
        if (read < 0) continue;
        *segment = {nullptr, nullptr, t->weights, t->live, t->all_live, 0};
        if (!sorted) {
          any |= AddUnsorted<Loops, kOctets>(item, read, begin, end, *segment, buffer);
          continue;
        }
        segment->begin = worker.entries.begin(read);
        segment->end = worker.entries.end(read);
        if (segment->begin == segment->end) continue;
        segment->row_sites = worker.entries.rows_of(read);
        if (plain) {
          const uint64_t* bitmap = worker.entries.bitmap(read);
          const auto mark = [&](uint64_t* to) {
            for (int64_t i = 0; i < words; ++i) to[i] |= bitmap[i];
          };
          if (t->all_taps) {
            mark(read_bits + lines.line.taps * words);
          } else {
            for (int64_t tap = 0; tap < lines.line.taps; ++tap) {
              if (t->live_taps[tap]) mark(read_bits + tap * words);
            }
          }
        }
        ++segment;
      }
      if (segment != worker.segments) {
        any = true;
        if (plain) {
          AddPlain<Loops, kOctets>(worker.segments, segment, buffer);
          Loops::kDilate(lines.line, read_bits, buffer.bits);
        } else {
          Loops::template kAddCarefully<kOctets>(worker.segments, segment, lines.line, begin, end,
                                                 buffer.first(lines.line), buffer.bits);
        }
      }
      if (!any) continue;
      TakeResponses<Loops, kOctets>(block, line * lines.line.output_length + begin, end - begin,
                                    worker);
    }
  }

  // Takes the responses of marked sites off the line's buffer.
  template <typename Loops, int kOctets>
  void TakeResponses(int64_t block, int64_t first_key, int64_t sites,
                     ForwardWorker<T>& worker) const {
    MakeRoom(sites, std::min(plan.block, s.out_channels - block * plan.block), worker);
    Loops::template kTakeResponses<kOctets, T>(worker.line.bits, CeilDiv(sites, 64),
                                               worker.line.first(lines.line), first_key,
                                               worker.candidates);
  }

  template <typename Loops, int kOctets>
  void AddPlain(const Segment* segment, const Segment* last, const LineBuffer& buffer) const {
    const int64_t taps = lines.line.taps, step = lines.line.dilation * plan.block;
    float* origin = buffer.origin(lines.line);
    if (taps == 3) {
      return Loops::template kAddPlain<kOctets, 3>(segment, last, s.in_channels, origin, step, 0,
                                                   taps);
    }
    for (int64_t t = 0; t < taps; ++t) {
      Loops::template kAddPlain<kOctets, 1>(segment, last, s.in_channels, origin - t * step, step,
                                            t, taps);
    }
  }

  // Adds an input line whose entries have not been sorted, straight from the channels' segments.
  // Returns whether there were any.
  template <typename Loops, int kOctets>
  bool AddUnsorted(int64_t item, int64_t read, int64_t begin, int64_t end, Segment segment,
                   const LineBuffer& buffer) const {
    constexpr int64_t kAtOnce = 64;
    const LineWindow& line = lines.line;
    const int64_t low = begin * line.stride - line.low;
    const int64_t high = (end - 1) * line.stride - line.low + line.extent();
    const int64_t base = read * line.input_length;
    const int64_t first = base + std::clamp<int64_t>(low, 0, line.input_length);
    const int64_t last = base + std::clamp<int64_t>(high, 0, line.input_length);
    bool any = false;
    for (int64_t ic = 0; ic < s.in_channels; ++ic) {
      const int32_t* key = KeysOf(item, ic);
      const Range range(key, s.slots, first, last);
      Entry entries[kAtOnce];
      for (int64_t i = range.first; i < range.last;) {
        int64_t count = 0;
        for (; i < range.last && count < kAtOnce; ++i) {
          if (key[i] < first || key[i] >= last) continue;
          entries[count++] = {static_cast<int32_t>(key[i] - base), static_cast<int32_t>(ic),
                              static_cast<float>(ValuesOf(item, ic)[i]),
                              static_cast<int32_t>(WeightsOf(ic))};
        }
        segment.begin = entries, segment.end = entries + count;
        Loops::template kAddCarefully<kOctets>(&segment, &segment + 1, line, begin, end,
                                               buffer.first(line), buffer.bits);
        any |= count > 0;
      }
    }
    return any;
  }

  // Sees to it that every channel's stage takes in `sites` responses, and a word behind them.
  void MakeRoom(int64_t sites, int64_t channels, ForwardWorker<T>& worker) const {
    worker.free_stage -= sites;
    if (worker.free_stage > 0) return;
    Candidates& c = worker.candidates;
    int32_t longest = 0;
    for (int64_t j = 0; j < channels; ++j) {
      if (c.length[j] + 2 * sites >= plan.stage) {
        c.length[j] = static_cast<int32_t>(worker.best[j].Flush(c.length[j]));
        c.least[j] = worker.best[j].least();
      }
      longest = std::max(longest, c.length[j]);
    }
    worker.free_stage = plan.stage - longest - sites;
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_FORWARD_H_
