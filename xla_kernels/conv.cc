// Direct sparse convolution with k-selection on the CPU, and its gradient.
//
// The grid is seen as lines along its last axis (common/lines.h). A sample's entries are sorted
// into their input lines, over all channels, slab by slab of rows of the leading axis. Then each
// output line gathers a handful of contiguous lists, one for each line of taps, in a buffer
// [site][channel of a block] that stays in the first-level cache; a bitmap, the shifted bitmaps of
// the input lines, says which sites to read, hand to the selection and clear. The grid itself is
// never allocated, cleared or scanned: work follows stored entries x live taps, plus a few
// operations a line, and a bit a site.
//
// Forward, a task for each (sample, block of output channels, part of the rows). With several parts
// each part selects for itself, and the lists are merged at the end.
//
// Backward, a task for each of a fixed number of runs of (sample, slab of input rows). Each output
// line within reach gets the cotangents of its kept outputs, and every stored input of the lists
// gathers from there what its own cotangent and the weights' need. Partial sums of the weights are
// added in the order of the tasks.
//
// A sum's order does not depend on threads, slabs or parts: line of taps, input channel, place,
// tap. Results are repeatable.

#include "xla_kernels/conv.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xla_kernels/common/filters.h"
#include "xla_kernels/common/lines.h"
#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/simd.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {

// What an output line reads through one line of taps.
struct Segment {
  const Entry* begin;
  const Entry* end;
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
};

// Where a block of output channels stages its responses.
struct Candidates {
  const float* bias;
  int32_t* length;  // entries staged so far
  float* least;     // what a rank must not be less than; NaN: anything will do
  int32_t* counts;  // candidates seen
  uint64_t* stage;  // [channel][room]
  int64_t room;
  float floor;        // what a value has to exceed; NaN: nothing
  int32_t rank_mask;  // the bits of a value that rank it
};

}  // namespace ilajax

#define ILAJAX_SIMD_FILE "xla_kernels/conv_lines.inc"
#include "xla_kernels/common/simd_targets.h"

namespace ilajax {
namespace {

// Calls f.template operator()<Loops, kOctets>() for a block of 8 * kOctets channels.
template <typename Loops, typename F>
void DispatchOctets(int64_t block, F&& f) {
  switch (block / kLanes) {
    case 1:
      return f.template operator()<Loops, 1>();
    case 2:
      return f.template operator()<Loops, 2>();
    case 3:
      return f.template operator()<Loops, 3>();
    default:
      return f.template operator()<Loops, 4>();
  }
}
bool IsBlock(int64_t channels) { return channels % kLanes == 0 && channels >= 8 && channels <= 32; }
template <typename F>
void DispatchLoops(int64_t block, F&& f) {
  if (HasAvx2()) return DispatchOctets<avx2::Loops>(block, f);
  return DispatchOctets<baseline::Loops>(block, f);
}

// The lines of taps, a list for each block of output channels.
struct TapLines {
  int64_t blocks = 0, most = 0;
  TapLine* list = nullptr;    // [block][most]
  int64_t* counts = nullptr;  // [block]

  void Carve(Carver& carver) {
    list = carver.Take<TapLine>(blocks * most);
    counts = carver.Take<int64_t>(blocks);
  }
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
            filters.rows + run * lines.line.taps * filters.block,
            filters.live_runs + run,
            filters.live_taps + (block * most + t) * lines.line.taps,
            std::all_of(filters.live_runs + run, filters.live_runs + run + filters.in_channels,
                        [](uint8_t live) { return live != 0; })};
        for (int a = 0; a < lines.axes; ++a) {
          tap_line.lines = tap_line.lines * lines.input_shape[a] + offsets[a];
        }
      }
    }
  }
};

