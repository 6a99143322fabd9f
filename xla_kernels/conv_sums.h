// The sums of conv.cc's forward pass, line by line, in the form that each line's content asks for.

#ifndef ILAJAX_XLA_KERNELS_CONV_SUMS_H_
#define ILAJAX_XLA_KERNELS_CONV_SUMS_H_

#include <algorithm>
#include <cstdint>

#include "xla_kernels/conv.h"
#include "xla_kernels/conv_line.h"

namespace ilajax {

struct SumsPlan {
  int64_t block, line_sites, max_rows, dense_rows, dense_percent, room;
};

// The filters, in the forms that sums take them in.
struct SumsTables {
  Filters filters;
  TapLines tap_lines;
  DenseLines dense_lines;
  LiveTaps live_taps;  // where the plan has a dense form
  bool has_dense;

  SumsTables(const ConvShape& s, const Window& w, const Lines& lines, const SumsPlan& plan)
      : filters{plan.block, CeilDiv(s.out_channels, plan.block), s.in_channels, w.taps,
                lines.line.taps},
        tap_lines{filters.blocks, lines.tap_lines},
        dense_lines(lines.line, s.in_channels),
        live_taps{s.out_channels, lines.tap_lines, s.weights},
        has_dense(plan.dense_rows > 0) {}

  void Carve(Carver& carver) {
    filters.Carve(carver);
    tap_lines.Carve(carver);
    if (has_dense) live_taps.Carve(carver);
  }
  void Fill(const ConvShape& s, const Window& w, const Lines& lines, const int32_t* keys,
            const float* weights) {
    filters.Fill(w, s.weights, s.out_channels, keys, weights);
    tap_lines.Fill(lines, filters);
    if (!has_dense) return;
    live_taps.Fill(lines, dense_lines, filters.tap_offsets, keys, weights, s.in_channels, false);
  }
};

// Whether a plan's numbers, which come from outside, fit the shapes.
inline bool Fits(const SumsPlan& plan, const Lines& lines, int64_t in_channels,
                 const LineBuffer& buffer) {
  if (plan.line_sites < 1 || plan.max_rows < 1 || plan.room < 1 || plan.dense_rows < 0)
    return false;
  if (plan.dense_rows == 0) return true;
  return plan.dense_rows <= plan.max_rows && buffer.plain &&
         lines.InputLines(plan.dense_rows) * DenseLines(lines.line, in_channels).size() <=
             4 * plan.room;
}

struct SumsWorker {
  LineBuffer line;
  LineEntries entries;
  int64_t words = 0;  // of an input line's bitmap
  Segment* segments = nullptr;
  uint64_t* read_bits = nullptr;  // sites that an output line reads, see Dilate; zero between lines
  const float** bases = nullptr;  // [line of taps]: what the dense form reads
  int64_t dense_lines = 0;        // input lines that it lays out at once
  uint8_t* filled = nullptr;      // DenseSlab::filled

  SumsWorker() = default;
  SumsWorker(const Lines& lines, const SumsPlan& plan, const LineBuffer& buffer)
      : line(buffer),
        entries{lines.InputLines(plan.max_rows),
                buffer.plain
                    ? LineEntries::Words(lines.InputLines(plan.max_rows), lines.line.input_length)
                    : 0,
                plan.room},
        words(buffer.plain ? CeilDiv(lines.line.input_length, 64) : 0),
        dense_lines(plan.dense_rows > 0 ? lines.InputLines(plan.dense_rows) : 0) {}

  void Carve(Carver& carver, const Lines& lines) {
    line.Carve(carver);
    entries.Carve(carver);
    segments = carver.Take<Segment>(lines.tap_lines);
    read_bits = carver.Take<uint64_t>((lines.line.taps + 1) * words);
    bases = carver.Take<const float*>(lines.tap_lines);
    filled = carver.Take<uint8_t>(dense_lines);
  }
  void Clear(const Lines& lines) const {
    line.Clear();
    std::fill_n(read_bits, (lines.line.taps + 1) * words, 0);
  }
};

template <typename T>
struct LineSums {
  const StoredInput<T>& input;
  const Lines& lines;
  const SumsTables& tables;
  const SumsPlan& plan;

  const ConvShape& s = input.s;
  const Filters& filters = tables.filters;
  const TapLines& tap_lines = tables.tap_lines;
  const DenseLines& dense_lines = tables.dense_lines;
  const LiveTaps& live_taps = tables.live_taps;

