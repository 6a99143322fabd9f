// A block of a kernel: its threads are fibers of one host thread, and run from barrier to barrier.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_BLOCK_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_BLOCK_H_

#include <cuda_runtime.h>

#include <csignal>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "fiber.h"
#include "grid.h"

namespace cuda_on_host {

constexpr unsigned kMaxThreads = 1024;

// The calls that led to a place, the last one first, each as where it returns to.
struct Calls {
  uintptr_t returns[16];
  int count = 0;

  void Add(uintptr_t address) {
    if (count < 16) returns[count++] = address;
  }
  // Not by memcmp(), which ThreadSanitizer would see.
  bool operator==(const Calls& other) const {
    bool same = count == other.count;
    for (int i = 0; same && i < count; ++i) same = returns[i] == other.returns[i];
    return same;
  }
};

struct Thread {
  enum class State { kReady, kAtBlock, kAtWarp, kDone };

  Fiber fiber;
  uint3 index = {};
  State state = State::kDone;
  uint32_t mask = 0;      // lanes it waits for
  const char* file = "";  // the barrier it waits at
  int line = 0;
  Calls calls;  // that led there
  // What ThreadSanitizer is told: barriers passed, and whether a fence stands before what follows.
  unsigned block_barriers = 0, warp_barriers = 0;
  bool fenced = false;
  std::deque<const void*> loaded;  // by atomics since the last fence
};

// A warp's exchange: what its lanes hand over, in turns, since nobody is more than one ahead.
struct Warp {
  uint64_t values[2][32];
  int turn[32];
};

// A place where one block after the other runs; all of it by one host thread at a time.
class Block {
 public:
  // Begins the block `rank` of the grid.
  void Begin(uint64_t rank, size_t dynamic_shared, std::span<char> static_shared);
  // Goes on until it is done, true, or another block may run: at a barrier, or while a thread waits
  // for what another block does.
  bool GoOn();
  // Orders what follows behind all blocks that were here.
  void End();

  // By the thread that runs.
  void Wait(Barrier barrier, uint32_t mask, const char* file, int line);
  void SyncWarp(uint32_t mask, const char* file, int line);
  const uint64_t* Exchange(uint32_t mask, uint64_t value, const char* file, int line);
  void LetOthersRun();

  Thread& running() { return *threads_[current_]; }
  void* dynamic_shared() { return shared_.get(); }
  // Gives the launch up, with an error that tells where the threads stand; a signal's handler.
  void GiveUp(const void* signal_context);

 private:
  static void Main();
  void Start(unsigned rank);
  void Yield();
  void PassBarrier();
  std::string Divergent(unsigned a, unsigned b) const;
  std::string Where(unsigned rank) const;
  Calls CallsTo(const void* frame) const;

  std::vector<std::unique_ptr<Thread>> threads_;
  Warp warps_[kMaxThreads / 32];
  unsigned count_ = 0, current_ = 0;
  std::vector<unsigned> ranks_;  // in the order in which they run
  bool runs_ = false;            // a thread does, and not what is around it
  bool waits_ = false;           // for another block
  uint3 index_ = {};
  std::unique_ptr<char[]> shared_;  // of just the size asked for: AddressSanitizer watches its end
  // What ThreadSanitizer takes an order from, in turns.
  char of_block_[2] = {}, of_warps_[kMaxThreads / 32][2] = {}, ends_[2] = {};
  unsigned blocks_ = 0;  // that were here
};

// What the launch in progress is.
struct Launch {
  std::string kernel, error;
  const std::function<void()>* body = nullptr;
  Order order = Order::kForward;
  int rubbish = 0xa5;  // what a block finds in its shared memory
  std::mt19937 random;
};
extern Launch launch;
extern Block* block;  // that runs
extern unsigned resident_blocks;

}  // namespace cuda_on_host

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_BLOCK_H_
