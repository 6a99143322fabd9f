// Division without a division.

#ifndef ILAJAX_XLA_KERNELS_COMMON_DIVIDER_H_
#define ILAJAX_XLA_KERNELS_COMMON_DIVIDER_H_

#include <cstdint>

namespace ilajax {

// n / d for n < 2^32, by a multiplication.
class Divider {
 public:
  explicit Divider(int64_t d) : d_(d), inverse_(d > 1 ? ~uint64_t{0} / d + 1 : 0) {}
  int64_t Quotient(int64_t n) const {
    if (d_ == 1) return n;
    return static_cast<int64_t>(static_cast<unsigned __int128>(inverse_) * n >> 64);
  }

 private:
  int64_t d_;
  uint64_t inverse_;
};

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_DIVIDER_H_
