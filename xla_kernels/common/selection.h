// k-selection: which entries count as the strongest, and a running selection of the best K of a
// stream.

#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <utility>

#include "xla_kernels/common/ffi.h"

namespace ilajax {

enum class Select { kValue, kPositive, kMagnitude };

inline ffi::Error ReadSelect(std::string_view name, Select& select) {
  if (name == "value") {
    select = Select::kValue;
  } else if (name == "positive") {
    select = Select::kPositive;
  } else if (name == "magnitude") {
    select = Select::kMagnitude;
  } else {
    return InvalidArgument("select is \"", name, "\", expected value, positive or magnitude");
  }
  return ffi::Error::Success();
}

// NaN is a candidate in every mode.
ILAJAX_HOST_DEVICE inline bool IsCandidate(float value, Select select) {
  return select != Select::kPositive || !(value <= 0.0f);
}

// Bits that order values as their ranks do: the larger, the stronger. NaN comes first, and the two
// zeros are equal. Without branches, since values come in no order.
ILAJAX_HOST_DEVICE inline uint32_t RankBits(float value, Select select) {
  const uint32_t bits = FloatBits(value), magnitude = bits & 0x7fffffffu;
  const bool negative = bits != magnitude && magnitude != 0 && select != Select::kMagnitude;
  const uint32_t rank = negative ? ~bits : magnitude | 0x80000000u;
  return magnitude > 0x7f800000u ? 0xffffffffu : rank;
}

// How many candidates have which first digit of their rank: eleven bits, for a float its sign,
// exponent and two bits of its mantissa.
constexpr int kFirstDigit = 21;
constexpr int kDigits = 2048;

// The rank of the weakest of the `capacity` strongest among `count` candidates, found eleven bits
// at a time from the highest: two passes or three, 24 kB of memory.
struct RankCut {
  uint32_t threshold = 0;
  int64_t ties = 0;  // entries of just that rank to keep, those with the lowest keys

  // `each(f)` calls f(rank) for every candidate. `counted`, if there, has them counted by their
  // first digit, and may have counted more that are too weak.
  template <typename Each>
  RankCut(int64_t count, int64_t capacity, Each&& each, const int32_t* counted = nullptr)
      : ties(capacity) {
    if (count <= capacity) return;
    int32_t histogram[kDigits];
    if (counted == nullptr) {
      std::memset(histogram, 0, sizeof(histogram));
      each([&](uint32_t rank) { ++histogram[rank >> kFirstDigit]; });
      counted = histogram;
    }
    Settle(counted, kFirstDigit, kDigits);
    // Those that share the first digit come in no order: they are listed without a branch. Mostly
    // the list holds them all, and the last digit needs no pass of its own.
    constexpr int kRoom = 4096;
    uint32_t list[kRoom];
    int listed = 0;
    bool all = true;
    for (const auto& [shift, digits] : {std::pair{kFirstDigit - 11, 2048}, {0, 1024}}) {
      std::memset(histogram, 0, digits * sizeof(int32_t));
      const uint32_t fixed = ~uint32_t{0} << shift << (shift == 0 ? 10 : 11);
      auto count_list = [&, shift = shift, digits = digits] {
        for (int i = 0; i < listed; ++i) {
          if (((list[i] ^ threshold) & fixed) == 0) ++histogram[list[i] >> shift & (digits - 1)];
        }
      };
      if (shift != 0 || !all) {
        listed = 0;
        each([&](uint32_t rank) {
          list[listed] = rank;
          listed += ((rank ^ threshold) & fixed) == 0;
          if (listed < kRoom) return;
          count_list();
          listed = 0;
          all = false;
        });
      }
      count_list();
      Settle(histogram, shift, digits);
    }
  }

  // Whether an entry is kept, asked in the order of the keys; counts `remaining` down from `ties`.
  bool Keeps(uint32_t rank, int64_t& remaining) const {
    bool keeps = rank > threshold;
    if (rank == threshold) [[unlikely]]
      keeps = remaining-- > 0;
    return keeps;
  }

