// The CUDA handlers as CPU handlers, in a Python module: what XLA calls copies every
// buffer into memory of just its size, so that AddressSanitizer sees an index beyond it, runs the
// handler in all orders of threads, and copies the results back. An argument that a kernel writes
// to is an error, too.

#define CPU_TARGET(target, Name)  // has no handler here

#include <cuda_runtime.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <memory>

#include "grid.h"
#ifdef HAS_MACHINE
#include <dlfcn.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "machine/machine.h"
#endif
#include "thread_sanitizer/record.h"
#include "xla/ffi/api/ffi.h"
#include "xla_kernels/bind.h"

namespace cuda_on_host {
namespace {

// A result of many gigabytes is the same few megabytes of memory over and over, so that the index of
// its last elements can be tried: what is written there last is what is read.
constexpr size_t kHuge = size_t{1} << 30, kWindow = size_t{64} << 20;

void* Repeated(size_t size) {
  const int file = memfd_create("repeated", 0);
  if (file < 0 || ftruncate(file, kWindow) != 0) abort();
  void* data = mmap(nullptr, size + kWindow, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) abort();
  for (size_t at = 0; at < size; at += kWindow) {
    if (mmap(static_cast<char*>(data) + at, kWindow, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
             file, 0) == MAP_FAILED) {
      abort();
    }
  }
  close(file);
  return data;
}

struct Free {
  size_t huge = 0;
  void operator()(void* data) const { huge > 0 ? void(munmap(data, huge + kWindow)) : free(data); }
};

struct Copy {
  XLA_FFI_Buffer* buffer;
  void* original;
  size_t size;
  std::unique_ptr<void, Free> data;

  explicit Copy(void* from) : buffer(static_cast<XLA_FFI_Buffer*>(from)), original(buffer->data) {
    size = xla::ffi::ByteWidth(static_cast<xla::ffi::DataType>(buffer->dtype));
    for (int64_t i = 0; i < buffer->rank; ++i) size *= buffer->dims[i];
    if (size > kHuge) {
      data = std::unique_ptr<void, Free>(Repeated(size), Free{size});
    } else {
      void* own = nullptr;
      if (posix_memalign(&own, 64, size) != 0) abort();
      data.reset(own);
      std::memcpy(own, original, size);
    }
    buffer->data = data.get();
  }
  // Where what counts of it begins: all of it, or its end.
  size_t begin() const { return size > kHuge ? size - kWindow : 0; }
  Bytes bytes() const {
    return {static_cast<char*>(data.get()) + begin(), size - begin(), size > kHuge};
  }
  Copy(Copy&&) = default;
  void Restore() { buffer->data = original; }
};

XLA_FFI_Error* Failure(const XLA_FFI_Api* api, const std::string& message) {
  XLA_FFI_Error_Create_Args args = {};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message.c_str();
  args.errc = XLA_FFI_Error_Code_INTERNAL;
  return api->XLA_FFI_Error_Create(&args);
}

XLA_FFI_Error* Checked(const char* target, XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr) return handler(frame);  // XLA asks about the handler
  std::vector<Copy> arguments, results;
  for (int64_t i = 0; i < frame->args.size; ++i) arguments.emplace_back(frame->args.args[i]);
  std::vector<Bytes> all, compared;
  for (int64_t i = 0; i < frame->rets.size; ++i) {
    Copy copy(frame->rets.rets[i]);
    // Of a workspace (bytes) only what the results show of it has to be the same.
    (copy.buffer->dtype == XLA_FFI_DataType_U8 ? all : compared).push_back(copy.bytes());
    results.push_back(std::move(copy));
  }
  XLA_FFI_Error* failure = nullptr;
  int run = 0;
  std::string message = RunInAllOrders(
      [&] {
        const int rubbish[] = {0xff, 0x5a, 0x01};
        for (const Bytes& workspace : all)
          std::memset(workspace.data, rubbish[run], workspace.size);
        ++run;
        failure = handler(frame);
        return failure == nullptr;
      },
      compared);
  for (Copy& argument : arguments) {
    if (message.empty() && argument.size <= kHuge &&
        std::memcmp(argument.data.get(), argument.original, argument.size) != 0) {
      message = "a kernel writes to an argument";
    }
    argument.Restore();
  }
  for (Copy& result : results) {
    std::memcpy(static_cast<char*>(result.original) + result.begin(), result.bytes().data,
                result.bytes().size);
    result.Restore();
  }
  if (failure != nullptr) return failure;
  const char* calls = getenv("CUDA_ON_HOST_CALLS");
  if (message.empty() && calls != nullptr) thread_sanitizer::Record(calls, target, frame);
  return message.empty() ? nullptr : Failure(frame->api, std::string(target) + ": " + message);
}

}  // namespace
}  // namespace cuda_on_host

namespace {

#define TARGET(target, Name)                            \
  XLA_FFI_Error* target(XLA_FFI_CallFrame* frame) {     \
    return cuda_on_host::Checked(#target, Name, frame); \
  }
#include "xla_kernels/targets.def"

nanobind::dict Registrations() {
  nanobind::dict targets;
#define TARGET(target, Name) targets[#target] = nanobind::capsule(reinterpret_cast<void*>(&target));
#include "xla_kernels/targets.def"
  return targets;
}

#ifdef HAS_MACHINE
// A kernel is named by where its host function is in this library.
const void* Kernel(size_t offset) {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&Registrations), &info);
  return static_cast<const char*>(info.dli_fbase) + offset;
}

void AddCode(size_t offset, const std::string& text, size_t static_shared) {
  cuda_on_host::machine::Code code = cuda_on_host::machine::Decode(text);
  code.static_shared = static_shared;
  cuda_on_host::machine::codes[Kernel(offset)] = std::move(code);
}

std::vector<uint64_t> TakeCounts(size_t offset) {
  std::vector<uint64_t> counts;
  for (const auto& instruction : cuda_on_host::machine::codes.at(Kernel(offset)).instructions) {
    counts.push_back(std::exchange(instruction.count, 0));
  }
  return counts;
}
#endif

}  // namespace

NB_MODULE(_cuda_on_host, m) {
  m.doc() = "The CUDA handlers as CPU handlers, and their plans.";
  ilajax::Bind(m, &Registrations);
#ifdef HAS_MACHINE
  m.def("add_code", &AddCode, nanobind::arg("kernel"), nanobind::arg("text"),
        nanobind::arg("static_shared"),
        "What the kernel at an offset of this library runs: a section that nvdisasm printed.");
  m.def("take_counts", &TakeCounts, nanobind::arg("kernel"),
        "How many warps came to each instruction since the last call.");
#endif
}
