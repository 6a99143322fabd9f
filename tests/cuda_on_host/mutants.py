"""Bugs to plant in the CUDA kernels, one at a time, to see which part of the checks sees each.

    PYTHONPATH=tests python -m cuda_on_host.mutants            # all of them: an hour or two
    PYTHONPATH=tests python -m cuda_on_host.mutants pool flag  # those with a word in their name

Each is planted in a copy of the tree, in build/mutants. Prints a table. `make test` plants none: it
asks whether the texts are still there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants" / "tree"
# What sees a mutant, the quickest first: pytest's arguments.
CHECKS = {
    "check_kernels": ["tests/cuda_on_host/check_harness.py", "-k", "every_kernel"],
    "check_sizes": ["-p", "cuda_on_host.plugin", "tests/cuda_on_host/check_sizes.py"],
    "check_races": ["tests/cuda_on_host/check_races.py"],
    "check_ops": ["tests/cuda_on_host/check_ops.py::test_the_ops"],
    "sanitizers": ["tests/cuda_on_host/check_harness.py", "-k", "every_kernel"],
}


class Mutant(NamedTuple):
    name: str
    file: str  # in xla_kernels
    old: str
    new: str


MUTANTS = (
    Mutant(
        "no barrier behind the marks",
        "conv/cuda_tile_mark.cuh",
        """\
    if (shift > 0 && bits >> (32 - shift)) atomicOr(&bitmap[(at >> 5) + 1], bits >> (32 - shift));
  }
  __syncthreads();
""",
        """\
    if (shift > 0 && bits >> (32 - shift)) atomicOr(&bitmap[(at >> 5) + 1], bits >> (32 - shift));
  }
""",
    ),
    Mutant(
        "no warp barrier around a warp's count",
        "conv/cuda_tile_select.cuh",
        """\
          __syncwarp();
          if (lane == 0) kept.warps[1][warp][j] = ties + __popc(all_ties);
          __syncwarp();
""",
        """\
          if (lane == 0) kept.warps[1][warp][j] = ties + __popc(all_ties);
""",
    ),
    Mutant(
        "a shuffle in both branches of a divergent if",
        "conv/cuda_gradient.cuh",
        """\
  const float sum = WarpSum8(w_bar);
  const int lane = threadIdx.x & 31;
""",
        """\
  const int lane = threadIdx.x & 31;
  float sum;
  if (lane & 1) {
    sum = WarpSum8(w_bar);
  } else {
    sum = WarpSum8(w_bar);
  }
""",
    ),
    Mutant(
        "a vote where some lanes do not come",
        "conv/cuda_gradient.cuh",
        """\
    if (!__any_sync(kWarp, reached != 0)) continue;
""",
        """\
    if (reached == 0) continue;
""",
    ),
    Mutant(
        "|= for atomicOr in shared memory",
        "conv/cuda_tile_mark.cuh",
        """\
    if (bits << shift) atomicOr(&bitmap[at >> 5], bits << shift);
    if (shift > 0 && bits >> (32 - shift)) atomicOr(&bitmap[(at >> 5) + 1], bits >> (32 - shift));
""",
        """\
    if (bits << shift) bitmap[at >> 5] |= bits << shift;
    if (shift > 0 && bits >> (32 - shift)) bitmap[(at >> 5) + 1] |= bits >> (32 - shift);
""",
    ),
    Mutant(
        "no ticket for blocks that wait",
        "conv/cuda_tile_select.cuh",
        """\
  if (threadIdx.x == 0) ticket = atomicAdd(f.tickets, 1u);
  __syncthreads();
  return ticket - f.ticket_base;
""",
        """\
  if (threadIdx.x == 0) ticket = blockIdx.x;
  __syncthreads();
  return ticket;
""",
    ),
    Mutant(
        "no fence before a flag",
        "conv/cuda_tile_select.cuh",
        """\
    __threadfence();  // behind the barrier: for what all threads have published
""",
        "",
    ),
    Mutant(
        "no opt-in above 48 KB",
        "common/cuda.h",
        """\
  if (shared_bytes > kSharedByDefault - kStaticShared) status""",
        """\
  if (false) status""",
    ),
    Mutant(
        "the legacy stream",
        "common/cuda.h",
        """\
    config.stream = stream;
""",
        """\
    config.stream = nullptr;
    (void)stream;
""",
    ),
    Mutant(
        "static shared memory not initialised",
        "common/site_map.cuh",
        """\
    if (threadIdx.x == 0) ranges.before = 0;
