// What the harness and its tests see of the runtime: launches in several orders.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_GRID_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_GRID_H_

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace cuda_on_host {

// In which order the threads of a block run between two barriers, and the blocks of a grid. In
// kRandom some blocks are under way at a time, and take turns.
enum class Order { kForward, kReverse, kRandom };

struct Bytes {
  void* data;
  size_t size;
  bool only_forward = false;  // what is written last counts
};

// What another host thread does between a kernel's opt-in to more shared memory and its launch:
// runs once, as the next opt-in ends.
extern std::function<void()> after_opt_in;

// Sets the order of the launches that follow, and the byte that blocks find in shared memory.
void SetOrder(Order order, int rubbish);

// Runs `launches` in every order, each time with other rubbish in `outputs`, and compares their
// bytes between the runs. Returns what is wrong, or "".
std::string RunInAllOrders(const std::function<bool()>& launches,
                           const std::vector<Bytes>& outputs);

}  // namespace cuda_on_host

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_GRID_H_
