// The non-zeros of a dense array on the CPU; a task for each (sample, block of channels).
//
// x is read once, as it lies in memory, and every non-zero goes to the running selection of its
// channel.

#include <algorithm>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/common/selection.h"
#include "xla_kernels/from_dense/spec.h"

namespace ilajax {
namespace {

struct FromDenseForward {
  using Call = FromDenseFwd;
  struct Plan {
    int64_t channel_block, stage, workers;
  };
  template <typename T>
  struct Worker {
    RunningTopK<T>* best;  // [channel of the block]
    uint64_t* stages;      // [channel][stage]
    int32_t* digits;       // [channel][kDigits]

    Worker(Carver& carver, const Plan& plan)
        : best(carver.Take<RunningTopK<T>>(plan.channel_block)),
          stages(carver.Take<uint64_t>(plan.channel_block, plan.stage)),
          digits(carver.Take<int32_t>(plan.channel_block, kDigits)) {}
  };
  template <typename T>
  struct Layout {
    LayoutOfEach<Worker<T>> workers;

    Layout(Carver& carver, const FromDenseShape&, const Plan& plan)
        : workers(carver, plan.workers, plan) {}
  };

  template <typename T>
  static Plan Make(const FromDenseShape& s, const Tuning& tuning) {
    Plan plan = {std::min<int64_t>(s.channels, 16), StageOfSegment(s.capacity), 1};
    const int64_t tasks = s.batch * CeilDiv(s.channels, plan.channel_block);
    plan.workers = tuning.Workers(tasks, SizeOf<Worker<T>>(plan), tuning.CpuWorkspace(0));
    return plan;
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, FromDenseFwd call, const FromDenseShape& s,
                        const Plan& plan, const Layout<T>& layout) {
    Select select;
    ILAJAX_RETURN_IF_ERROR(ReadSelect(call.select, select));
    const int64_t blocks = CeilDiv(s.channels, plan.channel_block);
    ParallelFor(pool, s.batch * blocks, plan.workers, [&](int64_t task, int64_t id) {
      const Worker<T> worker = layout.workers.At(id, plan);
      const int64_t item = task / blocks, first = task % blocks * plan.channel_block;
      const int64_t count = std::min(plan.channel_block, s.channels - first);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t segment = (item * s.channels + first + j) * s.capacity;
        worker.best[j] = RunningTopK<T>(
            select, s.capacity, call.keys->typed_data() + segment, Data<T>(*call.values) + segment,
            plan.stage, worker.stages + j * plan.stage, worker.digits + j * kDigits);
      }
      const T* row = Data<T>(call.x) + item * s.sites * s.channels + first;
      for (int64_t site = 0; site < s.sites; ++site, row += s.channels) {
        for (int64_t j = 0; j < count; ++j) {
          const float value = static_cast<float>(row[j]);
          if (value == 0.0f || !IsCandidate(value, select)) continue;
          worker.best[j].Push(site, row[j]);
        }
      }
      for (int64_t j = 0; j < count; ++j) worker.best[j].Finish(s.sites);
    });
    return ffi::Error::Success();
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(FromDenseFwd, FromDenseForward);
