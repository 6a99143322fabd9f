// Submanifold convolution on the CPU, and its gradient.
//
// Layers of several channels are matrix products over pairs of sites (products/pairs.h). Narrow ones
// go line by line, forward (submanifold/lines.h) and backward as a convolution that has kept these
// sites (lines/gradient.h).

#include <optional>

#include "xla_kernels/lines/gradient.h"
#include "xla_kernels/products/backward.h"
#include "xla_kernels/products/forward.h"
#include "xla_kernels/submanifold/lines.h"
#include "xla_kernels/submanifold/spec.h"

namespace ilajax {
namespace {

// The plans of both ways, and the workspace of the one that is taken.
template <typename ByLines>
struct EitherPlan {
  products::Plan products;
  ByLines lines;
};
template <typename ByLines>
struct EitherLayout {
  std::optional<products::Layout> products;
  std::optional<ByLines> lines;

  template <typename Plan>
  EitherLayout(Carver& carver, const ConvShape& s, const Plan& plan) {
    if (plan.products.samples > 0) {
      products.emplace(carver, s, plan.products);
    } else {
      lines.emplace(carver, s, plan.lines);
    }
  }
};

// Products, where a layer is wide enough.
products::Plan ProductsPlan(const ConvShape& s, const Tuning& tuning, bool backward) {
  // The gradient by lines costs more than its products where most sites are stored.
  if (s.in_channels * s.out_channels < tuning.products / (backward ? 2 : 1)) return {};
  return products::MakePlan(s, tuning, backward);
}
bool ProductsFit(const ConvShape& s, const products::Plan& plan, bool backward) {
  return plan.samples == 0 || products::Fits(s, plan, backward);
}

struct SubmanifoldForward {
  using Call = SubmanifoldFwd;
  using Plan = EitherPlan<LinesForward::Plan>;
  template <typename T>
  using Layout = EitherLayout<LinesForward::Layout<T>>;

  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    return {ProductsPlan(s, tuning, false), LinesForward::Make<T>(s, tuning)};
  }
  static bool Fits(const ConvShape& s, const Plan& plan) {
    return ProductsFit(s, plan.products, false) && LinesForward::Fits(s, plan.lines);
  }
  static int64_t MapWords(const ConvShape& s, const Plan& plan) {
    return products::MapWords(s, plan.products, false);
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, SubmanifoldFwd call, const ConvShape& s,
                        const Plan& plan, Layout<T>& layout) {
    if (layout.lines) return LinesForward::Run<T>(pool, call, s, plan.lines, *layout.lines);
    products::RunForward<T>(pool, call, call.keys, s, plan.products, *layout.products);
    return ffi::Error::Success();
  }
};

struct SubmanifoldBackward {
  using Call = SubmanifoldBwd;
  using Plan = EitherPlan<GradientPlan>;
  template <typename T>
  using Layout = EitherLayout<GradientLayout>;
  using ByLines = LineGradient<SubmanifoldBwd>;

  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    return {ProductsPlan(s, tuning, true), MakeGradientPlan(s, tuning)};
  }
  static bool Fits(const ConvShape& s, const Plan& plan) {
    return ProductsFit(s, plan.products, true) && ilajax::Fits(s, plan.lines);
  }
  static int64_t MapWords(const ConvShape& s, const Plan& plan) {
    return products::MapWords(s, plan.products, true);
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, SubmanifoldBwd call, const ConvShape& s,
                        const Plan& plan, Layout<T>& layout) {
    if (layout.lines) return ByLines::Run<T>(pool, call, s, plan.lines, *layout.lines);
    products::RunBackward<T>(pool, call, call.keys, s, plan.products, *layout.products);
    return ffi::Error::Success();
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(SubmanifoldFwd, SubmanifoldForward);
ILAJAX_CPU_TARGET(SubmanifoldBwd, SubmanifoldBackward);
