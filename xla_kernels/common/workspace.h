// A workspace is an extra result of the custom call, whose arrays are carved out of it in order.

#pragma once

#include <cstdint>
#include <limits>

namespace ilajax {

// Hands out aligned arrays, one behind the other. Without memory it only adds up their sizes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  // An array of as many elements as the product of `counts`: some come from outside, and may overflow.
  template <typename T, typename... Counts>
  T* Take(Counts... counts) {
    const int64_t begin = used_;
    int64_t bytes = sizeof(T);
    ((overflow_ |= counts < 0 || __builtin_mul_overflow(bytes, int64_t{counts}, &bytes)), ...);
    overflow_ |= __builtin_add_overflow(bytes, kAlignment - 1, &bytes) ||
                 __builtin_add_overflow(used_, bytes / kAlignment * kAlignment, &used_);
    return base_ == nullptr || overflow_ ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }

  int64_t used() const { return overflow_ ? std::numeric_limits<int64_t>::max() : used_; }

 private:
  static constexpr int64_t kAlignment = 64;

  char* base_;
  int64_t used_ = 0;
  bool overflow_ = false;
};

// The bytes of a Layout, which is constructed from a carver and its sizes.
template <typename Layout, typename... Sizes>
int64_t SizeOf(const Sizes&... sizes) {
  Carver carver(nullptr);
  Layout layout(carver, sizes...);
  return carver.used();
}

// A Layout for each worker.
template <typename Layout>
class LayoutOfEach {
 public:
  template <typename... Sizes>
  LayoutOfEach(Carver& carver, int64_t workers, const Sizes&... sizes)
      : bytes_(SizeOf<Layout>(sizes...)), base_(carver.Take<char>(workers, bytes_)) {}

  // That of a worker, from the sizes that this was made of.
  template <typename... Sizes>
  Layout At(int64_t worker, const Sizes&... sizes) const {
    Carver carver(base_ + worker * bytes_);
    return Layout(carver, sizes...);
  }

 private:
  int64_t bytes_;
  char* base_;
};

}  // namespace ilajax
