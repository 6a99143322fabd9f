// Site maps on the CPU: the sites in reach of each chunk of output sites, looked up in the sample's index.

#include "xla_kernels/products/chunks.h"
#include "xla_kernels/site_map/spec.h"

namespace ilajax {
namespace {

constexpr int64_t kChunk = 512;  // output sites of a task

struct Bases {
  int64_t* bases;  // of a worker; see products::TapReach

  Bases(Carver& carver, const Lines& lines) : bases(carver.Take<int64_t>(lines.tap_lines)) {}
};

struct SiteMapForward {
  using Call = SiteMapFwd;
  struct Plan {
    int64_t samples;  // that are laid out at once
    int64_t workers;
  };
  template <typename T>
  struct Layout {
    Window w;
    products::TapReach reach;
    LayoutOfEach<products::SiteIndex> samples;
    LayoutOfEach<Bases> workers;

    Layout(Carver& carver, const SiteMapShape& s, const Plan& plan)
        : w(products::Direction(s, false).w),
          reach(carver, w),
          samples(carver, plan.samples, w),
          workers(carver, plan.workers, reach.lines) {}
  };

  template <typename T>
  static Plan Make(const SiteMapShape& s, const Tuning& tuning) {
    Plan plan = {0, std::clamp<int64_t>(s.batch * CeilDiv(s.capacity, kChunk), 1, tuning.workers)};
    const int64_t tables = SizeOf<Layout<T>>(s, plan);
    const int64_t sample = SizeOf<products::SiteIndex>(products::Direction(s, false).w);
    const int64_t left = tuning.CpuWorkspace(s.w.sites()) - tables;
    plan.samples = std::clamp<int64_t>(left / sample, 1, std::max<int64_t>(s.batch, 1));
    return plan;
  }
  static bool Fits(const SiteMapShape& s, const Plan& plan) {
    const Lines lines(products::Direction(s, false).w);
    return plan.samples >= 1 && plan.workers >= 1 && s.map_words == products::MapWords(lines);
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, SiteMapFwd call, const SiteMapShape& s,
                        const Plan& plan, const Layout<T>& layout) {
    layout.reach.Fill(layout.w);
    const int32_t *keys = call.keys.typed_data(), *out_keys = call.out_keys.typed_data();
    int32_t* const map = call.map->typed_data();
    const int64_t chunks = CeilDiv(s.capacity, kChunk);
    products::DispatchLoops([&]<typename Loops>() {
      for (int64_t item = 0; item < s.batch; item += plan.samples) {
        const int64_t count = std::min(plan.samples, s.batch - item);
        products::FillIndex<Loops>(pool, layout.samples, layout.w, plan.workers,
                                   keys + item * s.slots, s.slots, count);
        ParallelFor(pool, count * chunks, plan.workers, [&](int64_t task, int64_t id) {
          const int64_t i = task / chunks, begin = task % chunks * kChunk;
          Loops::kMapSites(layout.reach, layout.samples.At(i, layout.w),
                           out_keys + (item + i) * s.capacity, begin,
                           std::min(begin + kChunk, s.capacity),
                           layout.workers.At(id, layout.reach.lines).bases,
                           map + (item + i) * s.map_words * s.capacity + begin, s.capacity);
        });
      }
    });
    return ffi::Error::Success();
  }
};

}  // namespace
}  // namespace ilajax

ILAJAX_CPU_TARGET(SiteMapFwd, SiteMapForward);