""",
        "",
    ),
    Mutant(
        "32 bits for an index of the output",
        "conv/cuda_tile_select.cuh",
        """\
    for (int j = 0; j < kBlock; ++j, first_slot += f.capacity) {
""",
        """\
    for (int j = 0; j < kBlock; ++j, first_slot = static_cast<int>(first_slot + f.capacity)) {
""",
    ),
    Mutant(
        "later chunks of a map begin at its first record",
        "common/site_map.cuh",
        """\
  const int base = ranges.before;
""",
        """\
  const int base = 0;
""",
    ),
    Mutant(
        "one buffer where two are needed",
        "common/cuda_select.cuh",
        """\
       first += int64_t{blockDim.x} * kSelectEntries, buffer ^= 1) {
""",
        """\
       first += int64_t{blockDim.x} * kSelectEntries) {
""",
    ),
    Mutant(
        "whole runs of tiles not added",
        "conv/cuda_tile_select.cuh",
        """\
    const bool whole = n < run;
""",
        """\
    const bool whole = n < run;
    if (whole) continue;
""",
    ),
    Mutant(
        "flags not zeroed",
        "conv/cuda_forward.cuh",
        """\
    f.tile_done = carver.Take<uint32_t>(items, blocks, f.tiles);
    zero_words = (carver.used() - zeros) / static_cast<int64_t>(sizeof(uint32_t));
""",
        """\
    zero_words = (carver.used() - zeros) / static_cast<int64_t>(sizeof(uint32_t));
    f.tile_done = carver.Take<uint32_t>(items, blocks, f.tiles);
""",
    ),
    Mutant(
        "+= for atomicAdd in a shared histogram",
        "conv/cuda_tile_select.cuh",
        """\
      atomicAdd(&histogram[j * kBinWords + (bin >> 1)], 1u << (16 * (bin & 1)));
""",
        """\
      histogram[j * kBinWords + (bin >> 1)] += 1u << (16 * (bin & 1));
""",
    ),
    Mutant(
        "a counter behind what is zeroed",
        "conv/cuda_forward.cuh",
        """\
    f.pool_used = carver.Take<uint32_t>(1);
    f.run_sums = carver.Take<uint32_t>(items, channels, f.runs(), kSums);
    f.run_done = carver.Take<uint32_t>(items, blocks, f.runs());
    f.tile_done = carver.Take<uint32_t>(items, blocks, f.tiles);
    zero_words = (carver.used() - zeros) / static_cast<int64_t>(sizeof(uint32_t));
""",
        """\
    f.run_sums = carver.Take<uint32_t>(items, channels, f.runs(), kSums);
    f.run_done = carver.Take<uint32_t>(items, blocks, f.runs());
    f.tile_done = carver.Take<uint32_t>(items, blocks, f.tiles);
    zero_words = (carver.used() - zeros) / static_cast<int64_t>(sizeof(uint32_t));
    f.pool_used = carver.Take<uint32_t>(1);
""",
    ),
    Mutant(
        "a result of padding not written",
        "conv/cuda_gradient.cuh",
        """\
      b.weights_bar[task] = sum;
""",
        """\
      if (b.kernel_keys[task % b.weights] < channels * inputs * taps) b.weights_bar[task] = sum;
""",
    ),
    Mutant(
        "no barrier at a loop's end",
        "conv_by_site/cuda.cu",
        """\
      if (last && sum != 0.0f) atomicAdd(&a.responses[item], 1);
    }
    __syncthreads();
""",
        """\
      if (last && sum != 0.0f) atomicAdd(&a.responses[item], 1);
    }
""",
    ),
    Mutant(
        "a loop over tasks that takes the first one only",
        "products/cuda_weights.cuh",
        """\
    if (threadIdx.x == 0) bias_bar[task] = sums[0];
    __syncthreads();
""",
        """\
    if (threadIdx.x == 0) bias_bar[task] = sums[0];
    __syncthreads();
    break;
""",
    ),
    Mutant(
        "a slot behind the last one written",
        "common/cuda_select.cuh",
        """\
    if (position >= out.capacity) return;
""",
        """\
    if (position > out.capacity) return;
""",
    ),
    Mutant(
        "an operand written",
        "conv/cuda_gradient.cuh",
        """\
      if (i < b.slots && b.slab == 0 && (key < 0 || key >= b.input_sites)) values_bar[i] = T(0.0f);
""",
        """\
      if (i < b.slots && b.slab == 0 && (key < 0 || key >= b.input_sites)) {
        values_bar[i] = const_cast<T*>(values)[i] = T(0.0f);
      }
""",
    ),
    Mutant(
        "a misaligned vector",
        "conv/cuda_tile_respond.cuh",
        """\
        tables + TapList<R>::SharedBytes(filters.taps, f.map.groups()) / sizeof(uint4));
