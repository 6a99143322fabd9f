// Convolution at given sites on the CPU, and its gradient: matrix products over pairs of sites
// (products/pairs.h).

#include "xla_kernels/conv_at/spec.h"
#include "xla_kernels/products/backward.h"
#include "xla_kernels/products/forward.h"

namespace ilajax {
namespace {

template <typename CallOfWay, bool kBackward>
struct ByProducts {
  using Call = CallOfWay;
  using Plan = products::Plan;
  template <typename T>
  using Layout = products::Layout;

  template <typename T>
  static Plan Make(const ConvAtShape& s, const Tuning& tuning) {
    return products::MakePlan(s, tuning, kBackward);
  }
  static bool Fits(const ConvAtShape& s, const Plan& plan) {
    return products::Fits(s, plan, kBackward);
  }
  static int64_t MapWords(const ConvAtShape& s, const Plan& plan) {
    return products::MapWords(s, plan, kBackward);
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, Call call, const ConvAtShape& s, const Plan& plan,
                        Layout<T>& layout) {
    if constexpr (kBackward) {
      products::RunBackward<T>(pool, call, call.out_keys, s, plan, layout);
    } else {
      products::RunForward<T>(pool, call, call.out_keys, s, plan, layout);
    }
    return ffi::Error::Success();
  }
};
using ConvAtForward = ByProducts<ConvAtFwd, false>;
using ConvAtBackward = ByProducts<ConvAtBwd, true>;

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(ConvAtFwd, ConvAtForward);
ILAJAX_CPU_TARGET(ConvAtBwd, ConvAtBackward);
