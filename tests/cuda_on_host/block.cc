// Runs the threads of a block as fibers on one host thread: each runs until it meets a barrier.

#include "block.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <sstream>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr unsigned kMaxThreads = 1024;
// Static shared memory that every kernel counts as having: the host does not know.
constexpr size_t kStaticShared = 2 << 10;

// A device's shared memory for a block that opts in: Hopper's, or what CUDA_ON_HOST_SHARED says.
size_t MaxShared() {
  const char* bytes = std::getenv("CUDA_ON_HOST_SHARED");
  return bytes == nullptr ? 227 << 10 : std::strtoul(bytes, nullptr, 10);
}

// Where a fiber goes on. swapcontext() would make two system calls at every barrier, most of the
// time of a test, so the processor of most machines has its own.
#ifdef __x86_64__
using Context = void*;  // the stack, on it what a call has to preserve

extern "C" void cuda_on_host_switch(Context* from, Context to);
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

void SwitchContext(Context* from, Context* to) { cuda_on_host_switch(from, *to); }

void MakeContext(Context* context, char* stack, size_t size, void (*main)()) {
  // Six registers, then where to return to; a called function finds its stack 8 bytes off a
  // multiple of 16.
  void** top = reinterpret_cast<void**>(stack + size) - 2;
  top[0] = reinterpret_cast<void*>(main);
  top[1] = nullptr;
  *context = top - 6;
}
#else
using Context = ucontext_t;

void SwitchContext(Context* from, Context* to) { swapcontext(from, to); }

void MakeContext(Context* context, char* stack, size_t size, void (*main)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = size;
  context->uc_link = nullptr;
  makecontext(context, main, 0);
}
#endif

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  uint3 index;
  State state = State::kDone;
  uint32_t mask = 0;      // lanes it waits for
  const char* file = "";  // the barrier it waits at
  int line = 0;
};

// A warp's exchange: what its lanes hand over, in turns, since nobody is more than one exchange
// ahead.
struct Warp {
  uint64_t values[2][32];
  int turn[32];
};

std::recursive_mutex mutex;  // one kernel at a time
std::vector<Fiber> fibers(kMaxThreads);
Warp warps[kMaxThreads / 32];
unsigned threads = 0, current = 0;
Context scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
const std::function<void()>* body = nullptr;
std::vector<char> shared;
std::string error;
Order order = Order::kForward;
std::mt19937 random_order;
std::map<const void*, size_t> opted_in;  // kernel -> dynamic shared memory

void Switch(Context* from, Context* to, [[maybe_unused]] void** fake_stack,
            [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, stack, size);
#endif
  SwitchContext(from, to);
}

// Back to the scheduler, until it turns to this fiber again.
void Yield() {
  Fiber& fiber = fibers[current];
  Switch(&fiber.context, &scheduler, &fiber.fake_stack, scheduler_stack, scheduler_stack_size);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void Main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  fibers[current].state = State::kDone;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);
#endif
  SwitchContext(&fibers[current].context, &scheduler);
}

void Start(Fiber& fiber, unsigned rank) {
  if (fiber.stack == nullptr) {
    fiber.stack = static_cast<char*>(
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (fiber.stack == MAP_FAILED) std::abort();
  }
#ifdef __SANITIZE_ADDRESS__
  // A block was given up in the midst of its functions.
  if (fiber.state != State::kDone) __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
  MakeContext(&fiber.context, fiber.stack, kStack, Main);
  fiber.index = {rank % blockDim.x, rank / blockDim.x % blockDim.y, rank / blockDim.x / blockDim.y};
  fiber.state = State::kReady;
  fiber.fake_stack = nullptr;
}

void Resume(unsigned rank) {
  current = rank;
  threadIdx = fibers[rank].index;
  [[maybe_unused]] void* fake_stack = nullptr;
  Switch(&scheduler, &fibers[rank].context, &fake_stack, fibers[rank].stack, kStack);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

std::string Where(unsigned rank) {
  const Fiber& fiber = fibers[rank];
  std::ostringstream text;
  text << "thread " << rank;
  if (fiber.state == State::kDone) {
    text << " has returned";
  } else {
    text << " waits for its " << (fiber.state == State::kAtBlock ? "block" : "warp") << " at "
         << fiber.file << ":" << fiber.line;
  }
  return text.str();
}

bool Differ(const Fiber& a, const Fiber& b) {
  return a.state != b.state || a.line != b.line ||
         (a.file != b.file && std::strcmp(a.file, b.file) != 0);
}

// All threads wait or are done: lets them through the block's barrier if they are at the same one.
void PassBlockBarrier() {
  for (unsigned rank = 1; rank < threads; ++rank) {
    if (!Differ(fibers[0], fibers[rank])) continue;
    error = "divergent barrier: " + Where(0) + ", " + Where(rank);
    return;
  }
  if (fibers[0].state != State::kAtBlock) {
    error = "divergent barrier: " + Where(0) + ", for lanes that never come";
    return;
  }
  for (unsigned rank = 0; rank < threads; ++rank) fibers[rank].state = State::kReady;
}

void RunBlock() {
  std::fill(shared.begin(), shared.end(), static_cast<char>(0xa5));
  for (unsigned rank = 0; rank < threads; ++rank) Start(fibers[rank], rank);
  for (Warp& warp : warps) std::fill_n(warp.turn, 32, 0);
  std::vector<unsigned> ranks(threads);
  for (unsigned rank = 0; rank < threads; ++rank) ranks[rank] = rank;
  if (order == Order::kReverse) std::reverse(ranks.begin(), ranks.end());
  while (error.empty()) {
    if (order == Order::kRandom) std::shuffle(ranks.begin(), ranks.end(), random_order);
    bool ran = false, done = true;
    for (unsigned rank : ranks) {
      if (fibers[rank].state == State::kReady) {
        Resume(rank);
        ran = true;
      }
      done &= fibers[rank].state == State::kDone;
    }
    if (done) return;
    if (!ran) PassBlockBarrier();
  }
}

// The kernels that ran, for the test that all did: written when the process ends, as offsets in
// this library.
struct Executed {
  std::set<const void*> kernels;
  ~Executed() {
    const char* path = std::getenv("CUDA_ON_HOST_EXECUTED");
    Dl_info info;
    if (path == nullptr || dladdr(reinterpret_cast<void*>(&RunInAllOrders), &info) == 0) return;
    FILE* file = std::fopen(path, "a");
    if (file == nullptr) return;
    for (const void* kernel : kernels) {
      std::fprintf(file, "%zx\n",
                   static_cast<size_t>(static_cast<const char*>(kernel) -
                                       static_cast<const char*>(info.dli_fbase)));
    }
    std::fclose(file);
  }
} executed;

}  // namespace

void Wait(Barrier barrier, uint32_t mask, const char* file, int line) {
  Fiber& fiber = fibers[current];
  fiber.file = file;
  fiber.line = line;
  if (barrier == Barrier::kBlock) {
    fiber.state = State::kAtBlock;
    Yield();
    return;
  }
  const unsigned first = current / 32 * 32;
  if (!(mask >> (current - first) & 1)) {
    error = "a lane waits for a mask without itself: " + Where(current);
    fiber.state = State::kAtWarp;
    Yield();
  }
  fiber.state = State::kAtWarp;
  fiber.mask = mask;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const unsigned other = first + lane;
    if (other >= threads || Differ(fiber, fibers[other]) || fibers[other].mask != mask) {
      Yield();  // until the last lane comes
      return;
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) fibers[first + lane].state = State::kReady;
  }
}

