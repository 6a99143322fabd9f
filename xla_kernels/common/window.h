// The geometry of a sliding window, ilajax/geometry.py's Window: tap t of output site o reads input
// site (o * stride + t * dilation - low) / input_dilation, where that divides.

#pragma once

#include <iterator>
#include <utility>

#include "xla_kernels/common/ffi.h"

namespace ilajax {

constexpr int kMaxRank = 8;

using Span = ffi::Span<const int64_t>;

struct Window {
  int rank = 0;
  int64_t input_shape[kMaxRank], window_shape[kMaxRank], strides[kMaxRank], dilation[kMaxRank];
  int64_t low[kMaxRank], output_shape[kMaxRank], input_dilation[kMaxRank];
  int64_t taps = 1, input_sites = 1, output_sites = 1;

  // Sites of a plane: of one step along the leading axis.
  ILAJAX_HOST_DEVICE int64_t input_plane() const { return input_sites / input_shape[0]; }
  ILAJAX_HOST_DEVICE int64_t output_plane() const { return output_sites / output_shape[0]; }
  // Of the larger grid.
  int64_t sites() const { return input_sites < output_sites ? output_sites : input_sites; }
  // Reach of the window along the leading axis.
  ILAJAX_HOST_DEVICE int64_t extent() const { return (window_shape[0] - 1) * dilation[0] + 1; }

  // What most operations take.
  ffi::Error CheckUndilated(const char* op) const {
    for (int a = 0; a < rank; ++a) {
      if (input_dilation[a] != 1) return InvalidArgument(op, ": the input must not be dilated");
    }
    return ffi::Error::Success();
  }

  // Reads the attribute: rank numbers each of the input's shape, the window's, strides, dilation,
  // low, the output's shape and the input's dilation.
  static ffi::Error Read(Span numbers, Window& w) {
    constexpr int64_t kMaxSites = 0x7fffffff;
    int64_t* const fields[] = {w.input_shape, w.window_shape, w.strides,       w.dilation,
                               w.low,         w.output_shape, w.input_dilation};
    const size_t rank = numbers.size() / std::size(fields);
    if (rank < 1 || rank > kMaxRank || numbers.size() % std::size(fields) != 0) {
      return InvalidArgument("a window has ", rank, " axes; kernels take 1 to ", kMaxRank);
    }
    w = {};
    w.rank = static_cast<int>(rank);
    const int64_t* number = numbers.begin();
    for (int64_t* field : fields) {
      for (int a = 0; a < w.rank; ++a, ++number) {
        if (field != w.low && (*number < 1 || *number > kMaxSites)) {
          return InvalidArgument("window attribute ", *number, " out of range");
        }
        field[a] = *number;
      }
    }
    for (int a = 0; a < w.rank; ++a) {
      w.taps *= w.window_shape[a];
      w.input_sites *= w.input_shape[a];
      w.output_sites *= w.output_shape[a];
      if (w.taps > kMaxSites || w.input_sites > kMaxSites || w.output_sites > kMaxSites) {
        return InvalidArgument("a grid or window has 2^31 sites or more");
      }
    }
    return ffi::Error::Success();
  }
};

// The window of the gradient of the values, from output sites to input sites.
inline Window Reversed(const Window& w) {
  Window r = w;
  std::swap(r.input_sites, r.output_sites);
  for (int a = 0; a < w.rank; ++a) {
    std::swap(r.input_shape[a], r.output_shape[a]);
    std::swap(r.strides[a], r.input_dilation[a]);
    r.low[a] = (w.window_shape[a] - 1) * w.dilation[a] - w.low[a];
  }
  return r;
}

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

// Writes how far each tap reaches along each axis, [taps][rank].
inline void TapOffsets(const Window& w, int32_t* offsets) {
  for (int64_t tap = 0; tap < w.taps; ++tap, offsets += w.rank) {
    int64_t rest = tap;
    for (int a = w.rank - 1; a >= 0; --a) {
      offsets[a] = static_cast<int32_t>(rest % w.window_shape[a] * w.dilation[a]);
      rest /= w.window_shape[a];
    }
  }
}

}  // namespace ilajax
