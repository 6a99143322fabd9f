// A convolution from given sites to given sites as small matrix products.
//
// A pair is an output site and a stored input site that one of its taps reads. For each tap, the
// pairs of a chunk of output sites are listed, and the input sites' stacks, their values over all
// channels, are multiplied by the tap's matrix of weights, a block of output channels at a time, and
// added to the output sites' stacks. The gradient of the stacks is the same with the transposed
// window and matrices; that of the filter is a sum of outer products over the same pairs.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "xla_kernels/common/conv_shape.h"
#include "xla_kernels/common/simd.h"
#include "xla_kernels/lines/lines.h"

namespace ilajax::products {

constexpr int kSites = 12;      // pairs that Multiply takes at once, at most
constexpr int64_t kBlock = 16;  // output channels that it takes at once, at most
constexpr int64_t kGroup = 3;   // neighbouring taps that are looked up at once, at most

// Stacks that are taken at once, counted from the first of a sample or of a chunk.
struct Pair {
  int32_t from, to;
};

// Values [site][step], of sites from `first` on.
struct Stacks {
  float* data;
  int64_t step;
  int64_t first = 0;

  float* At(int64_t site) const { return data + (site - first) * step; }
  Stacks From(int64_t channel) const { return {data + channel, step, first}; }
};
inline int64_t StackStep(int64_t channels) { return CeilDiv(channels, kLanes) * kLanes; }

// The window as it slides over the input's sites once these are spread apart: w.input_dilation[a]
// sites along axis a are then one step.
inline Window SpreadApart(const Window& w) {
  Window spread = w;
  spread.input_sites = 1;
  for (int a = 0; a < w.rank; ++a) {
    spread.input_shape[a] = (w.input_shape[a] - 1) * w.input_dilation[a] + 1;
    spread.input_sites *= spread.input_shape[a];
  }
  return spread;
}

// The stored sites of a sample, spread apart, as a bitmap, which tells a site's number among them.
//
// Only the words of lines that have a site are filled, and may be read: a large grid has few.
struct SiteIndex {
  int64_t sites, words, line_words;
  uint64_t* bits;   // a word more, so that a window may reach out at the end
  int32_t* ranks;   // [words]: sites before the word's
  uint64_t* lines;  // [line_words]: a bit for each line that has a site
  int64_t slices;   // of the lines, which are filled by a task each
  int32_t* counts;  // [slices]: sites of each

  // For a window that has been spread apart.
  SiteIndex(Carver& carver, const Window& w)
      : sites(w.input_sites),
        words(CeilDiv(sites, 64) + 1),
        line_words(CeilDiv(sites / w.input_shape[w.rank - 1], 64)),
        bits(carver.Take<uint64_t>(words)),
        ranks(carver.Take<int32_t>(words)),
        lines(carver.Take<uint64_t>(line_words)),
        slices(std::clamp<int64_t>(words / 8192, 1, std::min<int64_t>(line_words, 16))),
        counts(carver.Take<int32_t>(slices)) {}

  // Fill, in two steps. A slice has whole words of `lines`, so that no other has bits in its words.

  // Keys that are out of order may be left out.
  void Mark(const Window& w, const int32_t* keys, int64_t slots, int64_t slice) const {
    const int64_t first_word = LineWordsBefore(slice), last_word = LineWordsBefore(slice + 1);
    std::fill(lines + first_word, lines + last_word, 0);
    const int64_t step = w.input_dilation[w.rank - 1], spread_length = w.input_shape[w.rank - 1];
    const int64_t length = (spread_length - 1) / step + 1, stored = StoredLines(w) * length;
    const int32_t* key = std::partition_point(keys, keys + slots, [&](int32_t k) {
      return k < stored && SpreadLine(w, k / length) < 64 * first_word;
    });
    int64_t begin = 0, end = 0, base = 0;        // keys of a line, and where it goes
    int64_t clear = first_word * spread_length;  // words before it are
    counts[slice] = 0;
    for (; key != keys + slots && *key < stored; ++key) {
      if (*key >= end) {
        const int64_t line = *key / length, spread = SpreadLine(w, line);
        if (spread >= 64 * last_word) break;
        if (spread < 64 * first_word) continue;
        begin = line * length, end = begin + length, base = spread * spread_length;
        lines[spread >> 6] |= uint64_t{1} << (spread & 63);
        clear = std::max(clear, base >> 6);
        const int64_t behind = CeilDiv(base + spread_length, 64);
        for (; clear < behind; ++clear) bits[clear] = 0;
      } else if (*key < begin) {
        continue;
      }
      const int64_t site = base + (*key - begin) * step;
      bits[site >> 6] |= uint64_t{1} << (site & 63);
      ++counts[slice];
    }
  }