""",
        """\
        reinterpret_cast<char*>(tables) +
        TapList<R>::SharedBytes(filters.taps, f.map.groups()) + 4);
""",
    ),
    Mutant(
        "keys that break their contract trusted",
        "to_dense/cuda.cu",
        """\
      if (key[i] >= begin && key[i] < end) chunk[key[i] - begin] = value[i];
""",
        """\
      chunk[key[i] - begin] = value[i];
""",
    ),
    Mutant(
        "no fence behind a flag",
        "conv/cuda_tile_select.cuh",
        """\
      __threadfence();  // this thread's own: it reads what the flag stands for itself
""",
        "",
    ),
    Mutant(
        "a flag raised before the fence",
        "conv/cuda_tile_select.cuh",
        """\
    __threadfence();  // behind the barrier: for what all threads have published
    atomicExch(&f.tile_done[int64_t{tile.segment} * f.tiles + tile.index], 1u);
""",
        """\
    atomicExch(&f.tile_done[int64_t{tile.segment} * f.tiles + tile.index], 1u);
    __threadfence();  // behind the barrier: for what all threads have published
""",
    ),
    Mutant(
        "padding that nobody writes",
        "conv/cuda_tile_select.cuh",
        """\
    for (int i = from + threadIdx.x; i < share_end; i += kTileThreads) {
""",
        """\
    for (int i = from + threadIdx.x; i < share_end - 1; i += kTileThreads) {
""",
    ),
    Mutant(
        "blocks beyond the limit left out",
        "common/cuda.h",
        """\
  if (blocks > kMaxBlocks) return InvalidArgument("a launch of ", blocks, " blocks, over 2^31 - 1");
""",
        """\
  blocks = std::min(blocks, kMaxBlocks);
""",
    ),
    Mutant(
        "an opt-in to the bytes of one launch",
        "common/cuda.h",
        """\
                                                  static_cast<int>(MaxDynamicShared()));
""",
        """\
                                                  60 << 10);
""",
    ),
    Mutant(
        "an array of the workspace too short",
        "conv/cuda_forward.cuh",
        """\
    f.run_done = carver.Take<uint32_t>(items, blocks, f.runs());
""",
        """\
    f.run_done = carver.Take<uint32_t>(items, blocks);
""",
    ),
    Mutant(
        "half of the lanes in a mask",
        "common/block.cuh",
        """\
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kWarp, value, step);
""",
        """\
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffu, value, step);
""",
    ),
    Mutant(
        "rows of taps by their flat offset only",
        "common/axes.cuh",
        """\
        return row.Quotient(entries[other].tap) == row.Quotient(entries[k].tap) &&
""",
        """\
        (void)row;
        return entries[other].flat - entries[other].offset[R - 1] ==
                   entries[k].flat - entries[k].offset[R - 1] &&
""",
    ),
    Mutant(
        "inf against an absent weight",
        "products/cuda_weights.cuh",
        """\
      again = __syncthreads_or(!finite) && !careful;
""",
        """\
      again = __syncthreads_or(!finite) && careful;
""",
    ),
    Mutant(
        "the next tap of a row a slot too far",
        "products/cuda_sites.cuh",
        """\
      slot += found ? 1 : 0;
""",
        """\
      slot += 1;
""",
    ),
)


def prepared() -> None:
    """Brings the copy up to date. What is the same keeps its time, so that little is compiled again."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        source, copy = ROOT / name, COPY / name
        if source.is_file() and not (copy.exists() and copy.read_bytes() == source.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)


def seen_by(check: str) -> bool:
    """Whether a check of the copy fails."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(COPY), str(COPY / "tests")]),
        "JAX_PLATFORMS": "cpu",
        "CUDA_ON_HOST_BUILD": "sanitized" if check == "sanitizers" else "plain",
        "CUDA_ON_HOST_SECONDS": "20",
    }
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *CHECKS[check]]
    done = subprocess.run(
        command, cwd=COPY, env=environment, capture_output=True, text=True, check=False
    )
    (COPY.parent / f"{check}.log").write_text(done.stdout + done.stderr)
    return done.returncode != 0


def who_sees(mutant: Mutant) -> str:
    """The first check that sees it; "nothing" if none does."""
    path = COPY / "xla_kernels" / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return next((check for check in CHECKS if seen_by(check)), "nothing")
    finally:
        path.write_text(text)


def main(words: list[str]) -> Iterator[str]:
    prepared()
    yield "| bug | seen by |"
    yield "|---|---|"
    for mutant in MUTANTS:
        if not words or any(word in mutant.name for word in words):
            yield f"| {mutant.name} | {who_sees(mutant)} |"


if __name__ == "__main__":
    for line in main(sys.argv[1:]):
        print(line, flush=True)
