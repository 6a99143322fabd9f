// Convolution that keeps the strongest sites, on the CPU.
//
// The sites that live taps reach are marked in a bitmap, and their responses come from matrix products
// over pairs of sites (products/pairs.h), a chunk of sites at a time. Of these only each site's score
// is kept, 4 bytes a site, and the best sites' responses are made once more. Where all reached sites
// fit into the output there is nothing to make twice: the responses go there at once, and those of
// sites where nothing passes are taken out.

#include <cfloat>

#include "xla_kernels/common/selection.h"
#include "xla_kernels/conv_by_site/candidates.h"
#include "xla_kernels/conv_by_site/spec.h"
#include "xla_kernels/products/forward.h"

namespace ilajax {
namespace {

using products::Plan;

constexpr int64_t kLines = 256;  // that a task marks

// What a worker needs besides its pairs.
template <typename T>
struct Scratch {
  Marker::Rows rows;
  int32_t* keys;  // of a chunk,
  T* values;      // and their responses [channel][site]

  Scratch(Carver& carver, const ConvBySiteShape& s, const LineWindow& line, const Plan& plan)
      : rows(carver, line),
        keys(carver.Take<int32_t>(plan.chunk)),
        values(carver.Take<T>(s.out_channels, plan.chunk)) {}
};

template <typename T>
struct SiteLayout {
  products::Layout products;
  bool* live;  // [tap]
  LayoutOfEach<Candidates> candidates;
  LayoutOfEach<Scratch<T>> scratch;

  SiteLayout(Carver& carver, const ConvBySiteShape& s, const Plan& plan)
      : products(carver, s, plan),
        live(carver.Take<bool>(s.w.taps)),
        candidates(carver, plan.samples, s),
        scratch(carver, plan.workers, s, products.reach.lines.line, plan) {}
};

// What is not above 0 does not pass; NaN does.
template <typename T>
void DropRest(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(values[i]);
    values[i] = T(value <= 0.0f ? 0.0f : value);
  }
}

// scores += p^2. However small p is, its site is a candidate.
template <typename T>
void AddSquares(const T* values, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; ++i) {
    const float p = static_cast<float>(values[i]), score = scores[i] + p * p;
    scores[i] = p != 0.0f && score < FLT_MIN ? FLT_MIN : score;
  }
}

template <typename Loops, typename T>
class BySite {
 public:
  BySite(ConvBySiteFwd& call, const ConvBySiteShape& shape, const Plan& how,
         const SiteLayout<T>& where, bool only_positive)
      : s(shape),
        plan(how),
        own(where),
        layout(where.products),
        positive(only_positive),
        keys(call.keys.typed_data()),
        values(Data<T>(call.values)),
        kernel_keys(call.kernel_keys.typed_data()),
        weights(call.weights.typed_data()),
        bias(call.bias.typed_data()),
        out_keys(call.out_keys->typed_data()),
        features(Data<T>(*call.features)),
        responses(call.responses->typed_data()) {}

  void Run(ffi::ThreadPool& pool) const {
    FillTables(pool);
    for (int64_t item = 0; item < s.batch; item += plan.samples) {
      const int64_t count = std::min(plan.samples, s.batch - item);
      products::LayOut<Loops>(pool, layout, plan, keys, item, count);
      MarkAll(pool, count);
      ForParts(pool, count, CeilDiv(s.reached(), plan.chunk),
               [&](int64_t i, int64_t part, int64_t id) { Score(item + i, i, part, id); });
      ParallelFor(pool, count, plan.workers, [&](int64_t i, int64_t) { Select(item + i, i); });
      const int64_t chunks = CeilDiv(s.capacity, plan.chunk);
      ForParts(pool, count, std::max(chunks, s.out_channels),
               [&](int64_t i, int64_t part, int64_t id) {
                 if (!AllFit(i)) {
                   if (part < chunks) Respond(item + i, i, part, id);
                 } else if (part < s.out_channels) {
                   TakeOut(item + i, i, part);
                 }
               });
    }
  }