  template <typename Loops>
  void Rank(const Window& w, int64_t slice) const {
    const int64_t length = w.input_shape[w.rank - 1];
    int32_t rank = std::accumulate(counts, counts + slice, 0);
    int64_t begin = LineWordsBefore(slice) * length;
    for (int64_t at = LineWordsBefore(slice); at < LineWordsBefore(slice + 1); ++at) {
      for (uint64_t left = lines[at]; left != 0; left &= left - 1) {
        const int64_t base = (at * 64 + __builtin_ctzll(left)) * length;
        const int64_t end = CeilDiv(base + length, 64);
        begin = std::max(begin, base >> 6);
        rank = Loops::kRankWords(bits + begin, end - begin, rank, ranks + begin);
        begin = end;
      }
    }
  }

  bool HasLine(int64_t line) const { return lines[line >> 6] >> (line & 63) & 1; }
  int64_t Rank(int64_t key) const {
    const uint64_t below = (uint64_t{1} << (key & 63)) - 1;
    return ranks[key >> 6] + __builtin_popcountll(bits[key >> 6] & below);
  }
  // The bits of three sites from `key`, and the first one's rank.
  uint64_t Three(int64_t key, int64_t& rank) const {
    rank = Rank(key);
    uint64_t found;
    std::memcpy(&found, reinterpret_cast<const char*>(bits) + (key >> 3), sizeof(found));
    return found >> (key & 7);
  }

 private:
  int64_t LineWordsBefore(int64_t slice) const { return slice * line_words / slices; }
  // Lines before they are spread apart, and where one of them goes.
  static int64_t StoredLines(const Window& w) {
    int64_t count = 1;
    for (int a = 0; a < w.rank - 1; ++a) count *= (w.input_shape[a] - 1) / w.input_dilation[a] + 1;
    return count;
  }
  static int64_t SpreadLine(const Window& w, int64_t line) {
    int64_t spread = 0, step = 1;
    for (int a = w.rank - 2; a >= 0; --a) {
      const int64_t size = (w.input_shape[a] - 1) / w.input_dilation[a] + 1;
      spread += line % size * w.input_dilation[a] * step;
      line /= size, step *= w.input_shape[a];
    }
    return spread;
  }
};

// The taps of a line in groups of neighbours, which are looked up at once.
struct TapGroups {
  int64_t taps, size, count;
  int64_t step;  // from a group to the next along the line

  explicit TapGroups(const LineWindow& line)
      : taps(line.taps),
        size(line.dilation > 1 ? 1 : kGroup),
        count(CeilDiv(taps, size)),
        step(size * line.dilation) {}

  int64_t TapsOf(int64_t group) const { return std::min(size, taps - group * size); }
};

// Words that tell what the window reads at one site: one for each group of each line of taps.
inline int64_t MapWords(const Lines& lines) {
  return lines.tap_lines * TapGroups(lines.line).count;
}

// Which input lines an output line reads, through each line of taps.
struct TapReach {
  Lines lines;
  Divider length;
  int64_t sites, rank;  // of the output
  TapGroups groups;
  int32_t* offsets;  // [taps][rank]
  int64_t* steps;    // [line of taps]: what the leading axes' offsets make in lines

  TapReach(Carver& carver, const Window& w)
      : lines(w),
        length(lines.line.output_length),
        sites(w.output_sites),
        rank(w.rank),
        groups(lines.line),
        offsets(carver.Take<int32_t>(w.taps, kMaxRank)),
        steps(carver.Take<int64_t>(lines.tap_lines)) {}

  void Fill(const Window& w) const {
    TapOffsets(w, offsets);
    for (int64_t t = 0; t < lines.tap_lines; ++t) {
      steps[t] = 0;
      for (int a = 0; a < lines.axes; ++a) {
        steps[t] = steps[t] * lines.input_shape[a] + offsets[t * lines.line.taps * rank + a];
      }
    }
  }

  // Sets bases[line of taps] to the key where the input line begins; -1 if it has no site, or is
  // outside the grid.
  void TurnTo(int64_t output_line, const SiteIndex& index, int64_t* bases) const {
    const LineWalk walk(lines, output_line);
    for (int64_t t = 0; t < lines.tap_lines; ++t) {
      const int64_t line = walk.Reads(offsets + t * lines.line.taps * rank, steps[t]);
      bases[t] = line < 0 || !index.HasLine(line) ? -1 : line * lines.line.input_length;
    }
  }
};

// A worker's lists of pairs for a chunk of output sites.
struct PairLists {
  int64_t taps, room;  // of pairs for each tap
  Pair* pairs;         // [tap][room]
  int32_t* counts;     // [tap]
  int64_t* bases;      // [line of taps]: see TapReach
  int32_t* words;      // [line of taps][group][chunk], where the call has no map

  PairLists(Carver& carver, const Lines& lines, int64_t chunk, bool mapped)
      : taps(lines.tap_lines * lines.line.taps),
        room(chunk + kSites),
        pairs(carver.Take<Pair>(taps, room)),
        counts(carver.Take<int32_t>(taps)),
        bases(carver.Take<int64_t>(lines.tap_lines)),
        words(carver.Take<int32_t>(mapped ? 0 : MapWords(lines), chunk)) {}

