// The gradient of conv.cc.

#ifndef ILAJAX_XLA_KERNELS_CONV_BACKWARD_H_
#define ILAJAX_XLA_KERNELS_CONV_BACKWARD_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/conv.h"
#include "xla_kernels/conv_gradient.h"
#include "xla_kernels/conv_line.h"

namespace ilajax {

// The dense form of the gradient.
struct DenseGradient {
  const Lines& lines;  // of the transposed window
  DenseLines layout;   // of the cotangents
  LiveTaps taps;
};

struct BackwardWorker {
  LineBuffer line;
  LineEntries entries;
  Segment* segments = nullptr;
  int32_t* begins = nullptr;     // [oc]: the kept outputs of the line, as slots [begin, end)
  int32_t* ends = nullptr;       // [oc]
  float* weights_bar = nullptr;  // as Filters::rows
  // Of the dense form:
  float* cotangents = nullptr;    // DenseSlab::values
  float* products = nullptr;      // [live tap][lane]: shares of the weights' gradient
  float* own = nullptr;           // one input line of one channel; zero in between
  float* sums = nullptr;          // what it gets
  const float** bases = nullptr;  // [line of taps]
  uint8_t* filled = nullptr;      // DenseSlab::filled

  void Carve(Carver& carver, const Lines& lines, const Filters& filters, const GradientPlan& plan,
             const DenseGradient& dense) {
    line.Carve(carver);
    entries.Carve(carver);
    segments = carver.Take<Segment>(lines.tap_lines);
    begins = carver.Take<int32_t>(filters.block);
    ends = carver.Take<int32_t>(filters.block);
    weights_bar = carver.Take<float>(filters.size());
    if (plan.dense_rows == 0) return;
    cotangents = carver.Take<float>(dense.lines.InputLines(plan.dense_rows) * dense.layout.size());
    products = carver.Take<float>(dense.taps.weights * kLanes);
    own = carver.Take<float>(dense.layout.vectors * kLanes);
    sums = carver.Take<float>(dense.layout.vectors * kLanes);
    bases = carver.Take<const float*>(lines.tap_lines);
    filled = carver.Take<uint8_t>(dense.lines.InputLines(plan.dense_rows));
  }
};

template <typename T>
struct Backward {
  const StoredInput<T>& input;
  const Lines& lines;
  const Filters& filters;
  const TapLines& tap_lines;
  const DenseGradient& dense;
  const GradientPlan& plan;
  const int32_t* out_keys;
  bool out_shared;  // one list of output keys for all channels of a sample
  const T* cotangent;
  T* values_bar;
  const ConvShape& s = input.s;

  const int32_t* OutKeysOf(int64_t item, int64_t oc) const {
    return out_keys + (out_shared ? item : item * s.out_channels + oc) * s.capacity;
  }

  // Input rows [begin, end) of a sample.
  template <typename Loops, int kOctets>
  void Run(int64_t item, int64_t begin, int64_t end, BackwardWorker& worker) const {
    const int64_t length = lines.line.input_length, row = lines.input_row_lines * length;
    if (worker.line.piece == lines.line.output_length) {
      const bool dense = DensePays(item, begin, end, worker);
      const int64_t step = dense ? plan.dense_rows : end - begin;
      for (; begin < end; begin += step) {
        RunKeys<Loops, kOctets>(item, dense, 0, s.in_channels, begin * row,
                                std::min(begin + step, end) * row, worker);
      }
      return;
    }
    // Long lines go in pieces, each of which is within reach of a few pieces of output.
    for (int64_t key = begin * row; key < end * row;) {
      const int64_t stop = std::min(key + worker.line.piece, (key / length + 1) * length);
      RunKeys<Loops, kOctets>(item, false, 0, s.in_channels, key, stop, worker);
      key = stop;
    }
  }

  bool DensePays(int64_t item, int64_t begin, int64_t end, const BackwardWorker& worker) const {
    if (plan.dense_rows == 0 || !filters.finite) return false;
    const int64_t row = lines.input_row_lines * lines.line.input_length;
    const int64_t entries = input.Count(item, 0, s.in_channels, begin * row, end * row);
    const auto pays = [&](int64_t filled) {
      return kDenseBackward.Pays(dense.layout, (end - begin) * lines.input_row_lines, filled,
                                 s.in_channels, lines.tap_lines, dense.taps.count(0, s.in_channels),
                                 entries, lines.line.taps * filters.blocks * plan.block / kLanes,
                                 plan.dense_percent);
    };
    const int64_t length = lines.line.input_length;
    return pays(CeilDiv(entries, s.in_channels * length)) &&
           pays(input.FilledLines(item, begin * row, end * row, length, worker.entries.data,
                                  plan.room));
  }

