#include "xla_kernels/lines/gradient.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/lines/loops.h"

namespace ilajax {

GradientPlan MakeGradientPlan(const ConvShape& s, const Tuning& tuning) {
  const Window w = Squeeze(s.w);
  const Lines lines(w), transposed(Transposed(w));
  const int64_t budget = tuning.CpuWorkspace(s.w.sites());
  GradientPlan plan = {};
  plan.block = BlockOf(s.out_channels);
  plan.line_sites = LineSites(lines.line, plan.block, tuning);
  const LineBuffer buffer(lines.line, plan.line_sites, plan.block);
  const int64_t line_bytes = plan.line_sites * plan.block * static_cast<int64_t>(sizeof(float));
  const bool whole = buffer.piece == lines.line.output_length;
  plan.spread_lines = whole ? std::clamp<int64_t>(tuning.line_bytes / line_bytes, 1,
                                                  lines.planes * lines.plane_lines)
                            : 1;
  plan.dense_percent = tuning.dense_percent;
  plan.max_entries = EntriesAtOnce(lines, s, budget, tuning);
  // As many slabs as make a few tasks for every thread: each looks at the cotangents within its
  // reach.
  const int64_t items = std::max<int64_t>(s.batch / s.groups, 1);
  plan.slab_planes =
      CeilDiv(lines.input_planes, std::min(CeilDiv(tuning.tasks, items), lines.input_planes));
  if (!HasStrides(s.w)) {
    plan.dense_planes = DensePlanes(
        s, transposed, DenseLines(transposed.line, s.out_channels), buffer, plan.slab_planes,
        SizeOf<LiveTaps>(s.in_channels, lines.tap_lines, s.weights), budget, tuning);
  }
  const int64_t units = items * CeilDiv(lines.input_planes, plan.slab_planes);
  const int64_t bars = s.groups * s.in_channels * CeilDiv(s.out_channels, plan.block) * plan.block *
                       s.w.taps * static_cast<int64_t>(sizeof(float));
  plan.parts = std::max<int64_t>(
      1, std::min({units, tuning.workers, budget / 4 / std::max<int64_t>(bars, 1)}));
  const int64_t shared = SizeOf<GradientLayout>(s, plan);  // without workers yet
  Carver carver(nullptr);
  const int64_t worker = SizeOf<GradientWorker>(GradientTables(carver, s, plan), plan);
  plan.workers = tuning.Workers(s.groups * plan.parts, worker, budget - shared);
  return plan;
}

bool Fits(const ConvShape& s, const GradientPlan& plan) {
  const Lines lines(Squeeze(s.w));
  if (!IsBlock(plan.block) || plan.line_sites < 1 || plan.spread_lines < 1 ||
      plan.slab_planes < 1 || plan.max_entries < 1 || plan.parts < 1 || plan.workers < 1 ||
      plan.dense_planes < 0) {
    return false;
  }
  const LineBuffer buffer(lines.line, plan.line_sites, plan.block);
  if (plan.spread_lines > 1 && buffer.piece < lines.line.output_length) return false;
  return plan.dense_planes == 0 || (!HasStrides(s.w) && buffer.plain);
}

namespace {

template <typename T>
struct Gradient {
  const GradientCall<T>& call;
  const GradientPlan& plan;
  const GradientTables& tables;
  const StoredInput<T>& input;

  const ConvShape& s = input.s;
  const Lines& lines = tables.lines;
  const Filters& filters = tables.filters;
  const TapLines& tap_lines = tables.tap_lines;

  const int32_t* OutKeysOf(int64_t item, int64_t oc) const {
    return call.out_keys + (call.out_shared ? item : item * s.out_channels + oc) * s.capacity;
  }

  // Input planes [begin, end) of a sample.
  template <typename Loops, int kOctets>
  void Run(int64_t item, int64_t begin, int64_t end, GradientWorker& worker) const {
    const int64_t length = lines.line.input_length, plane = lines.input_plane_lines * length;
    if (worker.line.piece == lines.line.output_length) {
      const bool dense = DenseIsCheaper(item, begin, end, worker);
      const int64_t step = dense ? plan.dense_planes : end - begin;
      for (; begin < end; begin += step) {
        RunKeys<Loops, kOctets>(item, dense, 0, s.in_channels, begin * plane,
                                std::min(begin + step, end) * plane, worker);
      }
      return;
    }
    // Long lines go in pieces, each of which is within reach of a few pieces of output.
    for (int64_t key = begin * plane; key < end * plane;) {
      const int64_t stop = std::min(key + worker.line.piece, (key / length + 1) * length);
      RunKeys<Loops, kOctets>(item, false, 0, s.in_channels, key, stop, worker);
      key = stop;
    }
  }

