// The sums of a convolution, line by line, in the form that each line's content asks for.

#pragma once

#include <algorithm>

#include "xla_kernels/lines/loops.h"

namespace ilajax {

struct SumsPlan {
  int64_t block;          // output channels
  int64_t line_sites;     // of a line's buffer
  int64_t max_planes;     // output planes whose input lines are sorted at once
  int64_t dense_planes;   // and laid out densely; 0: never
  int64_t dense_percent;  // see Tuning
  int64_t max_entries;    // sorted at once
};

// The filters, in the forms that sums take them in.
struct SumsTables {
  Filters filters;
  TapLines tap_lines;
  DenseLines dense_lines;
  bool has_dense;
  LiveTaps live_taps;  // where the plan has a dense form

  SumsTables(Carver& carver, const ConvShape& s, const Lines& lines, const SumsPlan& plan)
      : filters(carver, s, plan.block, lines.line.taps),
        tap_lines(carver, filters.blocks, lines.tap_lines),
        dense_lines(lines.line, s.in_channels),
        has_dense(plan.dense_planes > 0),
        live_taps(carver, has_dense ? s.out_channels : 0, has_dense ? lines.tap_lines : 0,
                  has_dense ? s.weights : 0) {}

  void Fill(const ConvShape& s, const Window& w, const Lines& lines, const int32_t* keys,
            const float* weights) {
    filters.Fill(w, s.weights, s.out_channels, keys, weights);
    tap_lines.Fill(lines, filters);
    if (!has_dense) return;
    live_taps.Fill(lines, dense_lines, filters.tap_offsets, keys, weights, s.in_channels, false);
  }
};

struct SumsWorker {
  LineBuffer line;
  LineEntries entries;
  Segment* segments;
  int64_t words;        // of an input line's bitmap
  uint64_t* read_bits;  // sites that an output line reads, see Dilate; zero between lines
  const float** bases;  // [line of taps]: what the dense form reads
  uint8_t* filled;      // DenseSlab::filled

  SumsWorker(Carver& carver, const Lines& lines, const SumsPlan& plan)
      : line(carver, lines.line, plan.line_sites, plan.block),
        entries(carver, lines.InputLines(plan.max_planes), lines.line.input_length, line.plain,
                plan.max_entries, false),
        segments(carver.Take<Segment>(lines.tap_lines)),
        words(line.plain ? CeilDiv(lines.line.input_length, 64) : 0),
        read_bits(carver.Take<uint64_t>((lines.line.taps + 1), words)),
        bases(carver.Take<const float*>(lines.tap_lines)),
        filled(carver.Take<uint8_t>(plan.dense_planes > 0 ? lines.InputLines(plan.dense_planes)
                                                          : 0)) {}

  void Clear(const Lines& lines) const {
    line.Clear();
    std::fill_n(read_bits, (lines.line.taps + 1) * words, 0);
  }
};

// A plan for the grid of `s`.
inline SumsPlan MakeSumsPlan(const ConvShape& s, const Lines& lines, const Tuning& tuning) {
  const int64_t budget = tuning.CpuWorkspace(s.w.sites());
  SumsPlan plan = {};
  plan.block = BlockOf(s.out_channels);
  plan.line_sites = LineSites(lines.line, plan.block, tuning);
  plan.dense_percent = tuning.dense_percent;
  const LineBuffer buffer(lines.line, plan.line_sites, plan.block);
  const auto table_bytes = [&](int64_t planes) {
    return SizeOf<LineEntries>(lines.InputLines(planes), lines.line.input_length, buffer.plain, 0,
                               false);
  };
  plan.max_planes = lines.planes;
  while (plan.max_planes > 1 && table_bytes(plan.max_planes) > tuning.table_bytes) {
    plan.max_planes = CeilDiv(plan.max_planes, 2);
  }
  plan.max_entries = EntriesAtOnce(lines, s, budget, tuning);
  const DenseLines dense(lines.line, s.in_channels);
  plan.dense_planes =
      DensePlanes(s, lines, dense, buffer, plan.max_planes,
                  SizeOf<LiveTaps>(s.out_channels, lines.tap_lines, s.weights), budget, tuning);
  if (plan.dense_planes > 0) {  // lines are laid out where entries are sorted
    const int64_t floats = lines.InputLines(plan.dense_planes) * dense.size();
    plan.max_entries = std::max(plan.max_entries, CeilDiv(floats, 4));
  }
  return plan;
}

// Whether a plan's numbers, which come from outside, fit the shapes.
inline bool Fits(const SumsPlan& plan, const Lines& lines, int64_t in_channels) {
  if (!IsBlock(plan.block) || plan.line_sites < 1 || plan.max_planes < 1 || plan.max_entries < 1 ||
      plan.dense_planes < 0) {
    return false;
  }
  if (plan.dense_planes == 0) return true;
  return plan.dense_planes <= plan.max_planes &&
         LineBuffer(lines.line, plan.line_sites, plan.block).plain &&
         lines.InputLines(plan.dense_planes) * DenseLines(lines.line, in_channels).size() <=
             4 * plan.max_entries;
}

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

