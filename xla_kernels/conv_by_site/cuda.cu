// Convolution that keeps the strongest sites, on the GPU.
//
// For some samples at a time: a thread for each stored site and tap marks the output site that it
// reaches in a bitmap; a block for each kSpan sites lists those that are marked, and a thread makes a
// site's responses and keeps their score; common/cuda_select.cuh selects among the scores, whose keys
// are the sites' numbers among the marked ones, and a thread finds each one's key. At these the
// responses are made once more, as in convolution at given sites (products/cuda_calls.cuh).
//
// Traffic beyond the responses': the bitmap twice, and 4 bytes for each marked site a few times.

#include <cfloat>

#include "xla_kernels/common/cuda_select.cuh"
#include "xla_kernels/conv_by_site/spec.h"
#include "xla_kernels/products/cuda_calls.cuh"

namespace ilajax {
namespace {

constexpr int kSpan = 2048;  // sites of a block
constexpr int kSpanWords = kSpan / 32;
static_assert(kSites >= kSpanWords, "a thread counts the sites of one word");

// The sites of some samples that a tap reaches, in spans of kSpan, and their scores.
struct Marked {
  int64_t items, sites, spans, reached;
  uint32_t* bits;   // [item][span][kSpanWords]
  int32_t* firsts;  // [item][span + 1]: marked sites in front of the span
  float* scores;    // [item][reached]: by number; 0 where nothing passes

  Marked(Carver& carver, const ConvBySiteShape& s, int64_t some)
      : items(some),
        sites(s.w.output_sites),
        spans(CeilDiv(sites, kSpan)),
        reached(s.reached()),
        bits(carver.Take<uint32_t>(items, spans, kSpanWords)),
        firsts(carver.Take<int32_t>(items, spans + 1)),
        scores(carver.Take<float>(items, reached)) {}

  __device__ uint32_t* Bits(int64_t item, int64_t span) const {
    return bits + (item * spans + span) * kSpanWords;
  }
  __device__ int32_t* Firsts(int64_t item) const { return firsts + item * (spans + 1); }
};

__global__ void __launch_bounds__(kThreads) ClearKernel(Marked m, int32_t* responses) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  const int64_t begin = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = begin; i < m.items * m.spans * kSpanWords; i += stride) m.bits[i] = 0;
  for (int64_t i = begin; i < m.items * m.reached; i += stride) m.scores[i] = 0.0f;
  for (int64_t i = begin; i < m.items; i += stride) responses[i] = 0;
}

// The output site that reads a stored one through a tap; -1 if there is none.
__device__ int64_t ReachedSite(const Window& w, int64_t key, int64_t tap) {
  int64_t site = 0, scale = 1;
  for (int a = w.rank - 1; a >= 0; --a) {
    const int64_t from = key % w.input_shape[a] * w.input_dilation[a] + w.low[a] -
                         tap % w.window_shape[a] * w.dilation[a];
    key /= w.input_shape[a];
    tap /= w.window_shape[a];
    if (from < 0 || from % w.strides[a] != 0) return -1;
    const int64_t place = from / w.strides[a];
    if (place >= w.output_shape[a]) return -1;
    site += place * scale;
    scale *= w.output_shape[a];
  }
  return site;
}

// A thread for each stored site and tap.
__global__ void __launch_bounds__(kThreads)
    MarkKernel(Window w, Marked m, int64_t slots, const int32_t* keys) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < m.items * w.taps * slots;
       i += stride) {
    const int64_t slot = i % slots, tap = i / slots % w.taps, item = i / slots / w.taps;
    const int32_t key = keys[item * slots + slot];
    if (key < 0 || key >= w.input_sites) continue;
    const int64_t site = ReachedSite(w, key, tap);
    if (site < 0) continue;
    atomicOr(m.Bits(item, site / kSpan) + site % kSpan / 32, 1u << (site & 31));
  }
}

// The marked sites of each span: a thread for each.
__global__ void __launch_bounds__(kThreads) CountKernel(Marked m) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < m.items * m.spans;
       i += stride) {
    const int64_t item = i / m.spans, span = i % m.spans;
    int32_t count = 0;
    for (int word = 0; word < kSpanWords; ++word) count += __popc(m.Bits(item, span)[word]);
    m.Firsts(item)[span] = count;
  }
}

// Then those in front of it: a block for each sample.
__global__ void __launch_bounds__(kThreads) ScanKernel(Marked m) {
  __shared__ int scratch[kThreads / 32];
  for (int64_t item = blockIdx.x; item < m.items; item += gridDim.x) {
    int32_t* firsts = m.Firsts(item);
    int32_t before = 0;
    for (int64_t begin = 0; begin < m.spans; begin += kThreads) {
      const int64_t span = begin + threadIdx.x;
      int all;
      const int own = BlockExclusiveScan(span < m.spans ? firsts[span] : 0, scratch, all);
      if (span < m.spans) firsts[span] = before + own;
      before += all;
    }
    if (threadIdx.x == 0) firsts[m.spans] = before;
  }
}