const uint64_t* Exchange(uint32_t mask, uint64_t value, const char* file, int line) {
  Warp& warp = warps[current / 32];
  const int lane = static_cast<int>(current % 32);
  uint64_t* values = warp.values[warp.turn[lane]];
  warp.turn[lane] ^= 1;
  values[lane] = value;
  Wait(Barrier::kWarp, mask, file, line);
  return values;
}

std::function<void()> after_opt_in;

void* DynamicShared() { return shared.data(); }

cudaError_t Run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& thread) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  if (count == 0 || count > kMaxThreads || block.z > 64 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535) {
    error = "a launch out of CUDA's limits";
    return cudaErrorInvalidConfiguration;
  }
  const auto opt_in = opted_in.find(kernel);
  const size_t most = opt_in == opted_in.end() ? (48 << 10) - kStaticShared : opt_in->second;
  if (config.dynamicSmemBytes > most) {
    error = "a launch with " + std::to_string(config.dynamicSmemBytes) +
            " bytes of shared memory, where the kernel may have " + std::to_string(most);
    return cudaErrorInvalidConfiguration;
  }
  executed.kernels.insert(kernel);
  error.clear();
  gridDim = grid;
  blockDim = block;
  threads = static_cast<unsigned>(count);
  body = &thread;
  shared =
      std::vector<char>(config.dynamicSmemBytes);  // of that size: AddressSanitizer watches its end
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && error.empty(); ++i) {
    const uint64_t rank = order == Order::kForward ? i : blocks - 1 - i;
    blockIdx = {static_cast<unsigned>(rank % grid.x), static_cast<unsigned>(rank / grid.x % grid.y),
                static_cast<unsigned>(rank / grid.x / grid.y)};
    RunBlock();
  }
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

std::string RunInAllOrders(const std::function<bool()>& launches,
                           const std::vector<Bytes>& outputs) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  std::vector<std::vector<char>> first;
  const struct {
    Order order;
    const char* name;
    int rubbish;
  } runs[] = {{Order::kForward, "forward", 0xa5},
              {Order::kReverse, "reverse", 0xff},
              {Order::kRandom, "random", 0x3c}};
  for (const auto& run : runs) {
    order = run.order;
    random_order.seed(1);
    for (const Bytes& output : outputs) std::memset(output.data, run.rubbish, output.size);
    if (!launches()) return error;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const char* data = static_cast<const char*>(outputs[i].data);
      if (first.size() < outputs.size()) {
        first.emplace_back(data, data + outputs[i].size);
      } else if (!std::equal(first[i].begin(), first[i].end(), data)) {
        std::ostringstream text;
        text << "result " << i << " depends on the order of threads (forward or " << run.name
             << "), or on what stood in it before";
        return text.str();
      }
    }
  }
  return "";
}

}  // namespace cuda_on_host

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(cuda_on_host::MaxShared());
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int bytes) {
  using namespace cuda_on_host;
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (bytes + kStaticShared > MaxShared()) {
    error = "an opt-in to more shared memory than there is";
    return cudaErrorInvalidConfiguration;
  }
  opted_in[function] = bytes;
  if (after_opt_in) std::exchange(after_opt_in, nullptr)();
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "CUDA on the host"; }
const char* cudaGetErrorString(cudaError_t) { return cuda_on_host::error.c_str(); }