  // The entries of channels [ic_begin, ic_end) with keys in [begin, end), halved until they have
  // room.
  template <typename Loops, int kOctets>
  void RunKeys(int64_t item, bool dense, int64_t ic_begin, int64_t ic_end, int64_t begin,
               int64_t end, BackwardWorker& worker) const {
    int64_t count = 0, lowest = end, highest = begin;
    for (int64_t ic = ic_begin; ic < ic_end; ++ic) {
      const int32_t* key = input.Keys(item, ic);
      const Range range(key, s.slots, begin, end);
      if (range.first == range.last) continue;
      count += range.last - range.first;
      lowest = std::min<int64_t>(lowest, key[range.first]);
      highest = std::max<int64_t>(highest, key[range.last - 1]);
    }
    begin = std::max(begin, lowest), end = std::min(end, highest + 1);
    if (count == 0 || begin >= end) return;
    if (count > plan.room) {
      if (ic_end - ic_begin > 1) {
        const int64_t middle = (ic_begin + ic_end) / 2;
        RunKeys<Loops, kOctets>(item, dense, ic_begin, middle, begin, end, worker);
        RunKeys<Loops, kOctets>(item, dense, middle, ic_end, begin, end, worker);
      } else if (end - begin > 1) {
        const int64_t middle = begin + (end - begin) / 2;
        RunKeys<Loops, kOctets>(item, dense, ic_begin, ic_end, begin, middle, worker);
        RunKeys<Loops, kOctets>(item, dense, ic_begin, ic_end, middle, end, worker);
      }
      return;  // a key that stands more often than there is room for is broken
    }
    const int64_t length = lines.line.input_length, first = begin / length;
    const SortRange range = {
        first,   CeilDiv(end, length) - first, length, s.slots, begin, end, ic_begin, ic_end, count,
        s.shared};
    const auto keys_of = [&](int64_t ic) { return input.Keys(item, ic); };
    const auto sort = [&](bool rows) {
      Loops::Sort(
          range, rows, 0, keys_of, [&](int64_t ic) { return input.Values(item, ic); },
          worker.entries);
    };
    if (dense) sort(false);
    if (!dense || !RunDense<Loops>(item, range, worker)) {
      const bool all = ic_end - ic_begin == s.in_channels;
      sort(all && worker.line.plain && filters.finite && s.in_channels > 1);
      RunLines<Loops, kOctets>(item, range, worker);
    }
    Loops::TakeBack(
        range, keys_of,
        [&](int64_t ic) { return values_bar + (item * s.in_channels + ic) * s.slots; },
        worker.entries);
  }

  // The dense form for lines of entries; false where a factor is not finite.
  template <typename Loops>
  bool RunDense(int64_t item, const SortRange& range, BackwardWorker& worker) const {
    const LineEntries& entries = worker.entries;
    if (!entries.finite) return false;
    const Lines& t = dense.lines;
    const int64_t first = range.first_line, last = first + range.lines;
    int64_t begin, end;
    t.InputRows(first / t.row_lines, CeilDiv(last, t.row_lines), begin, end);
    DenseSlab slab = {dense.layout, worker.cotangents, worker.filled};
    slab.Fill(
        begin * t.input_row_lines, (end - begin) * t.input_row_lines, s.capacity,
        [&](int64_t oc) { return OutKeysOf(item, oc); },
        [&](int64_t oc) { return cotangent + (item * s.out_channels + oc) * s.capacity; });
    if (!slab.finite) return false;
    LineWalk walk(t, first);
    for (int64_t line = first; line < last; ++line, walk.Next()) {
      if (entries.begin(line) == entries.end(line)) continue;
      Entry* const stop = entries.entries(entries.end(line));
      (void)slab.Reads(walk, dense.taps, filters.tap_offsets, t.line.taps * (t.axes + 1),
                       worker.bases);
      for (Entry *run = entries.entries(entries.begin(line)), *end; run != stop; run = end) {
        for (end = run; end != stop && end->channel == run->channel; ++end) {
          worker.own[end->place] += end->value;
        }
        Loops::kGatherAlong(dense.taps.taps, dense.taps.list(run->channel), t.tap_lines,
                            worker.bases, dense.layout.vectors, worker.own, worker.products,
                            worker.sums);
        for (Entry* e = run; e != end; ++e) {
          e->bar = worker.sums[e->place];
          worker.own[e->place] = 0.0f;
        }
      }
    }
    return true;
  }

  // The sorted lines, from the output lines within reach.
  template <typename Loops, int kOctets>
  void RunLines(int64_t item, const SortRange& range, BackwardWorker& worker) const {
    int64_t row_begin, row_end;
    lines.OutputRows(range.first_line / lines.input_row_lines,
                     CeilDiv(range.first_line + range.lines, lines.input_row_lines), row_begin,
                     row_end);
    for (int64_t block = 0; block < filters.blocks; ++block) {
      for (int64_t j = 0; j < plan.block; ++j) worker.ends[j] = -1;
      LineWalk walk(lines, row_begin * lines.row_lines);
      for (int64_t line = row_begin * lines.row_lines; line < row_end * lines.row_lines; ++line) {
        RunLine<Loops, kOctets>(item, block, line, walk, range.begin, range.end, worker);
        walk.Next();
      }
    }
  }

