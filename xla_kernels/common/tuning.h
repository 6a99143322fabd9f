// The numbers that plans are made with, apart from a call's sizes. Tests and experiments change
// them by name; see ilajax/ffi/plans.py.

#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

namespace ilajax {

struct Tuning {
  // Bytes that a workspace may take; 0: max(8 * sites, 32 MiB) on the CPU, 256 MiB on a GPU.
  int64_t workspace = 0;

  int64_t open_batch = 0;  // 1: the plan has to suit a batch of any size

  // --- The CPU
  int64_t tasks = 8;     // to cut a call into where the batch is small
  int64_t workers = 16;  // threads that share a workspace; more take no part in a call
  // What should stay in a core's cache: the buffer of a slab in pooling; in convolution that of a
  // line, and the tables over the lines of a slab.
  int64_t slab_bytes = 512 << 10;
  int64_t line_bytes = 256 << 10;
  int64_t table_bytes = 1 << 20;
  int64_t entries = 0;  // that are sorted at once; 0: those of a few planes
  int64_t stage = 0;    // responses of a channel between two selections; 0: as the cache allows
  // The dense form of a line: bytes that are laid out at once; a channel has to store one in so
  // many sites; and percent of the other form's cost that it may take (benchmarks.dense_form).
  int64_t dense_bytes = 1 << 20;
  int64_t dense_share = 32;
  int64_t dense_percent = 65;
  // in_channels * out_channels from which shared supports take products; their gradient from half.
  int64_t products = 128;
  int64_t site_maps = 1;  // 0: every call finds its pairs itself

  // --- A GPU
  int64_t shared_memory = 99 << 10;  // bytes that a block may have there
  int64_t min_tile = 512;            // output sites of a block
  int64_t select_whole = 16384;      // entries from which one block selects faster than several
  int64_t select_chunk = 4096;       // entries of a block where there are more

  // What a workspace may take on the CPU and on a GPU, given the larger grid of a call.
  int64_t CpuWorkspace(int64_t sites) const { return Workspace(sites, int64_t{32} << 20); }
  int64_t CudaWorkspace(int64_t sites) const { return Workspace(sites, int64_t{256} << 20); }

  // As many workers as have tasks, and their part of the workspace.
  int64_t Workers(int64_t work, int64_t bytes_of_worker, int64_t bytes) const {
    const int64_t have_bytes = bytes / std::max<int64_t>(bytes_of_worker, 1);
    return std::max<int64_t>(1, std::min({work, workers, have_bytes}));
  }

 private:
  int64_t Workspace(int64_t sites, int64_t least) const {
    return workspace > 0 ? workspace : std::max(8 * sites, least);
  }
};

// A number by its name; nullptr if there is none.
inline int64_t* Find(Tuning& t, std::string_view name) {
  const struct {
    std::string_view name;
    int64_t* number;
  } all[] = {{"workspace", &t.workspace},
             {"open_batch", &t.open_batch},
             {"tasks", &t.tasks},
             {"workers", &t.workers},
             {"slab_bytes", &t.slab_bytes},
             {"line_bytes", &t.line_bytes},
             {"table_bytes", &t.table_bytes},
             {"entries", &t.entries},
             {"stage", &t.stage},
             {"dense_bytes", &t.dense_bytes},
             {"dense_share", &t.dense_share},
             {"dense_percent", &t.dense_percent},
             {"products", &t.products},
             {"site_maps", &t.site_maps},
             {"shared_memory", &t.shared_memory},
             {"min_tile", &t.min_tile},
             {"select_whole", &t.select_whole},
             {"select_chunk", &t.select_chunk}};
  for (const auto& each : all) {
    if (each.name == name) return each.number;
  }
  return nullptr;
}

}  // namespace ilajax
