// Makes recorded calls again, on kernels that ThreadSanitizer watches: it reports two accesses to one
// place, by threads of a block or by two blocks, that no barrier, and no fence with an atomic, puts
// in order. See README.md.
//
//   races FOLDER    all calls that handlers.cc wrote there
//
// Exits with 1 where a call goes wrong, and with 66, ThreadSanitizer's own status, after a report.

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#define CPU_TARGET(target, Name)  // has no handler here

#include "grid.h"
#include "thread_sanitizer/calls.h"
#include "thread_sanitizer/frame.h"
#include "thread_sanitizer/pool.h"

#define TARGET(target, Handler) XLA_FFI_DECLARE_HANDLER_SYMBOL(Handler);
#include "xla_kernels/targets.def"

namespace {

using namespace thread_sanitizer;

const std::map<std::string, XLA_FFI_Handler*> kTargets = {
#define TARGET(target, Handler) {#target, Handler},
#include "xla_kernels/targets.def"
};

std::string Make(Call& call, XLA_FFI_ExecutionContext& pool) {
  Frame frame(call, kApi, pool, 0x5a);
  if (const XLA_FFI_Error* error = kTargets.at(call.target)(&frame.ffi)) return error->message;
  const int result = frame.results.Differs(true);
  return result < 0 ? "" : "result " + std::to_string(result) + " differs from the recorded one";
}

}  // namespace

int main(int, char** argv) {
  std::vector<std::filesystem::path> files;
  for (const auto& file : std::filesystem::directory_iterator(argv[1])) files.push_back(file);
  std::sort(files.begin(), files.end());
  std::map<std::string, int> made;
  XLA_FFI_ExecutionContext pool(0);
  int wrong = 0;
  for (size_t i = 0; i < files.size(); ++i) {
    std::ifstream stream(files[i], std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(stream), {});
    Call call;
    Reader read(bytes);
    read(call);
    cuda_on_host::SetOrder(static_cast<cuda_on_host::Order>(i % 3), 0x3c);
    const std::string message = Make(call, pool);
    ++made[call.target];
    if (message.empty()) continue;
    ++wrong;
    std::printf("%s, %s: %s\n", call.target.c_str(), files[i].c_str(), message.c_str());
  }
  for (const auto& [target, handler] : kTargets) {
    std::printf("%-28s %4d calls\n", target.c_str(), made[target]);
    wrong += made[target] == 0;
  }
  return wrong != 0;
}
