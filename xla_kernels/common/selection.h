// k-selection: which entries count as the strongest, and a running selection of the best K of a
// stream.

#ifndef ILAJAX_XLA_KERNELS_COMMON_SELECTION_H_
#define ILAJAX_XLA_KERNELS_COMMON_SELECTION_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>

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
// zeros are equal.
ILAJAX_HOST_DEVICE inline uint32_t RankBits(float value, Select select) {
  if (value != value) return 0xffffffffu;
  uint32_t bits = FloatBits(value);
  if (select == Select::kMagnitude) bits &= 0x7fffffffu;
  if ((bits & 0x7fffffffu) == 0) bits = 0;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The rank of the weakest of the `capacity` strongest candidates among `count` entries, found eight
// bits at a time from the highest: four passes, no memory.
struct RankCut {
  uint32_t threshold = 0;
  int64_t ties = 0;  // entries of just that rank to keep, those with the lowest keys

  template <typename Candidate, typename Rank>
  RankCut(int64_t count, int64_t capacity, Candidate&& candidate, Rank&& rank) : ties(capacity) {
    if (count <= capacity) return;
    for (int shift = 24; shift >= 0; shift -= 8) {
      int64_t histogram[256] = {};
      const uint32_t fixed = shift == 24 ? 0 : ~uint32_t{0} << (shift + 8);
      for (int64_t i = 0; i < count; ++i) {
        if (!candidate(i)) continue;
        const uint32_t r = rank(i);
        if ((r & fixed) == threshold) ++histogram[r >> shift & 255];
      }
      uint32_t digit = 255;
      while (digit > 0 && histogram[digit] < ties) ties -= histogram[digit--];
      threshold |= digit << shift;
    }
  }

  // Whether an entry is kept, asked in the order of the keys; counts `remaining` down from `ties`.
  bool Keeps(uint32_t rank, int64_t& remaining) const {
    return rank > threshold || (rank == threshold && remaining-- > 0);
  }
};

// Keeps the `capacity` strongest of a stream of entries with ascending keys, in the order of their
// keys.
//
// The output holds the best so far, and an overflow buffer behind it the newest. When that is full,
// the weakest of both are cut, and one stable pass compacts. From the first cut on, what does not
// beat that rank is dropped on sight (a tie has the higher key, and loses). So an entry costs O(1 +
// capacity / overflow), in a space that the stream's length has no say in.
//
// With keys == nullptr only values are kept, for the further channels of a shared support.
template <typename T>
class RunningTopK {
 public:
  RunningTopK() = default;
  RunningTopK(Select select, int64_t capacity, int32_t* keys, T* values, int64_t overflow,
              int32_t* overflow_keys, T* overflow_values)
      : select_(select),
        capacity_(capacity),
        room_(capacity + overflow),
        keys_(keys),
        values_(values),
        overflow_keys_(overflow_keys),
        overflow_values_(overflow_values) {}

  void Push(int64_t key, T value) {
    if (cut_ && RankBits(static_cast<float>(value), select_) <= threshold_) return;
    if (count_ == room_) {
      Cut();
      if (RankBits(static_cast<float>(value), select_) <= threshold_) return;
    }
    Put(count_++, static_cast<int32_t>(key), value);
  }

  // Cuts to the capacity, and pads the rest of the output with `padding` keys.
  void Finish(int64_t padding) {
    if (count_ > capacity_) Cut();
    for (int64_t i = count_; i < capacity_; ++i) Put(i, static_cast<int32_t>(padding), T(0.0f));
  }

 private:
  int32_t Key(int64_t i) const {
    if (keys_ == nullptr) return 0;
    return i < capacity_ ? keys_[i] : overflow_keys_[i - capacity_];
  }
  T Value(int64_t i) const { return i < capacity_ ? values_[i] : overflow_values_[i - capacity_]; }
  void Put(int64_t i, int32_t key, T value) {
    if (keys_ != nullptr) (i < capacity_ ? keys_[i] : overflow_keys_[i - capacity_]) = key;
    (i < capacity_ ? values_[i] : overflow_values_[i - capacity_]) = value;
  }
  uint32_t Rank(int64_t i) const { return RankBits(static_cast<float>(Value(i)), select_); }

  void Cut() {
    const RankCut cut(
        count_, capacity_, [](int64_t) { return true; }, [&](int64_t i) { return Rank(i); });
    int64_t kept = 0, ties = cut.ties;
    for (int64_t i = 0; i < count_; ++i) {
      if (cut.Keeps(Rank(i), ties)) Put(kept++, Key(i), Value(i));
    }
    count_ = kept;
    threshold_ = cut.threshold;
    cut_ = true;
  }

  Select select_ = Select::kValue;
  int64_t capacity_ = 0, room_ = 0;
  int32_t* keys_ = nullptr;
  T* values_ = nullptr;
  int32_t* overflow_keys_ = nullptr;
  T* overflow_values_ = nullptr;
  int64_t count_ = 0;
  uint32_t threshold_ = 0;
  bool cut_ = false;
};

// What ilajax/ops/_plans.py counts for each.
static_assert(sizeof(RunningTopK<float>) <= 96);

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_SELECTION_H_
