#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef WATCH_RACES
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_on_host {
namespace {

constexpr size_t kStack = 256 << 10;

}  // namespace

#ifdef __x86_64__
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
  .text
  .type cuda_on_host_switch, @function
cuda_on_host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size cuda_on_host_switch, .-cuda_on_host_switch
)");

void Fiber::Switch(Context* from, Context* to) { cuda_on_host_switch(from, *to); }
#else
void Fiber::Switch(Context* from, Context* to) { swapcontext(from, to); }
#endif

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStack);
#ifdef WATCH_RACES
  if (own_history_ != nullptr) __tsan_destroy_fiber(own_history_);
#endif
}

void Fiber::Begin(void (*main)()) {
  if (stack_ == nullptr) {
    void* pages = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    stack_ = static_cast<char*>(pages);
#ifdef WATCH_RACES
    own_history_ = __tsan_create_fiber(0);
#endif
  }
#ifdef __SANITIZE_ADDRESS__
  // It was given up in the midst of its functions.
  if (suspended_) __asan_unpoison_memory_region(stack_, kStack);
#endif
  suspended_ = false;
  fake_stack_ = nullptr;
#ifdef __x86_64__
  // Six registers, then where to return to; a called function finds its stack 8 bytes off a
  // multiple of 16. There is no frame before its own.
  void** top = reinterpret_cast<void**>(stack_ + kStack) - 2;
  top[0] = reinterpret_cast<void*>(main);
  top[1] = top[-1] = nullptr;
  own_ = top - 6;
#else
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = kStack;
  own_.uc_link = nullptr;
  makecontext(&own_, main, 0);
#endif
}

void Fiber::Resume() {
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kStack);
#endif
#ifdef WATCH_RACES
  host_history_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(own_history_, __tsan_switch_to_fiber_no_sync);
#endif
  Switch(&host_, &own_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::Arrive() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(suspended_ ? fake_stack_ : nullptr, &host_stack_,
                                  &host_stack_size_);
#endif
  suspended_ = false;
}

void Fiber::Suspend() {
  suspended_ = true;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, host_stack_, host_stack_size_);
#endif
#ifdef WATCH_RACES
  __tsan_switch_to_fiber(host_history_, __tsan_switch_to_fiber_no_sync);
#endif
  Switch(&own_, &host_);
  Arrive();
}

void Fiber::Leave() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, host_stack_, host_stack_size_);
#endif
#ifdef WATCH_RACES
  __tsan_switch_to_fiber(host_history_, __tsan_switch_to_fiber_no_sync);
#endif
  Switch(&own_, &host_);
  std::abort();
}

bool Fiber::Holds(const void* address) const {
  return address >= stack_ && address < stack_ + kStack - 2 * sizeof(void*);
}

}  // namespace cuda_on_host
