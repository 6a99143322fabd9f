// k-selection on the GPU: the strongest `capacity` candidates of each segment, in the order of
// their keys.
//
// A radix select over the order-preserving bits of the values (RankBits) finds the rank of the
// weakest kept entry, eight bits at a time from the highest; then the entries in front of each kept
// one are counted, which says where it goes. No sort, and nothing depends on the order of threads:
// atomics only count.
//
//   LaunchSelect             one launch where a block takes a whole segment: at most 4 passes over
//                            the values for the cut, which stay in the L2 cache, and one that
//                            emits. Long segments are split into chunks over several blocks: a
//                            launch for each pass (they find nothing to do where the candidates
//                            fit), one that counts, one that emits, and 4 KiB of histograms for a
//                            segment.
//   FindCut, EmitKept, ...   the same for one block, for other kernels.
//
// Memory traffic: keys and values once for each pass; kept keys and values are written once, in
// order.

#pragma once

#include <algorithm>

#include "xla_kernels/common/block.cuh"
#include "xla_kernels/common/cuda.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/common/tuning.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {

constexpr int kMaxThreads = 1024;
constexpr int kSelectBins = 256;
constexpr int kSelectPasses = 4;
constexpr int kSelectEntries = 4;  // of a thread between two barriers

// The entries of one segment. Without keys, entry i has the key i, and zeros are no entries.
template <typename T>
struct SegmentEntries {
  const int32_t* keys;
  const T* values;
  int64_t stride, count, sites;
  Select select;

  __device__ int32_t Key(int64_t i) const {
    return keys == nullptr ? static_cast<int32_t>(i) : keys[i];
  }
  __device__ T Value(int64_t i) const { return values[i * stride]; }

  // The rank of entry i; 0 if it is no candidate, which ranks below all.
  __device__ uint32_t Rank(int64_t i) const {
    if (keys != nullptr && (keys[i] < 0 || keys[i] >= sites)) return 0;
    const float value = static_cast<float>(Value(i));
    if (keys == nullptr && value == 0.0f) return 0;
    return IsCandidate(value, select) ? RankBits(value, select) : 0;
  }
};

// The entries of all segments: keys [segments, count] and values [segments, count], or, without
// keys, values [segments / channels, count, channels].
template <typename T>
struct Entries {
  const int32_t* keys;
  const T* values;
  int64_t segments, channels, count, sites;
  Select select;

  __device__ SegmentEntries<T> Segment(int64_t segment) const {
    const int32_t* key = keys == nullptr ? nullptr : keys + segment * count;
    const T* value = values + segment / channels * channels * count + segment % channels;
    return {key, value, channels, count, sites, select};
  }
};

// The rank of the weakest kept entry: kept is what ranks above `threshold`, and the first `ties` of
// just that rank. While it is being found, `threshold` has its highest digits only, and `ties` of
// the candidates that agree in those are still to be kept.
struct Cut {
  uint32_t threshold;
  int64_t ties;
  bool found;
};

// Entries in front of some place, by what they are to a cut.
struct Tally {
  int32_t above, ties;
};

// What a block needs in shared memory.
struct SelectShared {
  int32_t histogram[kSelectBins];
  Cut cut;
  Tally total;
  Tally warps[2][kMaxThreads / 32];
};

__device__ inline Cut FirstCut(int64_t count, int64_t capacity) {
  return {0, capacity, count <= capacity};
}

// Counts the candidates in [begin, end) that agree with the cut so far, by their next digit.
template <typename T>
__device__ void CountDigits(const SegmentEntries<T>& entries, int64_t begin, int64_t end,
                            const Cut& cut, int shift, int32_t* histogram) {
  const uint32_t fixed = shift == 24 ? 0 : ~uint32_t{0} << (shift + 8);
  const uint32_t threshold = cut.threshold;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const uint32_t rank = entries.Rank(i);
    if (rank != 0 && (rank & fixed) == threshold) atomicAdd(&histogram[rank >> shift & 255], 1);
  }
}