// One block of channels of the responses.
template <typename T>
struct Scoring {
  Filter filter;
  int64_t slots, out_channels;
  const int32_t* keys;
  const T* values;
  const float* bias;
  bool positive;
  int32_t* responses;  // [item]: the candidates
};

// score += p^2 over a tile of the channels. However small p is, its site is a candidate.
template <typename T, int kColumns, int R>
__device__ float ScoreOfTile(const Scoring<T>& a, const Reach<R>& reach, int64_t sites,
                             const Sites& in, const T* values, int32_t site, int64_t tile,
                             float score) {
  float sums[kColumns] = {};
  SumTile(reach, sites, a.filter, in, values, Place(site), tile, sums);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int64_t column = tile * kColumns + j;
    if (column >= a.filter.columns() || sums[j] == 0.0f) continue;
    const float p = static_cast<float>(T(sums[j] + a.bias[a.filter.first + column]));
    if (p == 0.0f || (a.positive && p <= 0.0f)) continue;
    score += p * p;
    if (score < FLT_MIN) score = FLT_MIN;
  }
  return score;
}

// A block takes a span of one sample.
template <typename T, int kColumns, int R>
__global__ void __launch_bounds__(kSites, SiteBlocks(R))
    ScoreKernel(Marked m, Scoring<T> a, Reach<R> reach) {
  __shared__ uint16_t listed[kSpan];
  __shared__ int scratch[kSites / 32];
  const bool last = a.filter.first + a.filter.block >= a.out_channels;
  for (int64_t task = blockIdx.x; task < m.items * m.spans; task += gridDim.x) {
    const int64_t item = task / m.spans, span = task % m.spans;
    const int64_t first = m.Firsts(item)[span];
    const int own = threadIdx.x;
    uint32_t bits = own < kSpanWords ? m.Bits(item, span)[own] : 0;
    int count;
    int at = BlockExclusiveScan(__popc(bits), scratch, count);
    for (; bits != 0; bits &= bits - 1) {
      listed[at++] = static_cast<uint16_t>(own * 32 + __ffs(static_cast<int>(bits)) - 1);
    }
    __syncthreads();
    const Sites in = {a.keys + item * a.slots, a.slots};
    const T* values = a.values + item * a.filter.in_channels * a.slots;
    for (int i = own; i < count; i += kSites) {
      const int32_t site = static_cast<int32_t>(span * kSpan + listed[i]);
      float& score = m.scores[item * m.reached + first + i];
      float sum = score;
      for (int64_t tile = 0; tile < a.filter.tiles(); ++tile) {
        sum = ScoreOfTile<T, kColumns>(a, reach, m.sites, in, values, site, tile, sum);
      }
      score = sum;
      if (last && sum != 0.0f) atomicAdd(&a.responses[item], 1);
    }
    __syncthreads();
  }
}

template <typename T, int R>
ffi::Error LaunchScores(cudaStream_t stream, const Marked& m, const Scoring<T>& a,
                        const Reach<R>& reach) {
  const dim3 grid = GridFor(m.items * m.spans);
  if (a.filter.tile() == kNarrowTile) {
    return Launch<ScoreKernel<T, kNarrowTile, R>>(grid, kSites, 0, stream, m, a, reach);
  }
  return Launch<ScoreKernel<T, kTile, R>>(grid, kSites, 0, stream, m, a, reach);
}

// Turns the numbers of kept sites, [item][capacity], into their keys.
__global__ void __launch_bounds__(kThreads) KeyKernel(Marked m, int64_t capacity, int32_t* kept) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < m.items * capacity;
       i += stride) {
    const int64_t item = i / capacity;
    const int32_t number = kept[i];
    const int32_t* firsts = m.Firsts(item);
    int64_t key = m.sites;
    if (number < firsts[m.spans]) {
      // The last span with no more than that in front of it.
      const int64_t span = LowerBound(firsts, m.spans + 1, int64_t{number} + 1) - 1;
      const uint32_t* bits = m.Bits(item, span);
      int left = number - firsts[span], word = 0;
      while (left >= __popc(bits[word])) left -= __popc(bits[word++]);
      uint32_t rest = bits[word];
      for (; left > 0; --left) rest &= rest - 1;
      key = span * kSpan + word * 32 + __ffs(static_cast<int>(rest)) - 1;
    }
    kept[i] = static_cast<int32_t>(key);
  }
}

struct ConvBySiteForward {
  using Call = ConvBySiteFwd;
  struct Plan {
    int64_t block;         // output channels at a time
    int64_t items;         // samples at a time
    int64_t select_chunk;  // scores that a block selects among
  };
  template <typename T>
  struct Layout {
    Filter filter;
    Marked marked;
    float* kept;  // [item][capacity]: scores, which nobody reads
    SelectWorkspace select;

