// Spreads even a small call over threads, each time otherwise: a thread sometimes sleeps before an
// atomic addition, by which a parallel loop takes its tasks. Else the first thread would do all.
//
// The linker puts these functions in the place of TSan's (--wrap).

#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>

namespace {

void SleepSometimes() {
  thread_local uint32_t random = std::hash<std::thread::id>()(std::this_thread::get_id());
  random = random * 1664525 + 1013904223;
  if (random >> 30 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random >> 23));
}

}  // namespace

extern "C" {

int32_t __real___tsan_atomic32_fetch_add(volatile int32_t* to, int32_t value, int order);
int64_t __real___tsan_atomic64_fetch_add(volatile int64_t* to, int64_t value, int order);

int32_t __wrap___tsan_atomic32_fetch_add(volatile int32_t* to, int32_t value, int order) {
  SleepSometimes();
  return __real___tsan_atomic32_fetch_add(to, value, order);
}

int64_t __wrap___tsan_atomic64_fetch_add(volatile int64_t* to, int64_t value, int order) {
  SleepSometimes();
  return __real___tsan_atomic64_fetch_add(to, value, order);
}
}
