#include "grid.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <link.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <numeric>
#include <set>
#include <span>
#include <sstream>
#include <thread>
#include <utility>

#include "block.h"
#ifdef HAS_MACHINE
#include "machine/machine.h"
#endif

namespace cuda_on_host {
namespace {

// Static shared memory that every kernel counts as having: the host does not know.
constexpr size_t kStaticShared = 2 << 10;

// A device's shared memory for a block that opts in: Hopper's, or what CUDA_ON_HOST_SHARED says.
size_t MaxShared() {
  const char* bytes = std::getenv("CUDA_ON_HOST_SHARED");
  return bytes == nullptr ? 227 << 10 : std::strtoul(bytes, nullptr, 10);
}

// How long a host thread may be busy with a launch, in seconds of its own.
int MaxSeconds() {
  const char* seconds = std::getenv("CUDA_ON_HOST_SECONDS");
  return seconds == nullptr ? 60 : std::atoi(seconds);
}

// Blocks that are under way at a time.
unsigned ResidentBlocks() {
#ifdef __SANITIZE_ADDRESS__
  return 1;  // their static shared memory is one
#elif defined(WATCH_RACES)
  return 3;
#else
  return launch.order == Order::kRandom ? 3 : 1;
#endif
}

std::recursive_mutex mutex;              // one kernel at a time
std::map<const void*, size_t> opted_in;  // kernel -> dynamic shared memory

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

// A kernel's name, in that of a function template which has it for its first argument.
std::string KernelOf(const std::string& function) {
  const std::string mark = "Launch<";
  const size_t begin = function.find(mark);
  if (begin == std::string::npos) return function;
  size_t end = begin + mark.size();
  for (int depth = 0;
       end < function.size() && (depth > 0 || (function[end] != ',' && function[end] != '>'));
       ++end) {
    depth += (function[end] == '<') - (function[end] == '>');
  }
  return function.substr(begin + mark.size(), end - begin - mark.size());
}

// --- Static shared memory ------------------------------------------------------------------------

// What this library has thread_local, on this thread: the static shared memory of all kernels, but
// not where AddressSanitizer watches their ends.
std::span<char> StaticShared() {
  static thread_local volatile char some;
  some = 1;  // so that there is some
  std::span<char> found;
  const auto visit = [](dl_phdr_info* info, size_t, void* found) {
    const uintptr_t here = reinterpret_cast<uintptr_t>(&StaticShared) - info->dlpi_addr;
    bool own = false;
    size_t size = 0;
    for (const ElfW(Phdr) & part : std::span(info->dlpi_phdr, info->dlpi_phnum)) {
      own |= part.p_type == PT_LOAD && here - part.p_vaddr < part.p_memsz;
      if (part.p_type == PT_TLS) size = part.p_memsz;
    }
    if (own) {
      *static_cast<std::span<char>*>(found) = {static_cast<char*>(info->dlpi_tls_data), size};
    }
    return own ? 1 : 0;
  };
  dl_iterate_phdr(visit, &found);
  return found;
}

// --- The host threads of the resident blocks: one of them runs at a time ----------------------------

// Whose turn it is. Not a mutex: ThreadSanitizer would take it for an order between the blocks.
int turns[8];

void Wake(unsigned worker) {
  __atomic_store_n(&turns[worker], 1, __ATOMIC_RELEASE);
  syscall(SYS_futex, &turns[worker], FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

void AwaitTurn(unsigned worker) {
  while (__atomic_exchange_n(&turns[worker], 0, __ATOMIC_ACQUIRE) == 0) {
    syscall(SYS_futex, &turns[worker], FUTEX_WAIT_PRIVATE, 0, nullptr, nullptr, 0);
  }
}

void TimeIsUp(int, siginfo_t*, void* context) { block->GiveUp(context); }

// Limits the processor time of this thread while the object lives.
class TimeLimit {
 public:
  TimeLimit() {
    struct sigaction action = {};
    action.sa_sigaction = TimeIsUp;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGUSR2, &action, nullptr);
    sigevent event = {};
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = SIGUSR2;
    event._sigev_un._tid = gettid();
    timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_);
    const itimerspec once = {{}, {MaxSeconds(), 0}};
    timer_settime(timer_, 0, &once, nullptr);
  }
  TimeLimit(const TimeLimit&) = delete;
  ~TimeLimit() { timer_delete(timer_); }

 private:
  timer_t timer_;
};

struct Grid {
  std::vector<uint64_t> ranks;  // of its blocks, in the order in which they begin
  size_t next = 0;
  size_t dynamic_shared;
  std::vector<unsigned> workers;  // that have a block