 private:
  // Sets the digit of the threshold at `shift`, from how many candidates have which.
  void Settle(const int32_t* counts, int shift, int digits) {
    uint32_t digit = digits - 1;
    while (digit > 0 && counts[digit] < ties) ties -= counts[digit--];
    threshold |= digit << shift;
  }
};

// An entry on its way to a selection, in one word.
inline uint64_t StagedEntry(int64_t key, float value) {
  return static_cast<uint64_t>(FloatBits(value)) << 32 | static_cast<uint32_t>(key);
}

// Keeps the `capacity` strongest of a stream of entries with ascending keys, in the order of their
// keys.
//
// Entries are staged. When the stage is full they are counted by the first digit of their rank,
// which tells below which digit nothing can be among the best; what is weaker goes, from the stage,
// from the output, and from then on before it is staged. The rest moves to the output as far as
// that has room. Where more than half of the stage stays behind, output and stage are cut exactly,
// and from then on what does not beat the cut's rank is dropped (a tie has the higher key, and
// loses). So an entry costs O(1 + capacity / stage_size), in a space that the stream's length has
// no say in.
//
// Selections of several parts of one stream may share the counts: a bound on one holds for all.
//
// With keys == nullptr only values are kept, for the further channels of a shared support.
template <typename T>
class RunningTopK {
 public:
  RunningTopK() = default;
  // `stage_size` entries fit on the stage, `counts` has kDigits of them. With `shared` they are
  // zero and used by other threads too, and the best `wanted` of all parts are sought, `capacity`
  // at most here.
  RunningTopK(Select select, int64_t capacity, int32_t* keys, T* values, int64_t stage_size,
              uint64_t* stage, int32_t* counts, bool shared = false, int64_t wanted = 0)
      : select_(select),
        shared_(shared),
        counting_(shared),
        capacity_(capacity),
        wanted_(shared ? wanted : capacity),
        stage_size_(stage_size),
        keys_(keys),
        values_(values),
        stage_(stage),
        counts_(counts) {}

  void Push(int64_t key, T value) {
    const float v = static_cast<float>(value);
    if (RankBits(v, select_) < least_) return;
    if (staged_ == stage_size_) {
      staged_ = Flush(staged_);
      if (RankBits(v, select_) < least_) return;
    }
    stage_[staged_++] = StagedEntry(key, v);
  }

  // Takes entries off the stage, which has the first `staged`; returns how many stay, in front and
  // half of the stage_size at most. Others may fill the stage as well.
  int64_t Flush(int64_t staged) {
    staged = Sift(staged);
    if (stored_ + staged > capacity_) DropStored();
    const int64_t moved = std::min(capacity_ - stored_, staged);
    for (int64_t i = 0; i < moved; ++i) Put(stored_ + i, stage_[i]);
    stored_ += moved;
    staged -= moved;
    if (moved > 0) std::memmove(stage_, stage_ + moved, staged * sizeof(uint64_t));
    if (staged > stage_size_ / 2) staged = Cut(staged);
    counted_ = staged;
    return staged;
  }

  // What the rank value of an entry must not be less than to be worth staging; NaN: anything is.
  float least() const {
    constexpr uint32_t kInfinity = 0xff800000u;
    const uint32_t rank = std::min(least_, kInfinity);
    return BitsFloat(rank & 0x80000000u ? rank ^ 0x80000000u : ~rank);
  }

  // Takes all of the stage, and cuts to the capacity. Returns how many entries are stored.
  int64_t Close(int64_t staged) {
    // What one list drops the cut drops as well; of several, few may be worth a cut.
    if (shared_) {
      staged = Sift(staged);
    } else if (StartsCounting(staged)) {
      Count(staged);
    }
    if (stored_ + staged > capacity_) {
      Cut(staged);
    } else {
      for (int64_t i = 0; i < staged; ++i) Put(stored_ + i, stage_[i]);
      stored_ += staged;
    }
    staged_ = counted_ = 0;
    return stored_;
  }

  // Closes, and pads the rest of the output with `padding` keys.
  void Finish(int64_t padding) {
    for (int64_t i = Close(staged_); i < capacity_; ++i) {
      if (keys_ != nullptr) keys_[i] = static_cast<int32_t>(padding);
      values_[i] = T(0.0f);
    }
  }

 private:
  void Put(int64_t i, uint64_t entry) {
    if (keys_ != nullptr) keys_[i] = static_cast<int32_t>(entry);
    values_[i] = T(BitsFloat(static_cast<uint32_t>(entry >> 32)));
  }
  uint32_t StoredRank(int64_t i) const { return RankBits(static_cast<float>(values_[i]), select_); }
  // Calls f(i, its rank) for staged entries [begin, end). Ranks are taken a chunk at a time, by a
  // loop that compilers turn into vectors.
  template <typename F>
  void ForStaged(int64_t begin, int64_t end, F&& f) const {
    constexpr int64_t kChunk = 128;
    uint32_t ranks[kChunk];
    for (; begin < end; begin += kChunk) {
      const int64_t count = std::min(kChunk, end - begin);
      const uint64_t* entry = stage_ + begin;
      const auto take = [&](Select select) {
        for (int64_t i = 0; i < count; ++i) {
          ranks[i] = RankBits(BitsFloat(static_cast<uint32_t>(entry[i] >> 32)), select);
        }
      };
      select_ == Select::kMagnitude ? take(Select::kMagnitude) : take(Select::kValue);
      for (int64_t i = 0; i < count; ++i) f(begin + i, ranks[i]);
    }
  }

