// Direct sparse convolution with k-selection on the CPU, and its gradient.
//
// The grid is seen as lines along its last axis (lines/lines.h), and a convolution goes from output
// line to output line, each of which reads a handful of input lines, one for each line of taps. Its
// sums stand in a buffer [site][channel of a block] in the first-level cache. The grid itself is
// never allocated, cleared or scanned. An input line comes in one of three forms, chosen by what it
// holds:
//
//   entries   of all channels, sorted into the line. Each adds its weights to the sites it reaches;
//             work follows stored entries x live taps.
//   stacks    of all channels, for each site in use, where most of them are stored there. A site's
//             channels are summed in registers (lines/lines.h, lines/sort.inc).
//   dense     site by site, where filters are pruned or the grid is nearly full. One live weight at
//             a time is added along the line; work follows lines x live weights (lines/dense.h).
//
// A bitmap, the shifted bitmaps of the input lines, says which sites of a line to read, hand to the
// selection and clear.
//
// Nothing depends on threads. A response's sum goes by line of taps, and within it as the form of
// the input line has it; forward, the form depends on the sample alone, and backward on the slab. A
// slab that holds an inf or NaN takes the careful loops. Results are repeatable.
//
// Forward: cpu_forward.h, lines/sums.h. Backward: lines/gradient.h.

#include <algorithm>
#include <cstdint>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/conv/cpu_forward.h"
#include "xla_kernels/conv/spec.h"
#include "xla_kernels/lines/gradient.h"

namespace ilajax {
namespace {

struct ConvForward {
  using Call = ConvFwd;
  using Plan = ForwardPlan;
  template <typename T>
  using Layout = ForwardLayout<T>;

  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    return MakeForwardPlan<T>(s, tuning);
  }
  static bool Fits(const ConvShape& s, const Plan& plan) {
    const Lines lines(Squeeze(s.w));
    return ilajax::Fits(plan.sums, lines, s.in_channels) && plan.parts >= 1 &&
           plan.parts <= lines.planes && plan.workers >= 1 &&
           plan.stage / 2 > LineBuffer(lines.line, plan.sums.line_sites, plan.sums.block).piece;
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, ConvFwd call, const ConvShape& s, const Plan& plan,
                        Layout<T>& layout) {
    const auto& [w, lines, tables, bias, selections, workers] = layout;
    Select select;
    ILAJAX_RETURN_IF_ERROR(ReadSelect(call.select, select));
    layout.tables.Fill(s, w, lines, call.kernel_keys.typed_data(), call.weights.typed_data());
    const int64_t blocks = tables.filters.blocks;
    std::fill_n(bias, blocks * plan.sums.block, 0.0f);
    std::copy_n(call.bias.typed_data(), s.out_channels, bias);
    std::fill_n(selections.digits, selections.segments * kDigits, 0);
    for (int64_t i = 0; i < plan.workers; ++i) workers.At(i, lines, plan).sums.Clear(lines);

    int32_t* const out_keys = call.out_keys->typed_data();
    T* const out_values = Data<T>(*call.out_values);
    int32_t* const responses = call.responses->typed_data();
    const StoredInput<T> input = {s, call.keys.typed_data(), Data<T>(call.values)};
    const LineSums<T> sums = {input, lines, tables, plan.sums};
    const Forward<T> forward = {sums,     plan,       select,    w.output_sites, bias,
                                out_keys, out_values, responses, selections};
    ParallelFor(pool, s.batch * blocks * plan.parts, plan.workers, [&](int64_t task, int64_t id) {
      ForwardWorker<T> worker = layout.workers.At(id, lines, plan);
      const int64_t rest = task / plan.parts;
      DispatchLoops(plan.sums.block, [&]<typename Loops, int kOctets>() {
        forward.template Run<Loops, kOctets>(rest / blocks, rest % blocks, task % plan.parts,
                                             worker);
      });
    });
    ParallelFor(pool, selections.segments, plan.workers, [&](int64_t segment, int64_t) {
      responses[segment] = layout.selections.Merge(segment, select, s.capacity, s.w.output_sites,
                                                   out_keys + segment * s.capacity,
                                                   out_values + segment * s.capacity);
    });
    return ffi::Error::Success();
  }
};

using ConvBackward = LineGradient<ConvBwd>;

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(ConvFwd, ConvForward);
ILAJAX_CPU_TARGET(ConvBwd, ConvBackward);
