// Direct sparse convolution with k-selection on the CPU, and its gradient.
//
// The grid is seen as lines along its last axis (lines/lines.h), and a convolution goes from output
// line to output line, each of which reads a handful of input lines, one for each line of taps. Its
// sums stand in a buffer [site][channel of a block] in the first-level cache. The grid itself is
// never allocated, cleared or scanned. An input line comes in one of three forms, chosen by what it
// holds:
//
//   entries   of all channels, sorted into the line. Each adds its weights to the sites it reaches;
//             work follows stored entries x live taps.
//   stacks    of all channels, for each site in use, where many of them are stored there. A site's
//             channels are summed in registers (lines/lines.h, lines/sort.inc).
//   dense     site by site, where filters are pruned or the grid is nearly full. One live weight at
//             a time is added along the line; work follows lines x live weights (lines/dense.h).
//
// A bitmap, the shifted bitmaps of the input lines, says which sites of a line to read, hand to the
// selection and clear.
//
// Nothing depends on threads. A response's sum goes by line of taps, and within it as the form of
// the input line has it; forward, the form depends on the sample alone, and backward on the slab. A
// slab that holds an inf or NaN takes the careful loops. Results are repeatable.
//
// Forward (lines/sums.h) each output channel's responses go to a running selection. With several
// parts each part selects for itself, and their lists are merged at the end. Backward:
// lines/gradient.h.

#include <algorithm>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/conv/spec.h"
#include "xla_kernels/lines/gradient.h"
#include "xla_kernels/lines/sums.h"

namespace ilajax {
namespace {

struct ForwardPlan {
  SumsPlan sums;
  int64_t stage;  // responses of a channel between two looks at what can be dropped
  int64_t parts;  // of the output planes, which select for themselves
  int64_t workers;
};

template <typename T>
struct ForwardWorker {
  SumsWorker sums;
  RunningTopK<T>* best;
  int32_t* digits;  // their counts, where there is one part
  Candidates candidates = {};
  int64_t free_stage = 0;  // what each stage can take, at least

  ForwardWorker(Carver& carver, const Lines& lines, const ForwardPlan& plan)
      : sums(carver, lines, plan.sums),
        best(carver.Take<RunningTopK<T>>(plan.sums.block)),
        digits(carver.Take<int32_t>(plan.parts == 1 ? plan.sums.block * kDigits : 0)) {
    candidates.length = carver.Take<int32_t>(plan.sums.block);
    candidates.least = carver.Take<float>(plan.sums.block);
    candidates.counts = carver.Take<int32_t>(plan.sums.block);
    candidates.stage = carver.Take<uint64_t>(plan.sums.block, plan.stage);
    candidates.size = plan.stage;
  }
};

// What one part of the planes keeps of each segment, where there are several.
template <typename T>
struct PartSelections {
  int64_t parts, capacity, segments;
  int32_t* keys;  // [segment][part][capacity]
  T* values;
  int32_t* stored;  // [segment][part]
  int32_t* counts;  // candidates
  int32_t* digits;  // [segment]: all parts' candidates by the first digit of their rank

  PartSelections(Carver& carver, const ConvShape& s, const Lines& lines, int64_t part_count)
      : parts(part_count),
        capacity(
            std::min(s.capacity, CeilDiv(lines.planes, parts) * (s.w.output_sites / lines.planes))),
        segments(parts == 1 ? 0 : s.batch * s.out_channels),
        keys(carver.Take<int32_t>(segments, parts, capacity)),
        values(carver.Take<T>(segments, parts, capacity)),
        stored(carver.Take<int32_t>(segments, parts)),
        counts(carver.Take<int32_t>(segments, parts)),
        digits(carver.Take<int32_t>(segments, kDigits)) {}

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
struct ForwardLayout {
  Window w;
  Lines lines;
  SumsTables tables;
  float* bias;  // [block of channels][channel], zeros behind the last
  PartSelections<T> selections;
  LayoutOfEach<ForwardWorker<T>> workers;

  ForwardLayout(Carver& carver, const ConvShape& s, const ForwardPlan& plan)
      : w(Squeeze(s.w)),
        lines(w),
        tables(carver, s, lines, plan.sums),
        bias(carver.Take<float>(tables.filters.blocks, plan.sums.block)),
        selections(carver, s, lines, plan.parts),
        workers(carver, plan.workers, lines, plan) {}
};

template <typename T>
struct Forward {
  const LineSums<T>& sums;
  const ForwardPlan& plan;
  Select select;
  int64_t output_sites;
  const float* bias;  // [blocks * block]
  int32_t* out_keys;
  T* out_values;
  int32_t* responses;
  const PartSelections<T>& selections;