 private:
  // Calls f(sample, part, worker) for each part of each sample.
  template <typename F>
  void ForParts(ffi::ThreadPool& pool, int64_t count, int64_t parts, F&& f) const {
    ParallelFor(pool, count * parts, plan.workers,
                [&](int64_t task, int64_t id) { f(task / parts, task % parts, id); });
  }

  products::SiteIndex SampleAt(int64_t i) const { return layout.samples.At(i, layout.d.w); }
  products::Worker WorkerAt(int64_t id) const {
    return layout.workers.At(id, layout.reach.lines, layout.d, plan);
  }
  Candidates CandidatesAt(int64_t i) const { return own.candidates.At(i, s); }
  Scratch<T> ScratchAt(int64_t id) const {
    return own.scratch.At(id, s, layout.reach.lines.line, plan);
  }
  products::Values<T> ValuesAt(int64_t item) const {
    return {values + item * s.in_channels * s.slots, s.slots, s.in_channels};
  }
  T* FeaturesAt(int64_t item) const { return features + item * s.out_channels * s.capacity; }

  // Whether all candidates' responses are in the output already.
  bool AllFit(int64_t i) const { return CandidatesAt(i).count() <= s.capacity; }

  void FillTables(ffi::ThreadPool& pool) const {
    products::FillBias(layout, bias, s.out_channels);
    products::FillTables(pool, layout, plan, s, kernel_keys, weights);
    const products::TapMatrices& m = layout.matrices;
    for (int64_t tap = 0; tap < m.taps; ++tap) {
      const int32_t* const live = m.live + tap * m.blocks;
      own.live[tap] = std::any_of(live, live + m.blocks, [](int32_t n) { return n > 0; });
    }
  }

  void MarkAll(ffi::ThreadPool& pool, int64_t count) const {
    ParallelFor(pool, count, plan.workers, [&](int64_t i, int64_t) { CandidatesAt(i).Clear(); });
    const int64_t lines = s.w.output_sites / layout.reach.lines.line.output_length;
    const Marker marker(layout.reach, own.live);
    ForParts(pool, count, CeilDiv(lines, kLines), [&](int64_t i, int64_t part, int64_t id) {
      const products::SiteIndex index = SampleAt(i);
      for (int64_t line = part * kLines; line < std::min((part + 1) * kLines, lines); ++line) {
        marker.Mark(line, index, ScratchAt(id).rows, WorkerAt(id).lists.bases, CandidatesAt(i));
      }
    });
    ParallelFor(pool, count, plan.workers,
                [&](int64_t i, int64_t) { CandidatesAt(i).template Rank<Loops>(); });
  }

  // Puts the responses at `count` sites to to[channel][step], as far as they pass.
  void PutPassed(int64_t item, int64_t i, const int32_t* sites, int64_t count,
                 const products::Worker& worker, T* to, int64_t step) const {
    products::SumProducts<Loops>(layout, {SampleAt(i), nullptr, 0}, ValuesAt(item), sites, 0, count,
                                 worker);
    Loops::template kFromStacks<T>(worker.sums.data, worker.sums.step, layout.bias, s.out_channels,
                                   0, count, to, step, nullptr);
    for (int64_t c = 0; positive && c < s.out_channels; ++c) DropRest(to + c * step, count);
  }

  void Score(int64_t item, int64_t i, int64_t part, int64_t id) const {
    const Candidates found = CandidatesAt(i);
    const int64_t begin = part * plan.chunk, end = std::min(begin + plan.chunk, found.count());
    if (begin >= end) return;
    const Scratch<T> scratch = ScratchAt(id);
    found.ForEach(begin, end, [&](int64_t rank, int64_t key) {
      scratch.keys[rank - begin] = static_cast<int32_t>(key);
    });
    const bool fits = AllFit(i);
    T* const to = fits ? FeaturesAt(item) + begin : scratch.values;
    const int64_t step = fits ? s.capacity : plan.chunk;
    PutPassed(item, i, scratch.keys, end - begin, WorkerAt(id), to, step);
    std::fill(found.scores + begin, found.scores + end, 0.0f);
    for (int64_t c = 0; c < s.out_channels; ++c) {
      AddSquares(to + c * step, end - begin, found.scores + begin);
    }
  }