  // Counts what has come to the stage, once there may be too much, and drops from it what cannot be
  // among the best. Returns how many are left.
  int64_t Sift(int64_t staged) {
    if (!StartsCounting(staged)) return staged;
    const uint32_t before = least_;
    Count(staged);
    return least_ == before ? staged : DropStaged(staged);
  }

  // Whether entries are counted, from here on if there may be too many for the first time.
  bool StartsCounting(int64_t staged) {
    if (!counting_ && stored_ + staged > capacity_) {
      counting_ = true;
      std::memset(counts_, 0, kDigits * sizeof(int32_t));
      for (int64_t i = 0; i < stored_; ++i) ++counts_[StoredRank(i) >> kFirstDigit];
    }
    return counting_;
  }

  // Counts what has come to the stage, and raises the least rank that may be among the best.
  void Count(int64_t staged) {
    int64_t above = 0;
    int digit = kDigits;
    if (shared_) {
      int32_t own[kDigits] = {};
      ForStaged(counted_, staged, [&own](int64_t, uint32_t rank) { ++own[rank >> kFirstDigit]; });
      while (digit > 0 && above < wanted_) {
        --digit;
        above += own[digit] == 0
                     ? __atomic_load_n(counts_ + digit, __ATOMIC_RELAXED)
                     : __atomic_add_fetch(counts_ + digit, own[digit], __ATOMIC_RELAXED);
      }
      for (int rest = digit - 1; rest >= 0; --rest) {
        if (own[rest] != 0) __atomic_fetch_add(counts_ + rest, own[rest], __ATOMIC_RELAXED);
      }
    } else {
      // Ranks have few first digits: a second table keeps increments from waiting for each other.
      int32_t second[kDigits];
      const bool many = staged - counted_ > 4 * kDigits;
      if (many) std::memset(second, 0, sizeof(second));
      ForStaged(counted_, staged,
                [tables = std::array{counts_, many ? second : counts_}](int64_t i, uint32_t rank) {
                  ++tables[i & 1][rank >> kFirstDigit];
                });
      for (int i = 0; many && i < kDigits; ++i) counts_[i] += second[i];
      while (digit > 0 && above < wanted_) above += counts_[--digit];
    }
    if (above < wanted_) return;
    bound_ = static_cast<uint32_t>(digit) << kFirstDigit;
    least_ = std::max(least_, bound_);
  }

  int64_t DropStaged(int64_t staged) const {
    int64_t kept = 0;
    ForStaged(0, staged, [&kept, stage = stage_, least = least_](int64_t i, uint32_t rank) {
      stage[kept] = stage[i];
      kept += rank >= least;
    });
    return kept;
  }

  void DropStored() {
    int64_t kept = 0;
    for (int64_t i = 0; i < stored_; ++i) {
      const bool keep = StoredRank(i) >= bound_;
      if (keys_ != nullptr) keys_[kept] = keys_[i];
      values_[kept] = values_[i];
      kept += keep;
    }
    stored_ = kept;
  }

  // Cuts to the capacity, which there is more than; nothing stays on the stage.
  int64_t Cut(int64_t staged) {
    const RankCut cut(
        stored_ + staged, capacity_,
        [&](auto&& f) {
          for (int64_t i = 0; i < stored_; ++i) f(StoredRank(i));
          ForStaged(0, staged, [&f](int64_t, uint32_t rank) { f(rank); });
        },
        counting_ && !shared_ ? counts_ : nullptr);
    int64_t kept = 0, ties = cut.ties;
    for (int64_t i = 0; i < stored_; ++i) {
      const bool keep = cut.Keeps(StoredRank(i), ties);
      if (keys_ != nullptr) keys_[kept] = keys_[i];
      values_[kept] = values_[i];
      kept += keep;
    }
    // Written before it is known whether to keep it: there is room until all are.
    ForStaged(0, staged, [&](int64_t i, uint32_t rank) {
      if (kept == capacity_) return;
      Put(kept, stage_[i]);
      kept += cut.Keeps(rank, ties);
    });
    stored_ = kept;
    if (cut.threshold != 0xffffffffu) least_ = std::max(least_, cut.threshold + 1);
    return 0;
  }

  Select select_ = Select::kValue;
  bool shared_ = false, counting_ = false;
  int64_t capacity_ = 0, wanted_ = 0, stage_size_ = 0;
  int32_t* keys_ = nullptr;
  T* values_ = nullptr;
  uint64_t* stage_ = nullptr;
  int32_t* counts_ = nullptr;
  int64_t stored_ = 0, staged_ = 0, counted_ = 0;
  uint32_t bound_ = 0;  // below it nothing is among the best
  uint32_t least_ = 0;  // nor what is still to come: after a cut its ties, too, are late
};

// A stage for one segment by itself.
inline int64_t StageOfSegment(int64_t capacity) {
  return std::clamp<int64_t>(capacity, 64, 1 << 14);
}

}  // namespace ilajax
