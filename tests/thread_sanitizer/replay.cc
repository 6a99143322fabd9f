// Makes recorded calls again, under ThreadSanitizer, on pools of threads, and compares what comes
// out with the recording, byte for byte.
//
//   replay FOLDER      all calls that record.cc wrote there
//   replay - BUG       calls of a handler with this bug, see planted_bugs.cc
//
// Exits with 0 where all is well; with 1 where a call goes wrong, or a target was not called with
// several tasks and in all dtypes; with 66, TSan's own status, after a report of its.

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "calls.h"
#include "frame.h"
#include "planted_bugs.h"
#include "pool.h"

#ifdef __SSE2__
#include <pmmintrin.h>
#endif

#define TARGET(target, Handler) XLA_FFI_DECLARE_HANDLER_SYMBOL(Handler);
#include "xla_kernels/targets.def"

namespace thread_sanitizer {
namespace {

const std::map<std::string, XLA_FFI_Handler*> kTargets = {
#define TARGET(target, Handler) {#target, Handler},
#include "xla_kernels/targets.def"
};

// How often all calls are made: by `callers` at once, which share a pool, as independent operations
// of a program do.
struct Round {
  int threads, callers;
};
constexpr Round kRounds[] = {{1, 1}, {4, 1}, {4, 2}, {4, 2}};

std::vector<Call> ReadAll(const std::filesystem::path& folder) {
  std::vector<Call> calls;
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    std::ifstream stream(file.path(), std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(stream), {});
    Reader read(bytes);
    read(calls.emplace_back());
  }
  return calls;
}

// Makes a call, and returns what is wrong, or "". The first time settles which NaN is right: where
// two are added the compiler chooses, and this is not the compilation that was recorded.
std::string Make(Call& call, XLA_FFI_ExecutionContext& pool, int time) {
  Frame frame(call, kApi, pool, 0x5a + time);
  XLA_FFI_Handler* handler = call.target == kPlanted ? Planted : kTargets.at(call.target);
  if (XLA_FFI_Error* error = handler(&frame.ffi)) {
    const std::string message = "fails: " + error->message;
    delete error;
    return message;
  }
  const int operand = frame.operands.Differs(false), result = frame.results.Differs(time == 0);
  if (time == 0) frame.results.Keep();
  if (operand >= 0) return "writes to operand " + std::to_string(operand);
  if (result < 0) return "";
  return "result " + std::to_string(result) + " differs from " +
         (time == 0 ? "the recorded one" : "the first time's");
}

// Makes all calls, and returns how many go wrong. Notes which ones are helped by other threads.
int MakeAll(std::vector<Call>& calls, const Round& round, int time, std::vector<char>& helped) {
  XLA_FFI_ExecutionContext pool(round.threads);
  std::atomic<size_t> next = 0;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> callers;
  for (int caller = 0; caller < round.callers; ++caller) {
    callers.emplace_back([&] {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < calls.size();) {
        asked_for_help = false;
        const std::string message = Make(calls[i], pool, time);
        helped[i] |= asked_for_help;
        if (message.empty()) continue;
        ++wrong;
        std::fprintf(stderr, "%s, %d threads, call %zu: %s\n", calls[i].target.c_str(),
                     round.threads, i, message.c_str());
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  return wrong;
}

// Prints what was called of each target. Returns how many targets have no call with several tasks,
// or none in some dtype.
int Lacking(const std::vector<Call>& calls, const std::vector<char>& helped) {
  int lacking = 0;
  for (const auto& [target, handler] : kTargets) {
    int count = 0, parallel = 0;
    std::set<XLA_FFI_DataType> dtypes;
    for (size_t i = 0; i < calls.size(); ++i) {
      if (calls[i].target != target) continue;
      ++count;
      parallel += helped[i];
      for (const Buffer& buffer : calls[i].operands) dtypes.insert(buffer.dtype);
    }
    std::string missing;
    if (parallel == 0) missing += ", none in parallel";
    if (dtypes != std::set{XLA_FFI_DataType_S32}) {  // keys alone have no other dtype
      if (!dtypes.contains(XLA_FFI_DataType_F32)) missing += ", none of float32";
      if (!dtypes.contains(XLA_FFI_DataType_BF16)) missing += ", none of bfloat16";
      if (!dtypes.contains(XLA_FFI_DataType_F16)) missing += ", none of float16";
    }
    std::printf("%-24s %4d calls, %4d in parallel%s\n", target.c_str(), count, parallel,
                missing.c_str());
    lacking += !missing.empty();
  }
  return lacking;
}

}  // namespace
}  // namespace thread_sanitizer

int main(int argc, char** argv) {
  using namespace thread_sanitizer;
#ifdef __SSE2__
  // As XLA's threads do. Threads inherit it.
  _MM_SET_FLUSH_ZERO_MODE(_MM_FLUSH_ZERO_ON);
  _MM_SET_DENORMALS_ZERO_MODE(_MM_DENORMALS_ZERO_ON);
#endif
  const bool planted = argc == 3;
  std::vector<Call> calls =
      planted ? std::vector<Call>(100, PlantedCall(argv[2])) : ReadAll(argv[1]);
  std::vector<char> helped(calls.size());
  int wrong = 0, time = 0;
  for (const Round& round : kRounds) wrong += MakeAll(calls, round, time++, helped);
  if (!planted) wrong += Lacking(calls, helped);
  return wrong != 0;
}
