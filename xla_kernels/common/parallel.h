// A parallel loop on XLA's own CPU thread pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

#include "xla_kernels/common/ffi.h"

namespace ilajax {

// Calls body(task, worker) once for each task in [0, tasks), and returns when all calls have.
//
// Workers are numbered below `max_workers`, and one worker runs one task at a time, so each can own
// a slice of a workspace. Which worker gets which task depends on scheduling: a result must not.
//
// The caller is worker 0 and takes tasks off the same counter as its helpers. It waits only for
// tasks that a running thread has already taken, never for a helper to be scheduled, so the loop
// cannot deadlock on a pool that is full, has one thread, or is the one it is called from. A helper
// that starts late finds the counter spent and touches nothing but the shared state, which it
// co-owns.
//
// noexcept: a body that throws ends the process; there is nobody above an FFI handler to catch it.
template <class F>
void ParallelFor(ffi::ThreadPool& pool, int64_t tasks, int64_t max_workers, F&& body) noexcept {
  const int64_t workers = std::min({tasks, max_workers, std::max<int64_t>(pool.num_threads(), 1)});
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, int64_t{0});
    return;
  }

  struct State {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  auto state = std::make_shared<State>();

  // `body` lives on the caller's stack, which stays until the last task taken is done.
  auto work = [state, tasks, body = &body](int64_t worker) noexcept {
    int64_t mine = 0;
    for (int64_t task; (task = state->next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      (*body)(task, worker);
      ++mine;
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    state->done += mine;
    if (state->done == tasks) state->all_done.notify_one();
  };
  for (int64_t worker = 1; worker < workers; ++worker) {
    pool.Schedule([work, worker]() noexcept { work(worker); });
  }
  work(0);
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == tasks; });
}

}  // namespace ilajax
