// Submanifold convolution line by line (lines/sums.h), as conv: of each line the sites that the input
// stores are put out, nothing is selected.

#pragma once

#include <algorithm>
#include <cstring>

#include "xla_kernels/common/parallel.h"
#include "xla_kernels/lines/sums.h"
#include "xla_kernels/submanifold/spec.h"

namespace ilajax {

template <typename T>
struct AtSites {
  const LineSums<T>& sums;
  const float* bias;
  T* features;

  // The sites of output planes [plane, last), for a block of output channels. Counts responses that
  // are not zero, [B, Cout].
  template <typename Loops, int kOctets>
  void Run(int64_t item, int64_t block, int64_t plane, int64_t last, int32_t* counts,
           SumsWorker& worker) const {
    const ConvShape& s = sums.s;
    const int64_t width = sums.plan.block, first = block * width;
    const int64_t channels = std::min(width, s.out_channels - first);
    const int32_t* key = sums.input.Keys(item, 0);
    T* feature = features + (item * s.out_channels + first) * s.slots;
    int32_t* count = counts + item * s.out_channels + first;
    int64_t slot = -1;
    sums.template Run<Loops, kOctets>(
        item, block, plane, last, worker, [&](int64_t first_key, int64_t sites) {
          // Lines come in ascending order, so that the first one alone needs a search.
          if (slot < 0) slot = std::lower_bound(key, key + s.slots, first_key) - key;
          float* buffer = worker.line.first(sums.lines.line);
          for (; slot < s.slots && key[slot] < first_key + sites; ++slot) {
            const int64_t site = key[slot] - first_key;
            if (site < 0) continue;
            for (int64_t j = 0; j < channels; ++j) {
              const float response = buffer[site * width + j];
              count[j] += response != 0.0f;
              feature[j * s.slots + slot] = T(response != 0.0f ? response + bias[first + j] : 0.0f);
            }
          }
          for (int64_t word = 0; word < CeilDiv(sites, 64); ++word) {
            for (uint64_t& rest = worker.line.bits[word]; rest != 0; rest &= rest - 1) {
              std::memset(buffer + (word * 64 + __builtin_ctzll(rest)) * width, 0,
                          width * sizeof(float));
            }
          }
        });
  }
};

struct LinesForward {
  struct Plan {
    SumsPlan sums;
    int64_t parts;  // of the output planes
    int64_t workers;
  };
  template <typename T>
  struct Layout {
    Window w;
    Lines lines;
    SumsTables tables;
    int32_t* counts;  // [part][sample][output channel]
    LayoutOfEach<SumsWorker> workers;

    Layout(Carver& carver, const ConvShape& s, const Plan& plan)
        : w(Squeeze(s.w)),
          lines(w),
          tables(carver, s, lines, plan.sums),
          counts(carver.Take<int32_t>(plan.parts, s.batch, s.out_channels)),
          workers(carver, plan.workers, lines, plan.sums) {}
  };

  // Tasks are (sample, block of output channels, part of the planes), as in conv.
  template <typename T>
  static Plan Make(const ConvShape& s, const Tuning& tuning) {
    const Lines lines(Squeeze(s.w));
    Plan plan = {MakeSumsPlan(s, lines, tuning), 1, 0};
    const int64_t tasks = s.batch * CeilDiv(s.out_channels, plan.sums.block);
    plan.parts = PartsOf(lines.planes, tasks, tuning);
    plan.workers = tuning.Workers(tasks * plan.parts, SizeOf<SumsWorker>(lines, plan.sums),
                                  tuning.CpuWorkspace(s.w.sites()) - SizeOf<Layout<T>>(s, plan));
    return plan;
  }
  static bool Fits(const ConvShape& s, const Plan& plan) {
    const Lines lines(Squeeze(s.w));
    return ilajax::Fits(plan.sums, lines, s.in_channels) && plan.parts >= 1 &&
           plan.parts <= lines.planes && plan.workers >= 1;
  }

  template <typename T>
  static ffi::Error Run(ffi::ThreadPool pool, SubmanifoldFwd call, const ConvShape& s,
                        const Plan& plan, Layout<T>& layout) {
    const Lines& lines = layout.lines;
    const SumsTables& tables = layout.tables;
    const int64_t segments = s.batch * s.out_channels;
    layout.tables.Fill(s, layout.w, lines, call.kernel_keys.typed_data(),
                       call.weights.typed_data());
    std::memset(call.features->untyped_data(), 0, call.features->size_bytes());
    std::fill_n(layout.counts, plan.parts * segments, 0);
    for (int64_t i = 0; i < plan.workers; ++i) {
      layout.workers.At(i, lines, plan.sums).Clear(lines);
    }
    const StoredInput<T> input = {s, call.keys.typed_data(), Data<T>(call.values)};
    const LineSums<T> sums = {input, lines, tables, plan.sums};
    const AtSites<T> at_sites = {sums, call.bias.typed_data(), Data<T>(*call.features)};
    const int64_t blocks = tables.filters.blocks;
    ParallelFor(pool, s.batch * blocks * plan.parts, plan.workers, [&](int64_t task, int64_t id) {
      SumsWorker worker = layout.workers.At(id, lines, plan.sums);
      const int64_t rest = task / plan.parts, part = task % plan.parts;
      DispatchLoops(plan.sums.block, [&]<typename Loops, int kOctets>() {
        at_sites.template Run<Loops, kOctets>(
            rest / blocks, rest % blocks, part * lines.planes / plan.parts,
            (part + 1) * lines.planes / plan.parts, layout.counts + part * segments, worker);
      });
    });
    for (int64_t segment = 0; segment < segments; ++segment) {
      int32_t count = 0;
      for (int64_t part = 0; part < plan.parts; ++part) {
        count += layout.counts[part * segments + segment];
      }
      call.responses->typed_data()[segment] = count;
    }
    return ffi::Error::Success();
  }
};

}  // namespace ilajax