  template <typename Loops, int kOctets>
  void Run(int64_t item, int64_t block, int64_t part, ForwardWorker<T>& worker) const {
    const ConvShape& s = sums.s;
    const int64_t width = sums.plan.block, first = block * width;
    const int64_t channels = std::min(width, s.out_channels - first);
    Candidates& c = worker.candidates;
    c.bias = bias + first;
    c.floor = select == Select::kPositive ? 0.0f : __builtin_nanf("");
    c.rank_mask = select == Select::kMagnitude ? 0x7fffffff : -1;
    for (int64_t j = 0; j < width; ++j) {
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
    const int64_t planes = sums.lines.planes;
    sums.template Run<Loops, kOctets>(
        item, block, part * planes / plan.parts, (part + 1) * planes / plan.parts, worker.sums,
        [&](int64_t first_key, int64_t sites) {
          FreeStages(sites, channels, worker);
          const LineBuffer& line = worker.sums.line;
          Loops::template kTakeResponses<kOctets, T>(line.bits, CeilDiv(sites, 64),
                                                     line.first(sums.lines.line), first_key, c);
        });
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

  // Sees to it that every channel's stage takes in `sites` responses, and a word behind them.
  void FreeStages(int64_t sites, int64_t channels, ForwardWorker<T>& worker) const {
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

struct ConvForward {
  using Call = ConvFwd;
  using Plan = ForwardPlan;
  template <typename T>
  using Layout = ForwardLayout<T>;

  // Tasks are (sample, block of output channels, part of the planes), each over all lines of its
  // part.
  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    const Lines lines(Squeeze(s.w));
    const int64_t budget = tuning.CpuWorkspace(s.w.sites());
    Plan plan = {MakeSumsPlan(s, lines, tuning), 0, 1, 0};
    const int64_t tables = SizeOf<ForwardLayout<T>>(s, plan);
    const int64_t block = plan.sums.block, tasks = s.batch * CeilDiv(s.out_channels, block);
    plan.parts = PartsOf(lines.planes, tasks, tuning);
    const auto selections = [&] { return SizeOf<PartSelections<T>>(s, lines, plan.parts); };
    while (plan.parts > 1 && selections() > (budget - tables) / 2) --plan.parts;

    // Half of a stage takes in a whole line at once. With one part, a stage twice as large as the
    // output mostly takes in all; with several an early look at the others' counts keeps lists
    // short.
    const int64_t line = std::min(plan.sums.line_sites, lines.line.output_length);
    int64_t entries = std::min<int64_t>(s.capacity, 1 << 11);
    if (plan.parts == 1) {
      const int64_t fit = (budget - tables) / 4 / (block * static_cast<int64_t>(sizeof(uint64_t)));
      entries = std::min({std::max<int64_t>(2 * s.capacity, 1 << 10), int64_t{1 << 16}, fit});
    }
    // The channels' stages fill at the same pace: an odd number of cache lines between them keeps
    // them from sharing one set of the cache.
    plan.stage = CeilDiv(std::max(2 * (line + 1), entries), 512) * 512 + 40;
    if (tuning.stage > 0) plan.stage = tuning.stage;
    const int64_t shared = tables + selections();
    plan.workers =
        tuning.Workers(tasks * plan.parts, SizeOf<ForwardWorker<T>>(lines, plan), budget - shared);
    return plan;
  }
  static bool Fits(const ConvShape& s, const Plan& plan) {
    const Lines lines(Squeeze(s.w));
    return ilajax::Fits(plan.sums, lines, s.in_channels) && plan.parts >= 1 &&
           plan.parts <= lines.planes && plan.workers >= 1 &&
           plan.stage / 2 > LineBuffer(lines.line, plan.sums.line_sites, plan.sums.block).piece;
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, ConvFwd call, const ConvShape& s, const Plan& plan,
                        Layout<T>& layout) {
    const auto& [w, lines, tables, bias, selections, workers] = layout;
    Select select;
    ILAJAX_RETURN_IF_ERROR(ReadSelect(call.select, select));
    layout.tables.Fill(s, w, lines, call.kernel_keys.typed_data(), call.weights.typed_data());
    const int64_t blocks = tables.filters.blocks;
    std::fill_n(bias, blocks * plan.sums.block, 0.0f);
    std::copy_n(call.bias.typed_data(), s.out_channels, bias);
    std::fill_n(selections.digits, selections.segments * kDigits, 0);
    for (int64_t i = 0; i < plan.workers; ++i) workers.At(i, lines, plan).sums.Clear(lines);

    int32_t* const out_keys = call.out_keys->typed_data();
    T* const out_values = Data<T>(*call.out_values);
    int32_t* const responses = call.responses->typed_data();
    const StoredInput<T> input = {s, call.keys.typed_data(), Data<T>(call.values)};
    const LineSums<T> sums = {input, lines, tables, plan.sums};
    const Forward<T> forward = {sums,     plan,       select,    w.output_sites, bias,
                                out_keys, out_values, responses, selections};
    ParallelFor(pool, s.batch * blocks * plan.parts, plan.workers, [&](int64_t task, int64_t id) {
      ForwardWorker<T> worker = layout.workers.At(id, lines, plan);
      const int64_t rest = task / plan.parts;
      DispatchLoops(plan.sums.block, [&]<typename Loops, int kOctets>() {
        forward.template Run<Loops, kOctets>(rest / blocks, rest % blocks, task % plan.parts,
                                             worker);
      });
    });
    ParallelFor(pool, selections.segments, plan.workers, [&](int64_t segment, int64_t) {
      responses[segment] = layout.selections.Merge(segment, select, s.capacity, s.w.output_sites,
                                                   out_keys + segment * s.capacity,
                                                   out_values + segment * s.capacity);
    });
    return ffi::Error::Success();
  }
};

using ConvBackward = LineGradient<ConvBwd>;

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(ConvFwd, ConvForward);
ILAJAX_CPU_TARGET(ConvBwd, ConvBackward);