  // Writes the keys of the best sites, and how many candidates there are.
  void Select(int64_t item, int64_t i) const {
    const Candidates found = CandidatesAt(i);
    const float *const scores = found.scores, *const end = scores + found.count();
    const int64_t count = std::count_if(scores, end, [](float score) { return score != 0.0f; });
    responses[item] = static_cast<int32_t>(count);
    const RankCut cut(count, s.capacity, [&](auto&& f) {
      for (const float* score = scores; score != end; ++score) {
        if (*score != 0.0f) f(RankBits(*score, Select::kValue));
      }
    });
    int32_t* const kept = out_keys + item * s.capacity;
    int64_t slot = 0, ties = cut.ties;
    found.ForEach(0, found.count(), [&](int64_t rank, int64_t key) {
      const float score = scores[rank];
      if (score == 0.0f || !cut.Keeps(RankBits(score, Select::kValue), ties)) return;
      kept[slot++] = static_cast<int32_t>(key);
    });
    std::fill(kept + slot, kept + s.capacity, static_cast<int32_t>(s.w.output_sites));
  }

  // Makes the responses at a chunk of the sites that were kept.
  void Respond(int64_t item, int64_t i, int64_t part, int64_t id) const {
    const int64_t begin = part * plan.chunk, end = std::min(begin + plan.chunk, s.capacity);
    const int32_t* const kept = out_keys + item * s.capacity;
    const int64_t stored = products::Stored(kept, s.capacity, s.w.output_sites);
    const int64_t last = std::clamp(stored, begin, end);
    PutPassed(item, i, kept + begin, last - begin, WorkerAt(id), FeaturesAt(item) + begin,
              s.capacity);
    for (int64_t c = 0; c < s.out_channels; ++c) {
      T* const values = FeaturesAt(item) + c * s.capacity;
      std::fill(values + last, values + end, T(0.0f));
    }
  }

  // Takes the sites where nothing passes out of one channel of the output.
  void TakeOut(int64_t item, int64_t i, int64_t channel) const {
    const Candidates found = CandidatesAt(i);
    T* const value = FeaturesAt(item) + channel * s.capacity;
    int64_t slot = 0;
    for (int64_t rank = 0; rank < found.count(); ++rank) {
      value[slot] = value[rank];
      slot += found.scores[rank] != 0.0f;
    }
    std::fill(value + slot, value + s.capacity, T(0.0f));
  }

  const ConvBySiteShape& s;
  const Plan& plan;
  const SiteLayout<T>& own;
  const products::Layout& layout;
  const bool positive;
  const int32_t* const keys;
  const T* const values;
  const int32_t* const kernel_keys;
  const float* const weights;
  const float* const bias;
  int32_t* const out_keys;
  T* const features;
  int32_t* const responses;
};

struct ConvBySiteForward {
  using Call = ConvBySiteFwd;
  using Plan = products::Plan;
  template <typename T>
  using Layout = SiteLayout<T>;

  template <typename T>
  static Plan Make(const ConvBySiteShape& s, const Tuning& tuning) {
    const products::Direction d(s, false);
    Plan plan = products::MakePlan(s, tuning, false);
    const int64_t worker = SizeOf<Scratch<T>>(s, Lines(d.w).line, plan);
    return products::MakePlan(s, tuning, false, SizeOf<Candidates>(s), worker);
  }
  static bool Fits(const ConvBySiteShape& s, const Plan& plan) {
    return products::Fits(s, plan, false);
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, ConvBySiteFwd call, const ConvBySiteShape& s,
                        const Plan& plan, const Layout<T>& layout) {
    bool positive = false;
    ILAJAX_RETURN_IF_ERROR(ReadSiteSelect(call.select, positive));
    products::DispatchLoops(
        [&]<typename Loops>() { BySite<Loops, T>(call, s, plan, layout, positive).Run(pool); });
    return ffi::Error::Success();
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(ConvBySiteFwd, ConvBySiteForward);