// Takes the next digit of a cut from the histogram of it; by one warp, all of whose lanes see the
// result.
__device__ inline void ChooseDigit(const int32_t* histogram, int shift, Cut& cut) {
  const int lane = threadIdx.x % 32;
  const int64_t ties = cut.ties;
  __syncwarp();  // before one lane writes what all have read: shuffles order no memory
  // Lane 0 has the eight strongest bins.
  const int first = 8 * (31 - lane);
  int32_t own = 0;
  for (int bin = first; bin < first + 8; ++bin) own += histogram[bin];
  const int32_t through = own + WarpExclusiveScan(own);
  const int32_t all = __shfl_sync(~0u, through, 31);
  if (all <= ties) {
    if (lane == 0) cut.found = true;
  } else if (through - own < ties && ties <= through) {
    int64_t left = ties - (through - own);
    int digit = first + 7;
    while (histogram[digit] < left) left -= histogram[digit--];
    cut.threshold |= static_cast<uint32_t>(digit) << shift;
    cut.ties = left;
    cut.found = shift == 0 || histogram[digit] == left;
  }
  __syncwarp();
}

// The cut of a segment, found by one block; the same in all threads. Leaves `shared` free for use.
template <typename T>
__device__ Cut FindCut(const SegmentEntries<T>& entries, int64_t capacity, SelectShared& shared) {
  Cut cut = FirstCut(entries.count, capacity);
  if (threadIdx.x == 0) shared.cut = cut;
  for (int shift = 24; !cut.found; shift -= 8) {
    for (int bin = threadIdx.x; bin < kSelectBins; bin += blockDim.x) shared.histogram[bin] = 0;
    __syncthreads();
    CountDigits(entries, 0, entries.count, cut, shift, shared.histogram);
    __syncthreads();
    if (threadIdx.x < 32) ChooseDigit(shared.histogram, shift, shared.cut);
    __syncthreads();
    cut = shared.cut;
  }
  __syncthreads();
  return cut;
}

// Calls put(position, i) for each kept entry in [begin, end), where `before` counts the entries in
// front of them, and is moved behind them. By all threads of a block, whose size is a multiple
// of 32.
template <typename T, typename Put>
__device__ void EmitKept(const SegmentEntries<T>& entries, int64_t begin, int64_t end,
                         const Cut& cut, Tally& before, SelectShared& shared, Put&& put) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const uint32_t lower = (1u << lane) - 1;
  int buffer = 0;
  for (int64_t first = begin; first < end;
       first += int64_t{blockDim.x} * kSelectEntries, buffer ^= 1) {
    const int64_t start = first + warp * 32 * kSelectEntries + lane;
    uint32_t above[kSelectEntries], ties[kSelectEntries];  // of the warp, a bit for each lane
    Tally own = {0, 0};
#pragma unroll
    for (int e = 0; e < kSelectEntries; ++e) {
      const int64_t i = start + e * 32;
      const uint32_t rank = i < end ? entries.Rank(i) : 0;
      above[e] = __ballot_sync(~0u, rank > cut.threshold);
      ties[e] = __ballot_sync(~0u, rank != 0 && rank == cut.threshold);
      own.above += __popc(above[e]);
      own.ties += __popc(ties[e]);
    }
    // Two buffers, so that one barrier is enough: nobody is more than one step ahead.
    if (lane == 0) shared.warps[buffer][warp] = own;
    __syncthreads();
    Tally here = before;
    for (int w = 0; w < warps; ++w) {
      const Tally other = shared.warps[buffer][w];
      before.above += other.above;
      before.ties += other.ties;
      if (w < warp) {
        here.above += other.above;
        here.ties += other.ties;
      }
    }
#pragma unroll
    for (int e = 0; e < kSelectEntries; ++e) {
      const int64_t tie = here.ties + __popc(ties[e] & lower);
      const int64_t position = here.above + __popc(above[e] & lower) + min(tie, cut.ties);
      const bool is_above = above[e] >> lane & 1, is_tie = ties[e] >> lane & 1;
      if (is_above || (is_tie && tie < cut.ties)) put(position, start + e * 32);
      here.above += __popc(above[e]);
      here.ties += __popc(ties[e]);
    }
  }
  __syncthreads();
}