  bool DenseIsCheaper(int64_t item, int64_t begin, int64_t end,
                      const GradientWorker& worker) const {
    if (plan.dense_planes == 0 || !filters.finite) return false;
    const int64_t plane = lines.input_plane_lines * lines.line.input_length;
    const int64_t entries = input.Count(item, 0, s.in_channels, begin * plane, end * plane);
    const auto cheaper = [&](int64_t filled) {
      return kDenseBackward.IsCheaper(
          tables.dense_lines, (end - begin) * lines.input_plane_lines, filled, s.in_channels,
          lines.tap_lines, tables.live_taps.count(0, s.in_channels), entries,
          lines.line.taps * filters.blocks * plan.block / kLanes, plan.dense_percent);
    };
    const int64_t length = lines.line.input_length;
    return cheaper(CeilDiv(entries, s.in_channels * length)) &&
           input.FilledLinesAre(cheaper, item, begin * plane, end * plane, length,
                                worker.entries.data, plan.max_entries);
  }

  // The entries of channels [ic_begin, ic_end) with keys in [begin, end), halved until they have
  // room.
  template <typename Loops, int kOctets>
  void RunKeys(int64_t item, bool dense, int64_t ic_begin, int64_t ic_end, int64_t begin,
               int64_t end, GradientWorker& worker) const {
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
    if (count > plan.max_entries) {
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
    const SortRange range = {first,    CeilDiv(end, length) - first,
                             length,   s.slots,
                             begin,    end,
                             ic_begin, ic_end,
                             count,    s.shared()};
    const auto keys_of = [&](int64_t ic) { return input.Keys(item, ic); };
    const auto sort = [&](bool stacks) {
      Loops::Sort(
          range, stacks, 0, keys_of, [&](int64_t ic) { return input.Values(item, ic); },
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
        [&](int64_t ic) { return call.values_bar + (item * s.in_channels + ic) * s.slots; },
        worker.entries);
  }

  // The dense form for lines of entries; false where a factor is not finite.
  template <typename Loops>
  bool RunDense(int64_t item, const SortRange& range, GradientWorker& worker) const {
    const LineEntries& entries = worker.entries;
    if (!entries.finite) return false;
    const Lines& t = tables.transposed;
    const int64_t first = range.first_line, last = first + range.lines;
    int64_t begin, end;
    t.InputPlanes(first / t.plane_lines, CeilDiv(last, t.plane_lines), begin, end);
    DenseSlab slab = {tables.dense_lines, worker.cotangents, worker.laid_out};
    slab.Fill(
        begin * t.input_plane_lines, (end - begin) * t.input_plane_lines, s.capacity,
        [&](int64_t oc) { return OutKeysOf(item, oc); },
        [&](int64_t oc) { return call.cotangent + (item * s.out_channels + oc) * s.capacity; });
    if (!slab.finite) return false;
    if (!worker.has_products) {
      std::fill_n(worker.products, tables.live_taps.count(0, s.in_channels) * kLanes, 0.0f);
    }
    worker.has_products = true;
    LineWalk walk(t, first);
    for (int64_t line = first; line < last; ++line, walk.Next()) {
      if (entries.begin(line) == entries.end(line)) continue;
      Entry* const stop = entries.entries(entries.end(line));
      (void)slab.Reads(walk, tables.live_taps, filters.tap_offsets, t.line.taps * (t.axes + 1),
                       worker.bases);
      for (Entry *run = entries.entries(entries.begin(line)), *end; run != stop; run = end) {
        for (end = run; end != stop && end->channel == run->channel; ++end) {
          worker.own[end->place] += end->value;
        }
        Loops::kGatherAlong(tables.live_taps.taps, tables.live_taps.list(run->channel), t.tap_lines,
                            worker.bases, tables.dense_lines.vectors, worker.own, worker.products,
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
  void RunLines(int64_t item, const SortRange& range, GradientWorker& worker) const {
    int64_t plane_begin, plane_end;
    lines.OutputPlanes(range.first_line / lines.input_plane_lines,
                       CeilDiv(range.first_line + range.lines, lines.input_plane_lines),
                       plane_begin, plane_end);
    for (int64_t block = 0; block < filters.blocks; ++block) {
      for (int64_t j = 0; j < plan.block; ++j) worker.ends[j] = -1;
      LineWalk walk(lines, plane_begin * lines.plane_lines);
      const int64_t end = plane_end * lines.plane_lines;
      for (int64_t line = plane_begin * lines.plane_lines; line < end; line += plan.spread_lines) {
        const int64_t count = std::min(plan.spread_lines, end - line);
        if (worker.line.piece < lines.line.output_length) {
          RunPieces<Loops, kOctets>(item, block, line, walk, range.begin, range.end, worker);
          walk.Next();
        } else {
          RunWhole<Loops, kOctets>(item, block, line, count, walk, worker);
        }
      }
    }
  }

  // Output lines [line, line + count), all of each.
  template <typename Loops, int kOctets>
  void RunWhole(int64_t item, int64_t block, int64_t line, int64_t count, LineWalk& walk,
                GradientWorker& worker) const {
    const int64_t length = lines.line.output_length;
    const bool finite = Spread(item, block, line * length, length, count, worker);
    for (int64_t i = 0; i < count; ++i, walk.Next()) {
      if (!worker.filled[i]) continue;
      worker.line.data = worker.spread + i * worker.line.sites * plan.block;
      RunLine<Loops, kOctets>(block, walk, 0, length, finite, worker);
    }
    Clear(item, block, line * length, length, worker);
  }

  // The pieces of an output line within reach of keys [key_begin, key_end), which are of one line.
  template <typename Loops, int kOctets>
  void RunPieces(int64_t item, int64_t block, int64_t line, const LineWalk& walk, int64_t key_begin,
                 int64_t key_end, GradientWorker& worker) const {
    const LineWindow& along = lines.line;
    const int64_t place_begin = key_begin % along.input_length;
    const int64_t place_end = place_begin + key_end - key_begin, piece = worker.line.piece;
    const int64_t lowest = place_begin + along.low - along.extent() + 1;
    int64_t begin = 0, stop = along.output_length;
    begin = std::clamp<int64_t>(lowest, 0, stop * along.stride) / along.stride;
    begin -= begin % piece;
    stop = std::clamp<int64_t>(place_end + along.low, 0, stop * along.stride);
    stop = std::min(CeilDiv(stop, along.stride), along.output_length);
    for (; begin < stop; begin += piece) {
      const int64_t end = std::min(begin + piece, along.output_length);
      const int64_t first_key = line * along.output_length + begin;
      const bool finite = Spread(item, block, first_key, end - begin, 1, worker);
      worker.line.data = worker.spread;
      if (worker.filled[0]) RunLine<Loops, kOctets>(block, walk, begin, end, finite, worker);
      Clear(item, block, first_key, end - begin, worker);
    }
  }

  // Output sites [begin, end) of the line that `walk` stands at and `worker.line` is that of.
  template <typename Loops, int kOctets>
  void RunLine(int64_t block, const LineWalk& walk, int64_t begin, int64_t end, bool finite,
               GradientWorker& worker) const {
    const LineEntries& entries = worker.entries;
    Segment* segment = worker.segments;
    for (const TapLine* t = tap_lines.begin(block); t != tap_lines.end(block); ++t) {
      const int64_t read = walk.Reads(t->offsets, t->lines);
      if (!entries.Holds(read)) continue;
      *segment = {entries.begin(read), entries.end(read), t->weights, t->live, t->all_live};
      segment += segment->begin < segment->end;
    }
    if (segment == worker.segments) return;
    if (worker.line.plain && finite && filters.finite && entries.finite) {
      GatherPlain<Loops, kOctets>(segment, worker);
    } else {
      Loops::template kGatherCarefully<kOctets>(entries, worker.segments, segment, lines.line,
                                                begin, end, worker.line.first(lines.line),
                                                filters.weights, worker.weights_bar);
    }
  }

  template <typename Loops, int kOctets>
  void GatherPlain(const Segment* last, GradientWorker& worker) const {
    const int64_t taps = lines.line.taps, step = lines.line.dilation * plan.block;
    const float* origin = worker.line.origin(lines.line);
    const GradientWeights weights = {filters.weights, tables.transposed_weights,
                                     worker.weights_bar};
    auto gather = [&](auto loop, int64_t tap) {
      loop(worker.entries, worker.segments, last, origin - tap * step, step, tap, taps, weights);
    };
    if (taps == 3) return gather(Loops::template kGatherPlain<kOctets, 3>, 0);
    for (int64_t t = 0; t < taps; ++t) gather(Loops::template kGatherPlain<kOctets, 1>, t);
  }

  // Spreads the cotangents of the kept outputs of `count` lines, or pieces, of `sites` output sites
  // from `first_key`, and marks the lines that have any. Returns whether all are finite.
  bool Spread(int64_t item, int64_t block, int64_t first_key, int64_t sites, int64_t count,
              GradientWorker& worker) const {
    const int64_t channels = std::min(plan.block, s.out_channels - block * plan.block);
    uint32_t largest = 0;
    for (int64_t j = 0; j < channels; ++j) {
      const int64_t oc = block * plan.block + j;
      const int32_t* key = OutKeysOf(item, oc);
      // Lines come in ascending order, so that the first ones alone need a search.
      int64_t slot = worker.ends[j];
      if (slot < 0) slot = std::lower_bound(key, key + s.capacity, first_key) - key;
      while (slot < s.capacity && key[slot] < first_key) ++slot;
      worker.begins[j] = static_cast<int32_t>(slot);
      while (slot < s.capacity && key[slot] < first_key + count * sites) ++slot;
      worker.ends[j] = static_cast<int32_t>(slot);
      const T* cotangent = call.cotangent + (item * s.out_channels + oc) * s.capacity;
      ForKept(key, j, first_key, sites, worker, [&](float& place, uint8_t& filled, int64_t i) {
        place = static_cast<float>(cotangent[i]);
        largest = std::max(largest, FloatBits(place) & 0x7f800000u);
        filled = 1;
      });
    }
    return largest != 0x7f800000u;
  }

  // Sets back to zero what Spread has filled.
  void Clear(int64_t item, int64_t block, int64_t first_key, int64_t sites,
             GradientWorker& worker) const {
    const int64_t channels = std::min(plan.block, s.out_channels - block * plan.block);
    for (int64_t j = 0; j < channels; ++j) {
      ForKept(OutKeysOf(item, block * plan.block + j), j, first_key, sites, worker,
              [](float& place, uint8_t& filled, int64_t) { place = 0.0f, filled = 0; });
    }
  }

  // Calls f(its place, its line's mark, slot) for the kept outputs of channel j of the block.
  template <typename F>
  void ForKept(const int32_t* key, int64_t j, int64_t first_key, int64_t sites,
               const GradientWorker& worker, F&& f) const {
    const Divider line_of(sites);
    const int64_t pitch = worker.line.sites * plan.block;
    float* const first = worker.line.first(lines.line, worker.spread) + j;
    for (int64_t i = worker.begins[j]; i < worker.ends[j]; ++i) {
      const int64_t site = key[i] - first_key;
      if (site < 0) continue;  // broken keys
      const int64_t line = line_of.Quotient(site);
      f(first[line * pitch + (site - line * sites) * plan.block], worker.filled[line], i);
    }
  }
};

// The parts' gradients of the filter in their order, at the live weights.
template <typename T>
void SumParts(ffi::ThreadPool& pool, const GradientCall<T>& call, const ConvShape& s,
              const GradientPlan& plan, const GradientTables& t) {
  constexpr int64_t kBlock = 4096;  // weights of a task
  const int64_t blocks = CeilDiv(s.weights, kBlock);
  ParallelFor(pool, s.groups * blocks, plan.workers, [&](int64_t task, int64_t) {
    const int64_t group = task / blocks, begin = task % blocks * kBlock;
    const int64_t end = std::min(begin + kBlock, s.weights);
    const float* const parts = t.part_bars + group * plan.parts * t.filters.size();
    float* const bars = call.weights_bar + group * s.weights;
    std::fill(bars + begin, bars + end, 0.0f);
    t.filters.ForWeights(call.kernel_keys, begin, end, s.out_channels,
                         [&](int64_t n, int64_t run, int64_t tap, int64_t j) {
                           const float* from =
                               parts + (run * t.filters.line_taps + tap) * plan.block + j;
                           for (int64_t part = 0; part < plan.parts; ++part) {
                             bars[n] += from[part * t.filters.size()];
                           }
                         });
  });
}

}  // namespace

template <typename T>
void RunGradient(ffi::ThreadPool& pool, const GradientCall<T>& call, const ConvShape& s,
                 const GradientPlan& plan, GradientLayout& layout) {
  GradientTables& t = layout.tables;
  const Lines& lines = t.lines;
  t.filters.Fill(t.w, s.weights, s.out_channels, call.kernel_keys, call.weights);
  t.tap_lines.Fill(lines, t.filters);
  t.TransposeWeights();
  if (t.has_dense) {
    t.live_taps.Fill(t.transposed, t.dense_lines, t.filters.tap_offsets, call.kernel_keys,
                     call.weights, s.in_channels, true);
  }
  const int64_t live = t.has_dense ? t.live_taps.count(0, s.in_channels) : 0;
  std::memset(static_cast<void*>(call.values_bar), 0,
              s.batch * s.in_channels * s.slots * sizeof(T));
  const StoredInput<T> input = {s, call.keys, call.values};
  const Gradient<T> gradient = {call, plan, t, input};
  for (int64_t i = 0; i < plan.workers; ++i) *layout.workers.At(i, t, plan).clear = false;
  const int64_t slabs = CeilDiv(lines.input_planes, plan.slab_planes);
  const int64_t units = s.batch / s.groups * slabs;
  ParallelFor(pool, s.groups * plan.parts, plan.workers, [&](int64_t task, int64_t id) {
    GradientWorker worker = layout.workers.At(id, t, plan);
    worker.weights_bar = t.part_bars + task * t.filters.size();
    std::memset(worker.weights_bar, 0, t.filters.size() * sizeof(float));
    worker.Clear(t, plan);
    const int64_t group = task / plan.parts, part = task % plan.parts;
    for (int64_t unit = part * units / plan.parts; unit < (part + 1) * units / plan.parts; ++unit) {
      const int64_t item = group * (s.batch / s.groups) + unit / slabs;
      const int64_t plane = unit % slabs * plan.slab_planes;
      DispatchLoops(plan.block, [&]<typename Loops, int kOctets>() {
        gradient.template Run<Loops, kOctets>(
            item, plane, std::min(plane + plan.slab_planes, lines.input_planes), worker);
      });
    }
    for (int64_t i = 0; worker.has_products && i < live; ++i) {
      const float* lanes = worker.products + i * kLanes;
      const int64_t n = t.live_taps.taps[i].number;
      t.filters.ForWeights(
          call.kernel_keys, n, n + 1, s.out_channels,
          [&](int64_t, int64_t run, int64_t tap, int64_t j) {
            worker.weights_bar[(run * t.filters.line_taps + tap) * plan.block + j] +=
                std::accumulate(lanes, lanes + kLanes, 0.0f);
          });
    }
  });
  SumParts(pool, call, s, plan, t);
  const KeptCotangents<T> kept = {s.batch / s.groups, s.out_channels, s.capacity,
                                  t.w.output_sites,   call.out_keys,  call.cotangent,
                                  call.out_shared};
  ParallelFor(pool, s.groups * s.out_channels, plan.workers, [&](int64_t task, int64_t) {
    call.bias_bar[task] = kept.Sum(task / s.out_channels, task % s.out_channels);
  });
}

template void RunGradient(ffi::ThreadPool&, const GradientCall<float>&, const ConvShape&,
                          const GradientPlan&, GradientLayout&);
template void RunGradient(ffi::ThreadPool&, const GradientCall<BFloat16>&, const ConvShape&,
                          const GradientPlan&, GradientLayout&);
template void RunGradient(ffi::ThreadPool&, const GradientCall<Float16>&, const ConvShape&,
                          const GradientPlan&, GradientLayout&);

}  // namespace ilajax
