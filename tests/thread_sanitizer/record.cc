// The handlers that JAX calls while calls are recorded, under the names of their targets: each runs
// the real one, and writes what went in and what came out into a file of its own.

#include "record.h"

#include <filesystem>

namespace thread_sanitizer {
namespace {

std::filesystem::path folder;

XLA_FFI_Error* Recorded(const char* target, XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  XLA_FFI_Error* error = handler(frame);
  // With an extension, XLA asks about the handler.
  if (error != nullptr || frame->extension_start != nullptr) return error;
  Record(folder, target, frame);
  return nullptr;
}

}  // namespace
}  // namespace thread_sanitizer

extern "C" void RecordInto(const char* path) { thread_sanitizer::folder = path; }

// The plugin sets <target>_handler to the real one.
#define TARGET(target, Handler)                                          \
  extern "C" {                                                           \
  XLA_FFI_Handler* target##_handler;                                     \
  XLA_FFI_Error* target(XLA_FFI_CallFrame* frame) {                      \
    return thread_sanitizer::Recorded(#target, target##_handler, frame); \
  }                                                                      \
  }
#include "xla_kernels/targets.def"