  // Calls take(key of the first site, sites) for the lines of output rows [row, last), or pieces of
  // them, in the order of the keys. The line's buffer then holds the sums of a block of output
  // channels, and marks for all sites that may be other than zero; `take` sets both back to zero.
  // Lines without such sites are left out.
  template <typename Loops, int kOctets, typename Take>
  void Run(int64_t item, int64_t block, int64_t row, int64_t last, SumsWorker& worker,
           Take&& take) const {
    const bool dense = DensePays(item, block, worker);
    while (row < last) {
      int64_t rows = std::min(dense ? plan.dense_rows : plan.max_rows, last - row);
      if (!dense || !RunDense<Loops, kOctets>(item, block, row, rows, worker, take)) {
        if (SortSlab<Loops>(item, row, rows, worker)) {
          LineWalk walk(lines, row * lines.row_lines);
          const int64_t end = (row + rows) * lines.row_lines;
          for (int64_t line = row * lines.row_lines; line < end; ++line, walk.Next()) {
            RunLine<Loops, kOctets>(item, block, line, walk, worker, take);
          }
        }
      }
      row += rows;
    }
  }

  bool DensePays(int64_t item, int64_t block, const SumsWorker& worker) const {
    if (plan.dense_rows == 0 || !filters.finite) return false;
    const int64_t first = block * plan.block;
    const int64_t channels = std::min(plan.block, s.out_channels - first);
    const int64_t entries = input.Count(item, 0, s.in_channels, 0, lines.input_sites());
    const auto pays = [&](int64_t filled) {
      return kDenseForward.Pays(dense_lines, lines.rows * lines.row_lines, filled, channels,
                                lines.tap_lines, live_taps.count(first, first + channels), entries,
                                lines.line.taps * plan.block / kLanes, plan.dense_percent);
    };
    // No fewer lines are filled than the channels have entries for.
    return pays(CeilDiv(entries, s.in_channels * lines.line.input_length)) &&
           pays(input.FilledLines(item, 0, lines.input_sites(), lines.line.input_length,
                                  worker.entries.data, plan.room));
  }

  // The dense form for output rows [row, row + rows); false where a value is not finite.
  template <typename Loops, int kOctets, typename Take>
  bool RunDense(int64_t item, int64_t block, int64_t row, int64_t rows, SumsWorker& worker,
                Take&& take) const {
    const int64_t length = lines.line.output_length, first = block * plan.block;
    const int64_t channels = std::min(plan.block, s.out_channels - first);
    int64_t begin, end;
    lines.InputRows(row, row + rows, begin, end);
    DenseSlab slab = {dense_lines, worker.entries.data, worker.filled};
    slab.Fill(
        begin * lines.input_row_lines, (end - begin) * lines.input_row_lines, s.slots,
        [&](int64_t ic) { return input.Keys(item, ic); },
        [&](int64_t ic) { return input.Values(item, ic); });
    if (!slab.finite) return false;
    LineWalk walk(lines, row * lines.row_lines);
    for (int64_t line = row * lines.row_lines; line < (row + rows) * lines.row_lines; ++line) {
      const bool any = slab.Reads(walk, live_taps, filters.tap_offsets,
                                  lines.line.taps * (lines.axes + 1), worker.bases);
      walk.Next();
      if (!any) continue;
      Loops::template kRespondAlong<kOctets>(live_taps.taps, live_taps.list(first), channels,
                                             lines.tap_lines, worker.bases, length,
                                             worker.line.first(lines.line));
      for (int64_t i = 0; i < length; i += 64) {
        worker.line.bits[i / 64] = ~uint64_t{0} >> std::max<int64_t>(64 - (length - i), 0);
      }
      take(line * length, length);
    }
    return true;
  }

