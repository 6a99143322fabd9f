// Kernels with one bug each, and the same without it: shows that the harness sees what it is for.
//
//   planted_bugs NAME    prints what the harness reports, or "nothing wrong"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "grid.h"

namespace {

constexpr int kThreads = 64;

enum class Bug {
  kNone,
  kMissingSyncthreads,
  kMissingSyncwarp,
  kSharedIndex,
  kSharedPointer,
  kDynamicSharedIndex,
  kGlobalIndex,
  kDivergentBlock,
  kDivergentWarp,
  kMissingThread,
  kHelperInBothBranches,
  kUnwrittenShared,
  kEndlessWait,
  kOtherStream,
  // Of blocks that wait for each other, see AddUp().
  kNoneInChain,
  kSumWithoutAtomic,
  kNoFenceBeforeFlag,
  kNoFenceBehindFlag,
  kOldFlags,
  kNoTicket,
};

const struct {
  const char* name;
  Bug bug;
} kBugs[] = {
    {"none", Bug::kNone},
    {"missing_syncthreads", Bug::kMissingSyncthreads},
    {"missing_syncwarp", Bug::kMissingSyncwarp},
    {"shared_index", Bug::kSharedIndex},
    {"shared_pointer", Bug::kSharedPointer},
    {"dynamic_shared_index", Bug::kDynamicSharedIndex},
    {"global_index", Bug::kGlobalIndex},
    {"divergent_block", Bug::kDivergentBlock},
    {"divergent_warp", Bug::kDivergentWarp},
    {"missing_thread", Bug::kMissingThread},
    {"helper_in_both_branches", Bug::kHelperInBothBranches},
    {"unwritten_shared", Bug::kUnwrittenShared},
    {"endless_wait", Bug::kEndlessWait},
    {"other_stream", Bug::kOtherStream},
    {"none_in_chain", Bug::kNoneInChain},
    {"sum_without_atomic", Bug::kSumWithoutAtomic},
    {"no_fence_before_flag", Bug::kNoFenceBeforeFlag},
    {"no_fence_behind_flag", Bug::kNoFenceBehindFlag},
    {"old_flags", Bug::kOldFlags},
    {"no_ticket", Bug::kNoTicket},
};

__device__ int OfNeighbour(int value) { return __shfl_xor_sync(~0u, value, 1); }

// out[i] = in[kThreads - 1 - i], through shared memory, plus what a warp and a block agree on.
__global__ void __launch_bounds__(kThreads) Reverse(Bug bug, const int* in, int* out) {
  __shared__ int shared[kThreads], none;
  int* const dynamic = static_cast<int*>(cuda_on_host::DynamicShared());
  const int i = threadIdx.x, lane = i % 32;
  const int beyond = i == 5 ? kThreads : i;
  if (bug == Bug::kMissingThread && i == 7) return;
  if (bug != Bug::kUnwrittenShared && i == 0) none = 0;
  shared[bug == Bug::kSharedIndex ? beyond : i] = in[i];
  if (bug == Bug::kSharedPointer) *(&shared[0] + beyond) = in[i];
  if (bug != Bug::kMissingSyncthreads) __syncthreads();
  const int other = shared[kThreads - 1 - i];
  dynamic[bug == Bug::kDynamicSharedIndex ? beyond : i] = other;
  if (bug == Bug::kDivergentWarp && lane < 3) __syncwarp();
  if (bug != Bug::kMissingSyncwarp) __syncwarp();
  const int neighbour = dynamic[i ^ 1];
  if (bug == Bug::kDivergentBlock && i >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  int sum = other + neighbour;
  if (bug == Bug::kHelperInBothBranches && lane & 1) {
    sum += OfNeighbour(lane);
  } else {
    sum += OfNeighbour(lane);
  }
  const volatile int* never = &none;
  if (bug == Bug::kEndlessWait && i == 9) {
    while (*never == 0) {
    }
  }
  sum += *never;
  out[bug == Bug::kGlobalIndex ? beyond : i] = sum;
}

constexpr int kBlocks = 20;

// sums[i] = 0 + ... + i: each block waits for the one before it.
struct Chain {
  unsigned ticket, flags[kBlocks];
  int sums[kBlocks];
};

__global__ void __launch_bounds__(kThreads) AddUp(Bug bug, Chain* chain, int* out) {
  __shared__ unsigned place;
  __shared__ int threads;
  if (threadIdx.x == 0) {
    place = bug == Bug::kNoTicket ? blockIdx.x : atomicAdd(&chain->ticket, 1u);
    threads = 0;
  }
  __syncthreads();
  if (bug == Bug::kSumWithoutAtomic) {
    threads += 1;
  } else {
    atomicAdd(&threads, 1);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int sum = static_cast<int>(place);
  if (place > 0) {
    while (cuda_on_host::LoadFresh(&chain->flags[place - 1]) == 0) {
    }
    if (bug != Bug::kNoFenceBehindFlag) __threadfence();
    sum += chain->sums[place - 1];
  }
  chain->sums[place] = sum;
  if (bug != Bug::kNoFenceBeforeFlag) __threadfence();
  atomicExch(&chain->flags[place], 1u);
  out[place] = sum + threads;
}

bool LaunchAddUp(Bug bug, int* out) {
  Chain chain = {};
  if (bug == Bug::kOldFlags) std::fill_n(chain.flags, kBlocks, 7u);
  std::fill(out + kBlocks, out + kThreads, 0);
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(kBlocks);
  launch.blockDim = dim3(kThreads);
  launch.stream = cuda_on_host::kStream;
  return cuda_on_host::Run(
             launch, reinterpret_cast<const void*>(AddUp), [&] { AddUp(bug, &chain, out); },
             "AddUp") == cudaSuccess;
}

bool LaunchReverse(Bug bug, const int* in, int* out) {
  cudaLaunchConfig_t launch = {};
  launch.blockDim = dim3(kThreads);
  launch.dynamicSmemBytes = kThreads * sizeof(int);
  launch.stream = bug == Bug::kOtherStream ? nullptr : cuda_on_host::kStream;
  return cuda_on_host::Run(
             launch, reinterpret_cast<const void*>(Reverse), [&] { Reverse(bug, in, out); },
             "Reverse") == cudaSuccess;
}

}  // namespace

int main(int argc, char** argv) {
  for (const auto& planted : kBugs) {
    if (argc != 2 || std::strcmp(argv[1], planted.name) != 0) continue;
    std::vector<int> in(kThreads), out(kThreads);
    for (int i = 0; i < kThreads; ++i) in[i] = i * i;
    const std::string report = cuda_on_host::RunInAllOrders(
        [&] {
          return planted.bug < Bug::kNoneInChain ? LaunchReverse(planted.bug, in.data(), out.data())
                                                 : LaunchAddUp(planted.bug, out.data());
        },
        {{out.data(), out.size() * sizeof(int)}});
    std::puts(report.empty() ? "nothing wrong" : report.c_str());
    return 0;
  }
  return 2;
}