  // Takes turns with the other workers until there is no block left.
  void Work(unsigned worker) {
    static Block* places[std::size(turns)];
    if (places[worker] == nullptr) places[worker] = new Block;
    AwaitTurn(worker);
    const TimeLimit limit;
    const std::span<char> static_shared = StaticShared();
    while (next < ranks.size() && launch.error.empty()) {
      places[worker]->Begin(ranks[next++], dynamic_shared, static_shared);
      while (!places[worker]->GoOn()) {
        const unsigned other = workers[launch.random() % workers.size()];
        if (other == worker) continue;
        Wake(other);
        AwaitTurn(worker);
      }
    }
    places[worker]->End();
    std::erase(workers, worker);
    if (!workers.empty()) Wake(workers[launch.random() % workers.size()]);
  }

  void Run() {
    const uint64_t most = std::min<uint64_t>(resident_blocks, ranks.size());
    for (unsigned worker = 0; worker < most; ++worker) workers.push_back(worker);
    std::vector<std::thread> threads;
    for (const unsigned worker : workers) threads.emplace_back([=, this] { Work(worker); });
    Wake(0);
    for (std::thread& thread : threads) thread.join();
  }
};

#ifdef HAS_MACHINE
bool RunsMachineCode() { return !machine::codes.empty(); }

std::string RunMachineCode(const cudaLaunchConfig_t& config, const void* kernel,
                           const std::vector<machine::Parameter>& parameters) {
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const auto code = machine::codes.find(kernel);
  if (code == machine::codes.end()) return "no machine code";
  if (grid.y * grid.z * threads.y * threads.z != 1) return "a launch of more than one dimension";
  return machine::Run(code->second, grid.x, threads.x, config.dynamicSmemBytes, launch.rubbish,
                      parameters);
}
#else
bool RunsMachineCode() { return false; }

std::string RunMachineCode(const cudaLaunchConfig_t&, const void*,
                           const std::vector<machine::Parameter>&) {
  return "no machine";
}
#endif

}  // namespace

cudaError_t Run(const cudaLaunchConfig_t& config, const void* kernel,
                const std::function<void()>& body, const char* function,
                const std::vector<machine::Parameter>& parameters) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  launch.kernel = KernelOf(function);
  launch.error.clear();
  launch.body = &body;
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z;
  const auto opt_in = opted_in.find(kernel);
  const size_t most = opt_in == opted_in.end() ? (48 << 10) - kStaticShared : opt_in->second;
  if (count == 0 || count > kMaxThreads || threads.z > 64 || grid.x > 0x7fffffff ||
      grid.y > 65535 || grid.z > 65535) {
    launch.error = launch.kernel + ": a launch out of CUDA's limits";
  } else if (config.dynamicSmemBytes > most) {
    launch.error = launch.kernel + ": a launch with " + std::to_string(config.dynamicSmemBytes) +
                   " bytes of shared memory, where the kernel may have " + std::to_string(most);
  } else if (config.stream != kStream) {
    launch.error = launch.kernel + ": a launch on another stream than XLA's";
  }
  if (!launch.error.empty()) return cudaErrorInvalidConfiguration;
  executed.kernels.insert(kernel);
  if (RunsMachineCode()) {
    launch.error = RunMachineCode(config, kernel, parameters);
    if (launch.error.empty()) return cudaSuccess;
    launch.error = launch.kernel + ", " + launch.error;
    return cudaErrorLaunchFailure;
  }
  gridDim = grid;
  blockDim = threads;
  resident_blocks = ResidentBlocks();
  Grid work;
  work.dynamic_shared = config.dynamicSmemBytes;
  work.ranks.resize(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(work.ranks.begin(), work.ranks.end(), 0);
  if (launch.order == Order::kReverse) std::reverse(work.ranks.begin(), work.ranks.end());
  if (launch.order == Order::kRandom) {
    std::shuffle(work.ranks.begin(), work.ranks.end(), launch.random);
  }
  work.Run();
  return launch.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

int64_t StridingBlocks() { return RunsMachineCode() ? 0x7fffffff : 5; }

std::function<void()> after_opt_in;

void SetOrder(Order order, int rubbish) {
  launch.order = order;
  launch.rubbish = rubbish;
  launch.random.seed(1);
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
  bool once = std::ranges::any_of(outputs, [](const Bytes& output) { return output.only_forward; });
  once |= RunsMachineCode();
  for (const auto& run : std::span(runs).first(once ? 1 : 3)) {
    SetOrder(run.order, run.rubbish);
    for (const Bytes& output : outputs) std::memset(output.data, run.rubbish, output.size);
    if (!launches()) return launch.error;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const char* data = static_cast<const char*>(outputs[i].data);
      if (first.size() < outputs.size()) {
        first.emplace_back(data, data + outputs[i].size);
      } else if (!std::equal(first[i].begin(), first[i].end(), data)) {
        std::ostringstream text;
        text << "result " << i << " depends on the order of threads (forward or " << run.name
             << "), or on what stood in it or in shared memory before";
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
    launch.error = "an opt-in to more shared memory than there is";
    return cudaErrorInvalidConfiguration;
  }
  opted_in[function] = bytes;
  if (after_opt_in) std::exchange(after_opt_in, nullptr)();
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "CUDA on the host"; }
const char* cudaGetErrorString(cudaError_t) { return cuda_on_host::launch.error.c_str(); }