// The buffer of one output line, or of a piece of it.
//
// In a narrow layer the taps of a place follow each other so closely on neighbouring sites that
// each addition would wait for the last one's store. There each of three taps gets a copy of the
// buffer.
struct LineBuffer {
  int64_t sites = 0, block = 0, copies = 1;  // of the plan
  bool plain = false;                        // stride 1, and room for what taps reach past the ends
  int64_t piece = 0;                         // output sites that it takes at once
  float* rows = nullptr;
  uint64_t* bits = nullptr;

  LineBuffer() = default;
  LineBuffer(const LineWindow& line, int64_t line_sites, int64_t channel_block, int64_t tap_copies)
      : sites(line_sites),
        block(channel_block),
        copies(tap_copies),
        plain(line.stride == 1 && line.output_length + line.before() + line.after() <= sites),
        piece(plain ? line.output_length : std::min(line.output_length, sites)) {}

  void Carve(Carver& carver) {
    rows = carver.Take<float>(copies * copy());
    bits = carver.Take<uint64_t>(words());
  }
  int64_t words() const { return CeilDiv(piece, 64); }
  int64_t copy() const { return sites * block; }
  void Clear() const {
    std::memset(rows, 0, copies * copy() * sizeof(float));
    std::memset(bits, 0, words() * sizeof(uint64_t));
  }
  // The row of the first output site.
  float* first(const LineWindow& line) const { return rows + (plain ? line.before() * block : 0); }
  // The row that place 0 of an input line reaches through tap 0, where the buffer is plain.
  float* origin(const LineWindow& line) const { return rows + (line.before() + line.low) * block; }
};

struct ForwardPlan {
  int64_t block, line_sites, copies, max_rows, room, stage, parts, workers;
};

template <typename T>
struct ForwardWorker {
  LineBuffer line;
  LineEntries entries;
  Segment* segments = nullptr;
  uint64_t* read_bits = nullptr;  // [tap]: sites that an output line reads; zero between lines
  RunningTopK<T>* best = nullptr;
  int32_t* digits = nullptr;  // their counts, where there is one part
  Candidates candidates = {};
  int64_t free_stage = 0;  // room that each stage has at least