namespace select_kernels {
namespace {  // each .cu file has its own

// Where selected entries go: keys s32[segments, capacity] and values T[segments, capacity].
template <typename T>
struct Output {
  int32_t* keys;
  T* values;
  int64_t capacity;
};

template <typename T>
__device__ void Emit(const Entries<T>& entries, int64_t segment, int64_t begin, int64_t end,
                     const Cut& cut, Tally before, const Output<T>& out, SelectShared& shared) {
  const SegmentEntries<T> own = entries.Segment(segment);
  int32_t* keys = out.keys + segment * out.capacity;
  T* values = out.values + segment * out.capacity;
  EmitKept(own, begin, end, cut, before, shared, [&](int64_t position, int64_t i) {
    if (position >= out.capacity) return;
    keys[position] = own.Key(i);
    values[position] = own.Value(i);
  });
  if (end < entries.count) return;
  // The segment's end: padding behind what was kept.
  const int64_t kept = before.above + min(int64_t{before.ties}, cut.ties);
  for (int64_t i = kept + threadIdx.x; i < out.capacity; i += blockDim.x) {
    keys[i] = static_cast<int32_t>(entries.sites);
    values[i] = T(0.0f);
  }
}

// A block takes a segment at a time.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) WholeSegments(Entries<T> entries, Output<T> out) {
  __shared__ SelectShared shared;
  for (int64_t segment = blockIdx.x; segment < entries.segments; segment += gridDim.x) {
    const Cut cut = FindCut(entries.Segment(segment), out.capacity, shared);
    Emit(entries, segment, 0, entries.count, cut, {0, 0}, out, shared);
  }
}

// Long segments: tasks are chunks of them. histograms [passes][segments][bins], tallies
// [segments][chunks].
struct Chunks {
  int64_t chunk, chunks;
  int32_t* histograms;
  Tally* tallies;

  // Tasks in an order that lets the channels of one chunk, which may lie together, run together.
  struct Task {
    int64_t segment, index, begin, end;
  };
  template <typename T>
  __device__ Task At(int64_t task, const Entries<T>& entries) const {
    const int64_t item = task / (chunks * entries.channels),
                  rest = task % (chunks * entries.channels);
    const int64_t segment = item * entries.channels + rest % entries.channels;
    const int64_t index = rest / entries.channels;
    return {segment, index, index * chunk, min(index * chunk + chunk, entries.count)};
  }

  __device__ int32_t* Histogram(int pass, int64_t segments, int64_t segment) const {
    return histograms + (pass * segments + segment) * kSelectBins;
  }