  Pair* At(int64_t tap) const { return pairs + tap * room; }
  // Fills lists up to whole steps of Multiply with pairs to a stack that nobody reads.
  void Pad(int32_t to) const {
    for (int64_t tap = 0; tap < taps; ++tap) {
      Pair* const end = At(tap) + counts[tap];
      if (counts[tap] > 0) std::fill_n(end, kSites - 1, Pair{end[-1].from, to});
    }
  }
};

// What a block of output channels gets through a tap.
struct TapMatrix {
  int64_t live;             // channels that have a live weight
  const int32_t* channels;  // [live]
  const float* weights;     // [live][kBlock]
};

// The filter as a matrix for each tap, in blocks of output channels; `transposed`: the other way
// round, from its output channels to its input channels and with the taps in reverse.
struct TapMatrices {
  int64_t in_channels, out_channels, taps;
  bool transposed;
  int64_t from, to, blocks;
  int32_t* live;      // [tap][block]
  int32_t* channels;  // [tap][block][from]
  float* weights;     // [tap][block][from][kBlock]
  bool* finite;       // whether all weights are

  TapMatrices(Carver& carver, int64_t filter_in, int64_t filter_out, int64_t filter_taps,
              bool is_transposed)
      : in_channels(filter_in),
        out_channels(filter_out),
        taps(filter_taps),
        transposed(is_transposed),
        from(transposed ? filter_out : filter_in),
        to(transposed ? filter_in : filter_out),
        blocks(CeilDiv(to, kBlock)),
        live(carver.Take<int32_t>(taps, blocks)),
        channels(carver.Take<int32_t>(taps, blocks, from)),
        weights(carver.Take<float>(taps, blocks, from, kBlock)),
        finite(carver.Take<bool>(1)) {}

  int Octets(int64_t block) const { return to - block * kBlock > kLanes ? 2 : 1; }
  TapMatrix At(int64_t tap, int64_t block) const {
    const int64_t i = tap * blocks + block;
    return {live[i], channels + i * from, weights + i * from * kBlock};
  }

  // Whether the filter has a live weight in a block of a tap's matrix, of channels as the filter's:
  // only of transposed matrices.
  bool AnyLive(int64_t tap, int64_t in_begin, int64_t in_end, int64_t out_begin,
               int64_t out_end) const {
    for (int64_t block = in_begin / kBlock; block * kBlock < in_end && block < blocks; ++block) {
      const TapMatrix m = At(tap, block);
      const int32_t* end = m.channels + m.live;
      const int32_t* first = std::lower_bound(m.channels, end, out_begin);
      if (first != end && *first < out_end) return true;
    }
    return false;
  }

  // Fill, in steps: parts of the weights, which touch different rows, then each tap's blocks.
  void Clear(int64_t tap) const;
  void Put(const int32_t* keys, const float* values, int64_t count, int64_t out_begin,
           int64_t out_end) const;
  void Close(int64_t tap) const;
};

inline void TapMatrices::Clear(int64_t tap) const {
  std::memset(weights + tap * blocks * from * kBlock, 0, blocks * from * kBlock * sizeof(float));
  std::fill_n(channels + tap * blocks * from, blocks * from, -1);
}

// Of the weights, those of output channels [out_begin, out_end): other threads put the others.
inline void TapMatrices::Put(const int32_t* keys, const float* values, int64_t count,
                             int64_t out_begin, int64_t out_end) const {
  WeightPlace place(in_channels, out_channels, taps);
  bool all_finite = true;
  for (int64_t n = 0; n < count; ++n) {
    if (!place.MoveTo(keys[n]) || place.out < out_begin || place.out >= out_end) continue;
    const int64_t tap = transposed ? taps - 1 - place.tap : place.tap;
    const int64_t source = transposed ? place.out : place.in;
    const int64_t target = transposed ? place.in : place.out;
    const int64_t row = (tap * blocks + target / kBlock) * from + source;
    weights[row * kBlock + target % kBlock] = values[n];
    __atomic_store_n(channels + row, static_cast<int32_t>(source), __ATOMIC_RELAXED);
    all_finite &= std::isfinite(values[n]);
  }
  if (!all_finite) __atomic_store_n(finite, false, __ATOMIC_RELAXED);
}

// Moves the channels that have a live weight to the front.
inline void TapMatrices::Close(int64_t tap) const {
  for (int64_t i = tap * blocks; i < (tap + 1) * blocks; ++i) {
    int32_t* channel = channels + i * from;
    float* row = weights + i * from * kBlock;
    int32_t kept = 0;
    for (int64_t c = 0; c < from; ++c) {
      if (channel[c] < 0) continue;
      channel[kept] = static_cast<int32_t>(c);
      if (kept != c) std::memcpy(row + kept * kBlock, row + c * kBlock, kBlock * sizeof(float));
      ++kept;
    }
    live[i] = kept;
  }
}

// How many rows of the filter's gradient AddOuter takes at once, of so many that are left: an even
// number, and at least 4.
inline int64_t EvenRows(int64_t channels) { return std::max<int64_t>(4, (channels + 1) / 2 * 2); }
inline int64_t RowsAtOnce(int64_t left) { return left == 4 || left == 8 ? 4 : 6; }

}  // namespace ilajax::products
