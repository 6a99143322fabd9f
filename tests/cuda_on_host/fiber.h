// A function that runs on a stack of its own, turn by turn with the host thread that owns it.

#ifndef ILAJAX_TESTS_CUDA_ON_HOST_FIBER_H_
#define ILAJAX_TESTS_CUDA_ON_HOST_FIBER_H_

#include <cstddef>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_host {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();

  // Makes the next Resume() call `main`, wherever the last call stopped. It ends with Leave().
  void Begin(void (*main)());
  // By the host thread: goes on with the function, until it suspends itself or leaves.
  void Resume();
  // By the function: back to the host thread.
  void Suspend();
  [[noreturn]] void Leave();
  // By the function, first of all.
  void Arrive();

  // Whether an address lies in the stack.
  bool Holds(const void* address) const;

 private:
  // swapcontext() would make two system calls at every barrier, most of the time of a test, so the
  // processor of most machines has its own.
#ifdef __x86_64__
  using Context = void*;  // the stack, on it what a call has to preserve
#else
  using Context = ucontext_t;
#endif
  static void Switch(Context* from, Context* to);

  char* stack_ = nullptr;
  Context own_, host_;
  bool suspended_ = false;
  // Of AddressSanitizer and ThreadSanitizer.
  void* fake_stack_ = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_stack_size_ = 0;
  void *own_history_ = nullptr, *host_history_ = nullptr;
};

}  // namespace cuda_on_host

#endif  // ILAJAX_TESTS_CUDA_ON_HOST_FIBER_H_