  // The cut after `passes` of its digits; the same in all threads.
  __device__ Cut Replay(int passes, int64_t segments, int64_t segment, int64_t count,
                        int64_t capacity, SelectShared& shared) const {
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) shared.cut = FirstCut(count, capacity);
      __syncwarp();
      for (int pass = 0; pass < passes; ++pass) {
        if (shared.cut.found) break;
        __syncwarp();
        ChooseDigit(Histogram(pass, segments, segment), 24 - 8 * pass, shared.cut);
      }
    }
    __syncthreads();
    return shared.cut;
  }
};

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) ZeroHistograms(Entries<T> entries, Chunks c) {
  const int64_t bins = kSelectPasses * entries.segments * kSelectBins;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < bins;
       i += int64_t{gridDim.x} * blockDim.x) {
    c.histograms[i] = 0;
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    CountDigitsOfChunks(Entries<T> entries, int64_t capacity, Chunks c, int pass) {
  __shared__ SelectShared shared;
  for (int64_t task = blockIdx.x; task < entries.segments * c.chunks; task += gridDim.x) {
    const auto [segment, index, begin, end] = c.At(task, entries);
    (void)index;
    for (int bin = threadIdx.x; bin < kSelectBins; bin += blockDim.x) shared.histogram[bin] = 0;
    const Cut cut = c.Replay(pass, entries.segments, segment, entries.count, capacity, shared);
    if (!cut.found) {
      CountDigits(entries.Segment(segment), begin, end, cut, 24 - 8 * pass, shared.histogram);
    }
    __syncthreads();
    int32_t* histogram = c.Histogram(pass, entries.segments, segment);
    for (int bin = threadIdx.x; bin < kSelectBins; bin += blockDim.x) {
      if (shared.histogram[bin] != 0) atomicAdd(&histogram[bin], shared.histogram[bin]);
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    TallyChunks(Entries<T> entries, int64_t capacity, Chunks c) {
  __shared__ SelectShared shared;
  for (int64_t task = blockIdx.x; task < entries.segments * c.chunks; task += gridDim.x) {
    const auto [segment, index, begin, end] = c.At(task, entries);
    if (threadIdx.x == 0) shared.total = {0, 0};
    const Cut cut =
        c.Replay(kSelectPasses, entries.segments, segment, entries.count, capacity, shared);
    const SegmentEntries<T> own = entries.Segment(segment);
    Tally tally = {0, 0};
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const uint32_t rank = own.Rank(i);
      tally.above += rank > cut.threshold;
      tally.ties += rank != 0 && rank == cut.threshold;
    }
    if (tally.above != 0) atomicAdd(&shared.total.above, tally.above);
    if (tally.ties != 0) atomicAdd(&shared.total.ties, tally.ties);
    __syncthreads();
    if (threadIdx.x == 0) c.tallies[segment * c.chunks + index] = shared.total;
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    EmitChunks(Entries<T> entries, Output<T> out, Chunks c) {
  __shared__ SelectShared shared;
  for (int64_t task = blockIdx.x; task < entries.segments * c.chunks; task += gridDim.x) {
    const auto [segment, index, begin, end] = c.At(task, entries);
    if (threadIdx.x == 0) shared.total = {0, 0};
    const Cut cut =
        c.Replay(kSelectPasses, entries.segments, segment, entries.count, out.capacity, shared);
    Tally tally = {0, 0};
    for (int64_t before = threadIdx.x; before < index; before += blockDim.x) {
      tally.above += c.tallies[segment * c.chunks + before].above;
      tally.ties += c.tallies[segment * c.chunks + before].ties;
    }
    if (tally.above != 0) atomicAdd(&shared.total.above, tally.above);
    if (tally.ties != 0) atomicAdd(&shared.total.ties, tally.ties);
    __syncthreads();
    Emit(entries, segment, begin, end, cut, shared.total, out, shared);
  }
}

}  // namespace
}  // namespace select_kernels

// How many entries of a segment a block takes: all of them where blocks are enough, or entries few.
inline int64_t SelectChunk(int64_t segments, int64_t count, const Tuning& tuning) {
  constexpr int64_t kBlocks = 1024;  // fill the largest GPUs several times over
  if (segments * 2 >= kBlocks || count <= tuning.select_whole) return count;
  const int64_t blocks = CeilDiv(kBlocks, std::max<int64_t>(segments, 1));
  return CeilDiv(count, std::min(CeilDiv(count, tuning.select_chunk), blocks));
}

// The workspace of LaunchSelect.
struct SelectWorkspace {
  int32_t* histograms = nullptr;  // [pass][segment][bin]
  Tally* tallies = nullptr;       // [segment][chunk]

  SelectWorkspace() = default;
  SelectWorkspace(Carver& carver, int64_t segments, int64_t count, int64_t chunk) {
    if (chunk >= count) return;
    histograms = carver.Take<int32_t>(kSelectPasses, segments, kSelectBins);
    tallies = carver.Take<Tally>(segments, CeilDiv(count, chunk));
  }
};

// Selects the `capacity` strongest of each segment. A block takes `chunk` entries; all of a
// segment's where chunk >= count.
template <typename T>
ffi::Error LaunchSelect(cudaStream_t stream, const Entries<T>& entries, int64_t chunk,
                        const SelectWorkspace& workspace, int32_t* kept_keys, T* kept_values,
                        int64_t capacity) {
  namespace k = select_kernels;
  const k::Output<T> out = {kept_keys, kept_values, capacity};
  const int64_t work = chunk < entries.count ? chunk : entries.count;
  const int threads = work > 8192 ? 1024 : work > 256 ? 256 : 64;
  if (chunk >= entries.count) {
    return Launch<k::WholeSegments<T>>(GridFor(entries.segments), threads, 0, stream, entries, out);
  }
  const k::Chunks c = {chunk, CeilDiv(entries.count, chunk), workspace.histograms,
                       workspace.tallies};
  const dim3 grid = GridFor(entries.segments * c.chunks);
  if (entries.count > capacity) {
    ILAJAX_RETURN_IF_ERROR(Launch<k::ZeroHistograms<T>>(GridFor(entries.segments), kMaxThreads, 0,
                                                        stream, entries, c));
    for (int pass = 0; pass < kSelectPasses; ++pass) {
      ILAJAX_RETURN_IF_ERROR(
          Launch<k::CountDigitsOfChunks<T>>(grid, threads, 0, stream, entries, capacity, c, pass));
    }
  }
  ILAJAX_RETURN_IF_ERROR(Launch<k::TallyChunks<T>>(grid, threads, 0, stream, entries, capacity, c));
  return Launch<k::EmitChunks<T>>(grid, threads, 0, stream, entries, out, c);
}

}  // namespace ilajax
