// How convolutions on the CPU cut their work, the part that all of them share.

#ifndef ILAJAX_XLA_KERNELS_LINES_PLAN_H_
#define ILAJAX_XLA_KERNELS_LINES_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "xla_kernels/common/tuning.h"
#include "xla_kernels/lines/line.h"

namespace ilajax {

// The width of a block of output channels: a multiple of 8, up to 32.
inline int64_t BlockOf(int64_t out_channels) {
  const int64_t blocks = CeilDiv(out_channels, 32);
  return CeilDiv(CeilDiv(out_channels, blocks), kLanes) * kLanes;
}
inline bool IsBlock(int64_t channels) {
  return channels % kLanes == 0 && channels >= 8 && channels <= 32;
}

// Sites of a line's buffer: a whole line, with what taps reach past its ends, if the cache holds it.
inline int64_t LineSites(const LineWindow& line, int64_t block, const Tuning& tuning) {
  const int64_t most = std::max<int64_t>(1, tuning.line_bytes / (block * sizeof(float)));
  const int64_t around = line.stride == 1 ? line.before() + line.after() : 0;
  const int64_t whole = line.output_length + around;
  return whole <= most ? whole : std::min(line.output_length, most);
}

// Entries that are sorted at once: those of a few planes if they are spread over the grid.
inline int64_t EntriesAtOnce(const Lines& lines, const ConvShape& s, int64_t budget,
                             const Tuning& tuning) {
  if (tuning.entries > 0) return tuning.entries;
  const int64_t few_planes =
      s.in_channels * CeilDiv(s.slots, lines.input_planes) * 4 * lines.extent;
  return std::min(s.in_channels * s.slots,
                  std::max<int64_t>(1 << 17, std::min(few_planes, budget / 64)));
}

// Of `planes` output planes of `lines`, how many read no more input lines than can be laid out
// densely at once; 0: the dense form is not to be used. Only plain lines have one, and where entries
// are rare it never is the cheaper.
inline int64_t DensePlanes(const ConvShape& s, const Lines& lines, const DenseLines& dense,
                           const LineBuffer& buffer, int64_t planes, int64_t live_tap_bytes,
                           int64_t budget, const Tuning& tuning) {
  if (!buffer.plain || s.slots * tuning.dense_share < s.w.input_sites) return 0;
  if (live_tap_bytes > budget / 16) return 0;
  const int64_t fit = tuning.dense_bytes / static_cast<int64_t>(sizeof(float)) / dense.size();
  if (lines.InputLines(planes) <= fit) return planes;
  const int64_t steps = fit / lines.input_plane_lines - lines.extent;
  return steps < 0 ? 0 : std::min(planes, steps / lines.plane_stride + 1);
}

// Into how many parts the output planes go, to make a few tasks for every thread.
inline int64_t PartsOf(int64_t planes, int64_t tasks, const Tuning& tuning) {
  if (tasks >= tuning.tasks / 2) return 1;
  return std::min(CeilDiv(tuning.tasks, std::max<int64_t>(tasks, 1)), planes);
}

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_LINES_PLAN_H_
