// The sites of a sample that may be kept: those for which a live tap reads a stored one.

#pragma once

#include <algorithm>
#include <cstring>

#include "xla_kernels/conv_by_site/spec.h"
#include "xla_kernels/products/pairs.h"

namespace ilajax {

struct Candidates {
  int64_t words;
  uint64_t* bits;
  int32_t* ranks;  // [words + 1]: sites before the word's
  float* scores;   // of the site of each rank; 0 where nothing passes

  Candidates(Carver& carver, const ConvBySiteShape& s)
      : words(CeilDiv(s.w.output_sites, 64)),
        bits(carver.Take<uint64_t>(words)),
        ranks(carver.Take<int32_t>(words + 1)),
        scores(carver.Take<float>(s.reached())) {}

  int64_t count() const { return ranks[words]; }

  void Clear() const { std::memset(bits, 0, words * sizeof(uint64_t)); }
  template <typename Loops>
  void Rank() const {
    ranks[words] = Loops::kRankWords(bits, words, 0, ranks);
  }

  // Calls f(rank, key) for those of ranks [begin, end), in order.
  template <typename F>
  void ForEach(int64_t begin, int64_t end, F&& f) const {
    int64_t word = std::upper_bound(ranks, ranks + words, begin) - ranks - 1;
    for (int64_t rank = ranks[word]; rank < end; ++word) {
      for (uint64_t left = bits[word]; left != 0 && rank < end; left &= left - 1, ++rank) {
        if (rank >= begin) f(rank, word * 64 + __builtin_ctzll(left));
      }
    }
  }
};

// Finds candidates, an output line at a time.
class Marker {
 public:
  // A worker's buffers.
  struct Rows {
    uint64_t* read;     // the sites that a tap reads from
    uint64_t* reached;  // the sites of the output line

    Rows(Carver& carver, const LineWindow& line)
        : read(carver.Take<uint64_t>(CeilDiv(line.input_length, 64))),
          reached(carver.Take<uint64_t>(CeilDiv(line.output_length, 64))) {}
  };

  // `live`: whether a tap has a live weight.
  Marker(const products::TapReach& reach, const bool* live)
      : reach_(reach), line_(reach.lines.line), live_(live), stride_(line_.stride) {}

  void Mark(int64_t output_line, const products::SiteIndex& index, const Rows& rows, int64_t* bases,
            const Candidates& to) const {
    reach_.TurnTo(output_line, index, bases);
    const int64_t tap_lines = reach_.lines.tap_lines;
    if (std::all_of(bases, bases + tap_lines, [](int64_t base) { return base < 0; })) return;
    std::fill_n(rows.reached, CeilDiv(line_.output_length, 64), 0);
    for (int64_t tap = 0; tap < line_.taps; ++tap) {
      std::fill_n(rows.read, CeilDiv(line_.input_length, 64), 0);
      for (int64_t t = 0; t < tap_lines; ++t) {
        if (bases[t] < 0 || !live_[t * line_.taps + tap]) continue;
        AddLine(index.bits, bases[t], rows.read);
      }
      Reach(rows.read, line_.low - tap * line_.dilation, rows.reached);
    }
    Put(rows.reached, output_line * line_.output_length, to.bits);
  }

 private:
  // to |= the input line whose first bit is that of `first`.
  void AddLine(const uint64_t* from, int64_t first, uint64_t* to) const {
    for (int64_t at = 0; at < line_.input_length; at += 64, ++to) {
      const int64_t left = line_.input_length - at;
      const uint64_t word = Bits(from, first + at);
      *to |= left < 64 ? word & ((uint64_t{1} << left) - 1) : word;
    }
  }

  // The 64 bits from bit `first` on.
  static uint64_t Bits(const uint64_t* from, int64_t first) {
    const int64_t shift = first & 63;
    const uint64_t low = from[first >> 6] >> shift;
    return shift == 0 ? low : low | from[(first >> 6) + 1] << (64 - shift);
  }

  // reached |= the sites (place + shift) / stride for the places in `read`.
  void Reach(const uint64_t* read, int64_t shift, uint64_t* reached) const {
    for (int64_t at = 0; at < line_.input_length; at += 64, ++read) {
      if (*read == 0) continue;
      if (line_.stride == 1) {
        AddWord(*read, at + shift, line_.output_length, reached);
        continue;
      }
      for (uint64_t left = *read; left != 0; left &= left - 1) {
        const int64_t place = at + shift + __builtin_ctzll(left);
        if (place < 0) continue;
        const int64_t site = stride_.Quotient(place);
        if (site * line_.stride != place || site >= line_.output_length) continue;
        reached[site >> 6] |= uint64_t{1} << (site & 63);
      }
    }
  }

  // to |= the bits of `word`, put from bit `first` on, as far as they are in [0, length).
  static void AddWord(uint64_t word, int64_t first, int64_t length, uint64_t* to) {
    if (first <= -64 || first >= length) return;
    if (first < 0) word >>= -first, first = 0;
    if (length - first < 64) word &= (uint64_t{1} << (length - first)) - 1;
    const int64_t shift = first & 63;
    to[first >> 6] |= word << shift;
    if (shift != 0 && word >> (64 - shift) != 0) to[(first >> 6) + 1] |= word >> (64 - shift);
  }

  // Puts an output line from bit `first` on; other threads put its neighbours.
  void Put(const uint64_t* reached, int64_t first, uint64_t* bits) const {
    const int64_t shift = first & 63;
    uint64_t* to = bits + (first >> 6);
    const auto add = [](uint64_t* at, uint64_t word) {
      if (word != 0) __atomic_fetch_or(at, word, __ATOMIC_RELAXED);
    };
    for (int64_t at = 0; at < line_.output_length; at += 64, ++reached, ++to) {
      add(to, *reached << shift);
      if (shift != 0) add(to + 1, *reached >> (64 - shift));
    }
  }

  const products::TapReach& reach_;
  const LineWindow& line_;
  const bool* live_;
  Divider stride_;
};

}  // namespace ilajax