    Layout(Carver& carver, const ConvBySiteShape& s, const Plan& plan)
        : filter(CarveFilter(carver, s, plan.block, false)),
          marked(carver, s, plan.items),
          kept(carver.Take<float>(plan.items, s.capacity)),
          select(carver, plan.items, s.reached(), plan.select_chunk) {}
  };

  template <typename T>
  static Plan Make(const ConvBySiteShape& s, const Tuning& tuning) {
    const int64_t budget = tuning.CudaWorkspace(s.w.sites());
    Plan plan = {BlockOf(s, false, budget / 4), 1, s.reached()};
    const auto size = [&] { return SizeOf<Layout<T>>(s, plan); };
    const int64_t one = size();
    plan.items = 2;
    const int64_t each = size() - one;
    const int64_t fit = each > 0 ? 1 + (budget - one) / each : 1;
    plan.items = std::clamp<int64_t>(fit, 1, std::max<int64_t>(s.batch / s.groups, 1));
    plan.select_chunk = SelectChunk(plan.items, s.reached(), tuning);
    if (size() > budget) plan.select_chunk = s.reached();
    return plan;
  }
  static bool Fits(const ConvBySiteShape&, const Plan& plan) {
    return IsBlock(plan.block) && plan.items >= 1 && plan.select_chunk >= 1;
  }

  template <typename T>
  static ffi::Error Run(cudaStream_t stream, ConvBySiteFwd call, const ConvBySiteShape& s,
                        const Plan& plan, const Layout<T>& layout) {
    bool positive = false;
    ILAJAX_RETURN_IF_ERROR(ReadSiteSelect(call.select, positive));
    for (int64_t item = 0; item < s.batch; item += plan.items) {
      Marked m = layout.marked;
      m.items = std::min(plan.items, s.batch - item);
      const int32_t* const keys = call.keys.typed_data() + item * s.slots;
      const T* const values = Data<T>(call.values) + item * s.in_channels * s.slots;
      int32_t* const out_keys = call.out_keys->typed_data() + item * s.capacity;
      T* const features = Data<T>(*call.features) + item * s.out_channels * s.capacity;
      int32_t* const responses = call.responses->typed_data() + item;
      const int64_t words = std::max(m.items * m.spans * kSpanWords, m.items * m.reached);
      ILAJAX_RETURN_IF_ERROR(Launch<ClearKernel>(GridFor(CeilDiv(words, kThreads)), kThreads, 0,
                                                 stream, m, responses));
      ILAJAX_RETURN_IF_ERROR(
          Launch<MarkKernel>(GridFor(CeilDiv(m.items * s.w.taps * s.slots, kThreads)), kThreads, 0,
                             stream, s.w, m, s.slots, keys));
      ILAJAX_RETURN_IF_ERROR(Launch<CountKernel>(GridFor(CeilDiv(m.items * m.spans, kThreads)),
                                                 kThreads, 0, stream, m));
      ILAJAX_RETURN_IF_ERROR(Launch<ScanKernel>(GridFor(m.items), kThreads, 0, stream, m));
      // Behind the selection comes the same again, a block of channels at a time.
      const auto for_blocks = [&](auto&& f) -> ffi::Error {
        Filter filter = layout.filter;
        for (; filter.first < s.out_channels; filter.first += plan.block) {
          ILAJAX_RETURN_IF_ERROR(Fill(stream, s, filter, call.kernel_keys.typed_data(),
                                      call.weights.typed_data(), 0, nullptr));
          ILAJAX_RETURN_IF_ERROR(f(filter));
        }
        return ffi::Error::Success();
      };
      ILAJAX_RETURN_IF_ERROR(for_blocks([&](const Filter& filter) {
        const Scoring<T> scoring = {filter,   s.slots,  s.out_channels,
                                    keys,     values,   call.bias.typed_data(),
                                    positive, responses};
        return WithReach(
            s.w, [&](const auto& reach) { return LaunchScores<T>(stream, m, scoring, reach); });
      }));
      const Entries<float> scores = {nullptr,   m.scores,  m.items,          1,
                                     m.reached, m.reached, Select::kPositive};
      ILAJAX_RETURN_IF_ERROR(LaunchSelect(stream, scores, plan.select_chunk, layout.select,
                                          out_keys, layout.kept, s.capacity));
      ILAJAX_RETURN_IF_ERROR(Launch<KeyKernel>(GridFor(CeilDiv(m.items * s.capacity, kThreads)),
                                               kThreads, 0, stream, m, s.capacity, out_keys));
      ILAJAX_RETURN_IF_ERROR(for_blocks([&](const Filter& filter) {
        return ApplyFilter<T>(
            stream, s.w,
            {filter, false, m.items, s.slots, s.capacity, s.out_channels, keys, out_keys, values,
             features, call.bias.typed_data(), nullptr, positive});
      }));
    }
    return ffi::Error::Success();
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CUDA_TARGET(ConvBySiteFwd, ConvBySiteForward);