  template <typename Loops, int kOctets>
  void RunLine(int64_t item, int64_t block, int64_t line, const LineWalk& walk, int64_t key_begin,
               int64_t key_end, BackwardWorker& worker) const {
    const LineWindow& along = lines.line;
    const LineEntries& entries = worker.entries;
    Segment* segment = worker.segments;
    for (const TapLine* t = tap_lines.begin(block); t != tap_lines.end(block); ++t) {
      const int64_t read = walk.Reads(t->offsets, t->lines);
      if (!entries.Holds(read)) continue;
      *segment = {entries.begin(read), entries.end(read), t->weights, t->live, t->all_live};
      segment += segment->begin < segment->end;
    }
    if (segment == worker.segments) return;
    const LineBuffer& buffer = worker.line;
    // The pieces within reach: all of a line, unless it is a long one.
    int64_t begin = 0, stop = along.output_length;
    if (buffer.piece < along.output_length) {
      const int64_t place_begin = key_begin % along.input_length;
      const int64_t place_end = place_begin + key_end - key_begin;
      const int64_t lowest = place_begin + along.low - along.extent() + 1;
      begin = std::clamp<int64_t>(lowest, 0, stop * along.stride) / along.stride;
      begin -= begin % buffer.piece;
      stop = std::clamp<int64_t>(place_end + along.low, 0, stop * along.stride);
      stop = std::min(CeilDiv(stop, along.stride), along.output_length);
    }
    for (; begin < stop; begin += buffer.piece) {
      const int64_t end = std::min(begin + buffer.piece, along.output_length);
      const int64_t first_key = line * along.output_length + begin;
      bool finite = filters.finite && entries.finite;
      if (!Spread(item, block, first_key, end - begin, worker, finite)) continue;
      if (buffer.plain && finite) {
        GatherPlain<Loops, kOctets>(segment, worker);
      } else {
        Loops::template kGatherCarefully<kOctets>(entries, worker.segments, segment, along, begin,
                                                  end, buffer.first(along), filters.rows,
                                                  worker.weights_bar);
      }
      ForKept(item, block, first_key, end - begin, worker,
              [&](float& row, int64_t) { row = 0.0f; });
    }
  }

  template <typename Loops, int kOctets>
  void GatherPlain(const Segment* last, BackwardWorker& worker) const {
    const int64_t taps = lines.line.taps, step = lines.line.dilation * plan.block;
    const float* origin = worker.line.origin(lines.line);
    auto gather = [&](auto loop, int64_t tap) {
      loop(worker.entries, worker.segments, last, origin - tap * step, step, tap, taps,
           filters.rows, worker.weights_bar);
    };
    if (taps == 3) return gather(Loops::template kGatherPlain<kOctets, 3>, 0);
    for (int64_t t = 0; t < taps; ++t) gather(Loops::template kGatherPlain<kOctets, 1>, t);
  }

  // Spreads the cotangents of kept outputs with keys from `first_key` over the line. Returns
  // whether there are any, and clears `finite` if one of them is not.
  bool Spread(int64_t item, int64_t block, int64_t first_key, int64_t sites, BackwardWorker& worker,
              bool& finite) const {
    const int64_t channels = std::min(plan.block, s.out_channels - block * plan.block);
    for (int64_t j = 0; j < channels; ++j) {
      const int32_t* key = OutKeysOf(item, block * plan.block + j);
      // Lines come in ascending order, so that the first one alone needs a search.
      int64_t slot = worker.ends[j];
      if (slot < 0) slot = std::lower_bound(key, key + s.capacity, first_key) - key;
      while (slot < s.capacity && key[slot] < first_key) ++slot;
      worker.begins[j] = static_cast<int32_t>(slot);
      while (slot < s.capacity && key[slot] < first_key + sites) ++slot;
      worker.ends[j] = static_cast<int32_t>(slot);
    }
    bool any = false;
    uint32_t largest = 0;
    ForKept(item, block, first_key, sites, worker, [&](float& row, int64_t slot) {
      row = static_cast<float>(cotangent[slot]);
      largest = std::max(largest, FloatBits(row) & 0x7f800000u);
      any = true;
    });
    finite &= largest != 0x7f800000u;
    return any;
  }

  // Calls f(the place in the line's buffer, slot) for the kept outputs that Spread has found.
  template <typename F>
  void ForKept(int64_t item, int64_t block, int64_t first_key, int64_t sites,
               const BackwardWorker& worker, F&& f) const {
    const int64_t channels = std::min(plan.block, s.out_channels - block * plan.block);
    float* rows = worker.line.first(lines.line);
    for (int64_t j = 0; j < channels; ++j) {
      const int64_t oc = block * plan.block + j;
      const int32_t* key = OutKeysOf(item, oc);
      for (int64_t i = worker.begins[j]; i < worker.ends[j]; ++i) {
        const int64_t site = key[i] - first_key;
        if (site < 0 || site >= sites) continue;
        f(rows[site * plan.block + j], (item * s.out_channels + oc) * s.capacity + i);
      }
    }
  }
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_CONV_BACKWARD_H_