  // Sorts the input lines of as many of `rows` output rows from `row` as there is room for, and
  // sets `rows` to that. Lines that go in pieces, and a row that alone has too many entries, stay
  // unsorted. Returns whether there are any entries.
  template <typename Loops>
  bool SortSlab(int64_t item, int64_t row, int64_t& rows, SumsWorker& worker) const {
    LineEntries& entries = worker.entries;
    const int64_t length = lines.line.input_length;
    for (;; rows = CeilDiv(rows, 2)) {
      int64_t first, last;
      lines.InputRows(row, row + rows, first, last);
      first *= lines.input_row_lines, last *= lines.input_row_lines;
      const int64_t count = input.Count(item, 0, s.in_channels, first * length, last * length);
      if (count > entries.room && rows > 1) continue;
      entries.lines = 0;
      if (count <= entries.room && worker.line.piece == lines.line.output_length) {
        Loops::Sort(
            SortRange{first, last - first, length, s.slots, first * length, last * length, 0,
                      s.in_channels, count, s.shared},
            worker.line.plain && filters.finite && s.in_channels > 1, lines.line.taps * plan.block,
            [&](int64_t ic) { return input.Keys(item, ic); },
            [&](int64_t ic) { return input.Values(item, ic); }, entries);
      }
      return count > 0;
    }
  }

  template <typename Loops, int kOctets, typename Take>
  void RunLine(int64_t item, int64_t block, int64_t line, const LineWalk& walk, SumsWorker& worker,
               Take&& take) const {
    const LineBuffer& buffer = worker.line;
    const bool sorted = worker.entries.lines > 0;
    const bool plain = buffer.plain && filters.finite && worker.entries.finite;
    uint64_t* read_bits = worker.read_bits;
    const int64_t words = worker.words;
    for (int64_t begin = 0; begin < lines.line.output_length; begin += buffer.piece) {
      const int64_t end = std::min(begin + buffer.piece, lines.line.output_length);
      bool any = false;
      Segment* segment = worker.segments;
      for (const TapLine* t = tap_lines.begin(block); t != tap_lines.end(block); ++t) {
        const int64_t read = walk.Reads(t->offsets, t->lines);
        if (read < 0) continue;
        if (!sorted) {
          any |= AddUnsorted<Loops, kOctets>(item, read, begin, end,
                                             {0, 0, t->weights, t->live, t->all_live}, buffer);
          continue;
        }
        const int32_t first = worker.entries.begin(read), last = worker.entries.end(read);
        if (first == last) continue;
        if (plain && t->all_taps) {
          worker.entries.MarkLine(read, read_bits + lines.line.taps * words);
        } else if (plain) {
          for (int64_t tap = 0; tap < lines.line.taps; ++tap) {
            if (t->live_taps[tap]) worker.entries.MarkLine(read, read_bits + tap * words);
          }
        }
        *segment++ = {first, last, t->weights, t->live, t->all_live};
      }
      if (segment != worker.segments) {
        any = true;
        if (plain) {
          AddPlain<Loops, kOctets>(worker.entries, worker.segments, segment, buffer);
          Loops::kDilate(lines.line, read_bits, buffer.bits);
        } else {
          Loops::template kAddCarefully<kOctets>(worker.entries, worker.segments, segment,
                                                 lines.line, begin, end, buffer.first(lines.line),
                                                 buffer.bits);
        }
      }
      if (any) take(line * lines.line.output_length + begin, end - begin);
    }
  }

  template <typename Loops, int kOctets>
  void AddPlain(const LineEntries& from, const Segment* segment, const Segment* last,
                const LineBuffer& buffer) const {
    const int64_t taps = lines.line.taps, step = lines.line.dilation * plan.block;
    float* origin = buffer.origin(lines.line);
    if (taps == 3) {
      return Loops::template kAddPlain<kOctets, 3>(from, segment, last, origin, step, 0, taps);
    }
    for (int64_t t = 0; t < taps; ++t) {
      Loops::template kAddPlain<kOctets, 1>(from, segment, last, origin - t * step, step, t, taps);
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
      const int32_t* key = input.Keys(item, ic);
      const Range range(key, s.slots, first, last);
      Entry entries[kAtOnce];
      for (int64_t i = range.first; i < range.last;) {
        int64_t count = 0;
        for (; i < range.last && count < kAtOnce; ++i) {
          if (key[i] < first || key[i] >= last) continue;
          entries[count++] = {static_cast<int32_t>(key[i] - base),
                              static_cast<int32_t>(ic),
                              static_cast<float>(input.Values(item, ic)[i]),
                              {0}};
        }
        LineEntries from;
        from.data = reinterpret_cast<float*>(entries);
        segment.end = static_cast<int32_t>(count);
        Loops::template kAddCarefully<kOctets>(from, &segment, &segment + 1, line, begin, end,
                                               buffer.first(line), buffer.bits);
        any |= count > 0;
      }
    }
    return any;
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_SUMS_H_