  void Carve(Carver& carver, const Lines& lines, const ForwardPlan& plan) {
    line.Carve(carver);
    entries.Carve(carver);
    segments = carver.Take<Segment>(lines.tap_lines);
    read_bits = carver.Take<uint64_t>(lines.line.taps * entries.words);
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
    for (int64_t row = part * lines.rows / plan.parts; row < last;) {
      const int64_t rows = SortSlab(item, row, std::min(plan.max_rows, last - row), worker.entries);
      LineWalk walk(lines, row * lines.row_lines);
      for (int64_t line = row * lines.row_lines; line < (row + rows) * lines.row_lines; ++line) {
        RunLine<Loops, kOctets>(item, block, line, walk, worker);
        walk.Next();
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

  // Sorts the input lines of as many output rows from `row` as the room allows, `rows` at most, and
  // returns how many. No lines are sorted where already one row has too many entries.
  int64_t SortSlab(int64_t item, int64_t row, int64_t rows, LineEntries& entries) const {
    for (;; rows = CeilDiv(rows, 2)) {
      int64_t first, last, count = 0;
      lines.InputRows(row, row + rows, first, last);
      first *= lines.input_row_lines, last *= lines.input_row_lines;
      const int64_t length = lines.line.input_length;
      for (int64_t ic = 0; ic < s.in_channels; ++ic) {
        const Range range(KeysOf(item, ic), s.slots, first * length, last * length);
        count += range.last - range.first;
      }
      if (count > entries.room && rows > 1) continue;
      entries.lines = 0;
      if (count <= entries.room) {
        entries.Sort(
            first, last - first, length, s.slots, first * length, last * length, 0, s.in_channels,
            [&](int64_t ic) { return KeysOf(item, ic); },
            [&](int64_t ic) { return ValuesOf(item, ic); },
            [&](int64_t ic, int64_t) { return WeightsOf(ic); });
      }
      return rows;
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
        *segment = {nullptr, nullptr, t->weights, t->live, t->all_live};
        if (!sorted) {
          any |= AddUnsorted<Loops, kOctets>(item, read, begin, end, *segment, buffer);
          continue;
        }
        segment->begin = worker.entries.begin(read);
        segment->end = worker.entries.end(read);
        if (segment->begin == segment->end) continue;
        if (plain) {
          const uint64_t* bitmap = worker.entries.bitmap(read);
          for (int64_t tap = 0; tap < lines.line.taps; ++tap) {
            if (!t->live_taps[tap]) continue;
            for (int64_t i = 0; i < words; ++i) read_bits[tap * words + i] |= bitmap[i];
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
      MakeRoom(end - begin, std::min(plan.block, s.out_channels - block * plan.block), worker);
      const auto take = buffer.copies > 1 ? Loops::template kTakeResponses<kOctets, 3, T>
                                          : Loops::template kTakeResponses<kOctets, 1, T>;
      take(buffer.bits, CeilDiv(end - begin, 64), buffer.first(lines.line), buffer.copy(),
           line * lines.line.output_length + begin, worker.candidates);
    }
  }

  template <typename Loops, int kOctets>
  void AddPlain(const Segment* segment, const Segment* last, const LineBuffer& buffer) const {
    const int64_t taps = lines.line.taps, step = lines.line.dilation * plan.block;
    float* origin = buffer.origin(lines.line);
    if (taps == 3) {
      const int64_t to_next = buffer.copies > 1 ? step - buffer.copy() : step;
      return Loops::template kAddPlain<kOctets, 3>(segment, last, origin, to_next, 0);
    }
    for (int64_t t = 0; t < taps; ++t) {
      Loops::template kAddPlain<kOctets, 1>(segment, last, origin - t * step, step, t);
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

ffi::Error ConvFwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::Buffer<ffi::S32>> out_keys,
                       ffi::Result<ffi::AnyBuffer> out_values,
                       ffi::Result<ffi::Buffer<ffi::S32>> responses,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, std::string_view select_name,
                       Span input_shape, Span window_shape, Span strides, Span dilation, Span low,
                       Span output_shape, int64_t channel_block, int64_t line_sites, int64_t copies,
                       int64_t max_rows, int64_t room, int64_t stage, int64_t parts,
                       int64_t workers) {
  Window w;
  ConvShape s;
  Select select;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(ConvShape::Read(keys, values, kernel_keys, weights, *out_keys, w, s));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: bias", bias, {s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: out_values", *out_values, {s.batch, s.out_channels, s.capacity}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: responses", *responses, {s.batch, s.out_channels}));
  ILAJAX_RETURN_IF_ERROR(ReadSelect(select_name, select));
  if (out_values->element_type() != values.element_type()) {
    return InvalidArgument("conv: values and out_values have different dtypes");
  }
  w = Squeeze(w);
  const Lines lines(w);
  const LineBuffer buffer(lines.line, line_sites, channel_block, copies);
  if (line_sites < 1 || max_rows < 1 || room < 1 || parts < 1 || parts > lines.rows ||
      workers < 1 || (copies != 1 && copies != 3) || stage / 2 <= buffer.piece ||
      !IsBlock(channel_block)) {
    return InvalidArgument("conv: the plan does not fit the shapes");
  }
  const ForwardPlan plan = {channel_block, line_sites, copies, max_rows,
                            room,          stage,      parts,  workers};
  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    Carver carver(workspace->untyped_data());
    Filters filters = {plan.block, CeilDiv(s.out_channels, plan.block), s.in_channels, w.taps,
                       lines.line.taps};
    filters.Carve(carver);
    TapLines tap_lines = {filters.blocks, lines.tap_lines};
    tap_lines.Carve(carver);
    float* padded_bias = carver.Take<float>(filters.blocks * plan.block);
    PartSelections<T> selections = {
        parts, std::min(s.capacity, CeilDiv(lines.rows, parts) * (w.output_sites / lines.rows)),
        s.batch * s.out_channels};
    selections.Carve(carver);
    ForwardWorker<T> layout;
    layout.line = buffer;
    layout.entries = {lines.InputLines(plan.max_rows), CeilDiv(lines.line.input_length, 64), room};
    const WorkerSlices slices(carver, *workspace, workers,
                              [&](Carver& own) { layout.Carve(own, lines, plan); });
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, slices.end()));
    filters.Fill(w, s.weights, s.out_channels, kernel_keys.typed_data(), weights.typed_data());
    tap_lines.Fill(lines, filters);
    std::fill_n(padded_bias, filters.blocks * plan.block, 0.0f);
    std::copy_n(bias.typed_data(), s.out_channels, padded_bias);
    if (parts > 1) std::fill_n(selections.digits, selections.segments * kDigits, 0);
    const Forward<T> forward = {s,
                                lines,
                                filters,
                                tap_lines,
                                plan,
                                select,
                                w.output_sites,
                                keys.typed_data(),
                                Data<T>(values),
                                padded_bias,
                                out_keys->typed_data(),
                                Data<T>(*out_values),
                                responses->typed_data(),
                                selections};
    for (int64_t i = 0; i < workers; ++i) {
      const ForwardWorker<T> worker = slices.Take(i, layout, lines, plan);
      worker.line.Clear();
      std::fill_n(worker.read_bits, lines.line.taps * worker.entries.words, 0);
    }
    ParallelFor(pool, s.batch * filters.blocks * parts, workers, [&](int64_t task, int64_t id) {
      ForwardWorker<T> worker = slices.Take(id, layout, lines, plan);
      const int64_t rest = task / parts;
      DispatchLoops(plan.block, [&]<typename Loops, int kOctets>() {
        forward.template Run<Loops, kOctets>(rest / filters.blocks, rest % filters.blocks,
                                             task % parts, worker);
      });
    });
    if (parts == 1) return ffi::Error::Success();
    ParallelFor(pool, s.batch * s.out_channels, workers, [&](int64_t segment, int64_t) {
      responses->typed_data()[segment] =
          selections.Merge(segment, select, s.capacity, w.output_sites,
                           out_keys->typed_data() + segment * s.capacity,
                           Data<T>(*out_values) + segment * s.capacity);
    });
    return ffi::Error::Success();
  });
}

struct BackwardPlan {
  int64_t block, line_sites, slab_rows, room, parts, workers;
};

struct BackwardWorker {
  LineBuffer line;
  LineEntries entries;
  Segment* segments = nullptr;
  float* values_bar = nullptr;   // [entry]
  int32_t* begins = nullptr;     // [oc]: the kept outputs of the line, as slots [begin, end)
  int32_t* ends = nullptr;       // [oc]
  float* weights_bar = nullptr;  // as Filters::rows

  void Carve(Carver& carver, const Lines& lines, const Filters& filters) {
    line.Carve(carver);
    entries.Carve(carver);
    segments = carver.Take<Segment>(lines.tap_lines);
    values_bar = carver.Take<float>(entries.room);
    begins = carver.Take<int32_t>(filters.block);
    ends = carver.Take<int32_t>(filters.block);
    weights_bar = carver.Take<float>(filters.size());
  }
};

template <typename T>
struct Backward {
  const ConvShape& s;
  const Lines& lines;
  const Filters& filters;
  const TapLines& tap_lines;
  const BackwardPlan& plan;
  const int32_t* keys;
  const T* values;
  const int32_t* out_keys;
  const T* cotangent;
  T* values_bar;

  const int32_t* KeysOf(int64_t item, int64_t ic) const { return keys + s.KeyOffset(item, ic); }
  const T* ValuesOf(int64_t item, int64_t ic) const {
    return values + (item * s.in_channels + ic) * s.slots;
  }

  // Input rows [begin, end) of a sample.
  template <typename Loops, int kOctets>
  void Run(int64_t item, int64_t begin, int64_t end, BackwardWorker& worker) const {
    const int64_t row = lines.input_row_lines * lines.line.input_length;
    if (worker.line.piece == lines.line.output_length) {
      return RunKeys<Loops, kOctets>(item, 0, s.in_channels, begin * row, end * row, worker);
    }
    // Long lines go in pieces, each of which is within reach of a few pieces of output.
    for (int64_t key = begin * row; key < end * row;) {
      const int64_t stop = std::min(key + worker.line.piece,
                                    (key / lines.line.input_length + 1) * lines.line.input_length);
      RunKeys<Loops, kOctets>(item, 0, s.in_channels, key, stop, worker);
      key = stop;
    }
  }

  // The entries of channels [ic_begin, ic_end) with keys in [begin, end), halved until they have
  // room.
  template <typename Loops, int kOctets>
  void RunKeys(int64_t item, int64_t ic_begin, int64_t ic_end, int64_t begin, int64_t end,
               BackwardWorker& worker) const {
    int64_t count = 0;
    for (int64_t ic = ic_begin; ic < ic_end; ++ic) {
      const Range range(KeysOf(item, ic), s.slots, begin, end);
      count += range.last - range.first;
    }
    if (count == 0) return;
    if (count > plan.room) {
      if (ic_end - ic_begin > 1) {
        const int64_t middle = (ic_begin + ic_end) / 2;
        RunKeys<Loops, kOctets>(item, ic_begin, middle, begin, end, worker);
        RunKeys<Loops, kOctets>(item, middle, ic_end, begin, end, worker);
      } else if (end - begin > 1) {
        const int64_t middle = begin + (end - begin) / 2;
        RunKeys<Loops, kOctets>(item, ic_begin, ic_end, begin, middle, worker);
        RunKeys<Loops, kOctets>(item, ic_begin, ic_end, middle, end, worker);
      }
      return;  // a key that stands more often than there is room for is broken
    }
    const int64_t length = lines.line.input_length;
    const int64_t first = begin / length, last = CeilDiv(end, length);
    LineEntries& entries = worker.entries;
    entries.Sort(
        first, last - first, length, s.slots, begin, end, ic_begin, ic_end,
        [&](int64_t ic) { return KeysOf(item, ic); },
        [&](int64_t ic) { return ValuesOf(item, ic); }, [](int64_t, int64_t slot) { return slot; });
    const int64_t sorted = entries.starts[last - first];
    std::memset(worker.values_bar, 0, sorted * sizeof(float));
    int64_t row_begin, row_end;
    lines.OutputRows(first / lines.input_row_lines, CeilDiv(last, lines.input_row_lines), row_begin,
                     row_end);
    for (int64_t block = 0; block < filters.blocks; ++block) {
      for (int64_t j = 0; j < plan.block; ++j) worker.ends[j] = -1;
      LineWalk walk(lines, row_begin * lines.row_lines);
      for (int64_t line = row_begin * lines.row_lines; line < row_end * lines.row_lines; ++line) {
        RunLine<Loops, kOctets>(item, block, line, walk, begin, end, worker);
        walk.Next();
      }
    }
    for (int64_t i = 0; i < sorted; ++i) {
      const Entry& e = entries.entries[i];
      values_bar[(item * s.in_channels + e.channel) * s.slots + e.aux] = T(worker.values_bar[i]);
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
      if (read < entries.first_line || read >= entries.first_line + entries.lines) continue;
      if (entries.begin(read) == entries.end(read)) continue;
      *segment++ = {entries.begin(read), entries.end(read), t->weights, t->live, t->all_live};
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
        Loops::template kGatherCarefully<kOctets>(
            worker.segments, segment, along, begin, end, buffer.first(along), entries.entries,
            worker.values_bar, filters.rows, worker.weights_bar);
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
      loop(worker.segments, last, origin - tap * step, step, tap, taps, worker.entries.entries,
           worker.values_bar, filters.rows, worker.weights_bar);
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
      const int64_t segment = (item * s.out_channels + block * plan.block + j) * s.capacity;
      const int32_t* key = out_keys + segment;
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
      const int64_t segment = (item * s.out_channels + block * plan.block + j) * s.capacity;
      for (int64_t i = segment + worker.begins[j]; i < segment + worker.ends[j]; ++i) {
        const int64_t site = out_keys[i] - first_key;
        if (site >= 0 && site < sites) f(rows[site * plan.block + j], i);
      }
    }
  }
};

ffi::Error ConvBwdImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> kernel_keys, ffi::Buffer<ffi::F32> weights,
                       ffi::Buffer<ffi::S32> out_keys, ffi::AnyBuffer cotangent,
                       ffi::Result<ffi::AnyBuffer> values_bar,
                       ffi::Result<ffi::Buffer<ffi::F32>> weights_bar,
                       ffi::Result<ffi::Buffer<ffi::F32>> bias_bar,
                       ffi::Result<ffi::Buffer<ffi::U8>> workspace, Span input_shape,
                       Span window_shape, Span strides, Span dilation, Span low, Span output_shape,
                       int64_t channel_block, int64_t line_sites, int64_t slab_rows, int64_t room,
                       int64_t parts, int64_t workers) {
  Window w;
  ConvShape s;
  ILAJAX_RETURN_IF_ERROR(
      Window::Read(input_shape, window_shape, strides, dilation, low, output_shape, w));
  ILAJAX_RETURN_IF_ERROR(ConvShape::Read(keys, values, kernel_keys, weights, out_keys, w, s));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: cotangent", cotangent, {s.batch, s.out_channels, s.capacity}));
  ILAJAX_RETURN_IF_ERROR(
      CheckShape("conv: values_bar", *values_bar, {s.batch, s.in_channels, s.slots}));
  if (cotangent.element_type() != values.element_type() ||
      values_bar->element_type() != values.element_type()) {
    return InvalidArgument("conv: values, cotangent and values_bar have different dtypes");
  }
  const int64_t groups = weights_bar->dimensions().size() == 2 ? weights_bar->dimensions()[0] : 0;
  if (groups < 1 || s.batch % groups != 0) {
    return InvalidArgument("conv: a batch of ", s.batch, " does not hold ", groups, " groups");
  }
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: weights_bar", *weights_bar, {groups, s.weights}));
  ILAJAX_RETURN_IF_ERROR(CheckShape("conv: bias_bar", *bias_bar, {groups, s.out_channels}));
  w = Squeeze(w);
  const Lines lines(w);
  if (line_sites < 1 || slab_rows < 1 || room < 1 || parts < 1 || workers < 1 ||
      !IsBlock(channel_block)) {
    return InvalidArgument("conv: the plan does not fit the shapes");
  }
  const BackwardPlan plan = {channel_block, line_sites, slab_rows, room, parts, workers};

  return DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error {
    Carver carver(workspace->untyped_data());
    Filters filters = {plan.block, CeilDiv(s.out_channels, plan.block), s.in_channels, w.taps,
                       lines.line.taps};
    filters.Carve(carver);
    TapLines tap_lines = {filters.blocks, lines.tap_lines};
    tap_lines.Carve(carver);
    float* part_sums = carver.Take<float>(groups * parts * s.weights);
    BackwardWorker layout;
    layout.line = LineBuffer(lines.line, line_sites, channel_block, 1);
    layout.entries = {std::min(slab_rows, lines.input_rows) * lines.input_row_lines, 0, room};
    const WorkerSlices slices(carver, *workspace, workers,
                              [&](Carver& own) { layout.Carve(own, lines, filters); });
    ILAJAX_RETURN_IF_ERROR(CheckWorkspace("conv", *workspace, slices.end()));
    filters.Fill(w, s.weights, s.out_channels, kernel_keys.typed_data(), weights.typed_data());
    tap_lines.Fill(lines, filters);
    std::memset(values_bar->untyped_data(), 0, values_bar->size_bytes());
    const Backward<T> backward = {s,
                                  lines,
                                  filters,
                                  tap_lines,
                                  plan,
                                  keys.typed_data(),
                                  Data<T>(values),
                                  out_keys.typed_data(),
                                  Data<T>(cotangent),
                                  Data<T>(*values_bar)};
    for (int64_t i = 0; i < workers; ++i) slices.Take(i, layout, lines, filters).line.Clear();
    const int64_t slabs = CeilDiv(lines.input_rows, slab_rows);
    const int64_t units = s.batch / groups * slabs;
    ParallelFor(pool, groups * parts, workers, [&](int64_t task, int64_t id) {
      BackwardWorker worker = slices.Take(id, layout, lines, filters);
      std::memset(worker.weights_bar, 0, filters.size() * sizeof(float));
      const int64_t group = task / parts, part = task % parts;
      for (int64_t unit = part * units / parts; unit < (part + 1) * units / parts; ++unit) {
        const int64_t item = group * (s.batch / groups) + unit / slabs;
        const int64_t row = unit % slabs * slab_rows;
        DispatchLoops(plan.block, [&]<typename Loops, int kOctets>() {
          backward.template Run<Loops, kOctets>(
              item, row, std::min(row + slab_rows, lines.input_rows), worker);
        });
      }
      filters.Gather(kernel_keys.typed_data(), s.weights, s.out_channels, worker.weights_bar,
                     part_sums + task * s.weights);
    });
    AddParts(part_sums, groups, parts, s.weights, weights_bar->typed_data());
    const KeptCotangents<T> kept = {s.batch / groups, s.out_channels,        s.capacity,
                                    w.output_sites,   out_keys.typed_data(), Data<T>(cotangent)};
    ParallelFor(pool, groups * s.out_channels, workers, [&](int64_t task, int64_t) {
      bias_bar->typed_data()[task] = kept.Sum(task / s.out_channels, task % s.out_channels);
    });
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace ilajax

XLA_FFI_DEFINE_HANDLER_SYMBOL(ConvFwd, ilajax::ConvFwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kernel_keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // bias
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // out_keys
                                  .Ret<xla::ffi::AnyBuffer>()              // out_values
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()  // responses
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<std::string_view>("select")
                                  .Attr<ilajax::Span>("input_shape")
                                  .Attr<ilajax::Span>("window_shape")
                                  .Attr<ilajax::Span>("strides")
                                  .Attr<ilajax::Span>("dilation")
                                  .Attr<ilajax::Span>("low")
                                  .Attr<ilajax::Span>("output_shape")
                                  .Attr<int64_t>("channel_block")
                                  .Attr<int64_t>("line_sites")
                                  .Attr<int64_t>("copies")
                                  .Attr<int64_t>("max_rows")
                                  .Attr<int64_t>("room")
                                  .Attr<int64_t>("stage")
                                  .Attr<int64_t>("parts")
                                  .Attr<int64_t>("workers"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(ConvBwd, ilajax::ConvBwdImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // keys
                                  .Arg<xla::ffi::AnyBuffer>()              // values
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // kernel_keys
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // out_keys
                                  .Arg<xla::ffi::AnyBuffer>()  // cotangent of out_values
                                  .Ret<xla::ffi::AnyBuffer>()  // values_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // weights_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()  // bias_bar
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>()   // workspace
                                  .Attr<ilajax::Span>("input_shape")
                                  .Attr<ilajax::Span>("window_shape")
                                  .Attr<ilajax::Span>("strides")
                                  .Attr<ilajax::Span>("dilation")
                                  .Attr<ilajax::Span>("low")
                                  .Attr<ilajax::Span>("output_shape")
                                  .Attr<int64_t>("channel_block")
                                  .Attr<int64_t>("line_sites")
                                  .Attr<int64_t>("slab_rows")
                                  .Attr<int64_t>("room")
                                  .Attr<int64_t>("parts")
                                  .Attr<int64_t>("workers"));
