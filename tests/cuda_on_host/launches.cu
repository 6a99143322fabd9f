// What xla_kernels/common/cuda.h promises of launches. Prints what went wrong, or "nothing wrong".

#include <cuda_runtime.h>

#include <cstdio>

#include "grid.h"
#include "xla_kernels/common/cuda.h"

namespace {

__global__ void Touch(int words, int* out) {
  int* const dynamic = static_cast<int*>(cuda_on_host::DynamicShared());
  dynamic[words - 1] = words;
  *out = dynamic[words - 1];
}

bool LaunchTouch(int words, int* out) {
  const auto error = ilajax::Launch<Touch>(dim3(1), dim3(1), words * sizeof(int),
                                           cuda_on_host::kStream, words, out);
  if (error.failure()) std::puts(error.message().c_str());
  return error.success();
}

}  // namespace

int main() {
  // Two host threads launch one kernel with different sizes of shared memory, the second between
  // the first one's opt-in and its launch.
  int small = 0, large = 0, again = 0;
  bool fine = true;
  cuda_on_host::after_opt_in = [&] { fine &= LaunchTouch(15 << 10, &small); };
  fine &= LaunchTouch(25 << 10, &large);
  fine &= !cuda_on_host::after_opt_in && LaunchTouch(25 << 10, &again);
  fine &= small == 15 << 10 && large == 25 << 10 && again == large;
  // More blocks than a launch has are refused, not left out.
  const int64_t blocks = ilajax::kMaxBlocks + 1;
  fine &= ilajax::LaunchEach<Touch>(blocks, dim3(1), 4, cuda_on_host::kStream, 1, &small).failure();
  // A launch that does not queue up behind XLA's own work.
  fine &= ilajax::Launch<Touch>(dim3(1), dim3(1), 4, nullptr, 1, &small).failure();
  std::puts(fine ? "nothing wrong" : "something is wrong");
}