  // Calls take(key of the first site, sites) for the lines of output planes [plane, last), or
  // pieces of them, in the order of the keys. The line's buffer then holds the sums of a block of
  // output channels, and marks for all sites that may be other than zero; `take` sets both back to
  // zero. Lines without such sites are left out.
  template <typename Loops, int kOctets, typename Take>
  void Run(int64_t item, int64_t block, int64_t plane, int64_t last, SumsWorker& worker,
           Take&& take) const {
    const bool dense = DenseIsCheaper(item, block, worker);
    while (plane < last) {
      int64_t planes = std::min(dense ? plan.dense_planes : plan.max_planes, last - plane);
      if (!dense || !RunDense<Loops, kOctets>(item, block, plane, planes, worker, take)) {
        if (SortSlab<Loops>(item, plane, planes, worker)) {
          LineWalk walk(lines, plane * lines.plane_lines);
          const int64_t end = (plane + planes) * lines.plane_lines;
          for (int64_t line = plane * lines.plane_lines; line < end; ++line, walk.Next()) {
            RunLine<Loops, kOctets>(item, block, line, walk, worker, take);
          }
        }
      }
      plane += planes;
    }
  }

  bool DenseIsCheaper(int64_t item, int64_t block, const SumsWorker& worker) const {
    if (plan.dense_planes == 0 || !filters.finite) return false;
    const int64_t first = block * plan.block;
    const int64_t channels = std::min(plan.block, s.out_channels - first);
    const int64_t entries = input.Count(item, 0, s.in_channels, 0, lines.input_sites());
    const auto cheaper = [&](int64_t filled) {
      return kDenseForward.IsCheaper(dense_lines, lines.planes * lines.plane_lines, filled,
                                     channels, lines.tap_lines,
                                     live_taps.count(first, first + channels), entries,
                                     lines.line.taps * plan.block / kLanes, plan.dense_percent);
    };
    // No fewer lines are filled than the channels have entries for.
    return cheaper(CeilDiv(entries, s.in_channels * lines.line.input_length)) &&
           input.FilledLinesAre(cheaper, item, 0, lines.input_sites(), lines.line.input_length,
                                worker.entries.data, plan.max_entries);
  }

  // The dense form for output planes [plane, plane + planes); false where a value is not finite.
  template <typename Loops, int kOctets, typename Take>
  bool RunDense(int64_t item, int64_t block, int64_t plane, int64_t planes, SumsWorker& worker,
                Take&& take) const {
    const int64_t length = lines.line.output_length, first = block * plan.block;
    const int64_t channels = std::min(plan.block, s.out_channels - first);
    int64_t begin, end;
    lines.InputPlanes(plane, plane + planes, begin, end);
    DenseSlab slab = {dense_lines, worker.entries.data, worker.filled};
    slab.Fill(
        begin * lines.input_plane_lines, (end - begin) * lines.input_plane_lines, s.slots,
        [&](int64_t ic) { return input.Keys(item, ic); },
        [&](int64_t ic) { return input.Values(item, ic); });
    if (!slab.finite) return false;
    LineWalk walk(lines, plane * lines.plane_lines);
    for (int64_t line = plane * lines.plane_lines; line < (plane + planes) * lines.plane_lines;
         ++line) {
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

  // Sorts the input lines of as many of `planes` output planes from `plane` as fit, and sets
  // `planes` to that. Lines that go in pieces, and a plane that alone has too many entries, stay
  // unsorted. Returns whether there are any entries.
  template <typename Loops>
  bool SortSlab(int64_t item, int64_t plane, int64_t& planes, SumsWorker& worker) const {
    LineEntries& entries = worker.entries;
    const int64_t length = lines.line.input_length;
    for (;; planes = CeilDiv(planes, 2)) {
      int64_t first, last;
      lines.InputPlanes(plane, plane + planes, first, last);
      first *= lines.input_plane_lines, last *= lines.input_plane_lines;
      const int64_t count = input.Count(item, 0, s.in_channels, first * length, last * length);
      if (count > plan.max_entries && planes > 1) continue;
      entries.lines = 0;
      if (count <= plan.max_entries && worker.line.piece == lines.line.output_length) {
        Loops::Sort(
            SortRange{first, last - first, length, s.slots, first * length, last * length, 0,
                      s.in_channels, count, s.shared()},
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
