// A handler with bugs to choose from, each of which must be seen.

#include "planted_bugs.h"

#include "xla_kernels/common/parallel.h"

namespace {

using namespace ilajax;

constexpr int64_t kTasks = 40;

// Right is a result of zeros.
ffi::Error PlantedImpl(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> operand,
                       ffi::Result<ffi::Buffer<ffi::S32>> result, std::string_view bug) {
  if (bug == "error") return InvalidArgument("a planted error");
  int32_t* out = result->typed_data();
  ParallelFor(pool, kTasks, 4, [&](int64_t task, int64_t worker) {
    if (bug == "unwritten_result" && task == 7) return;
    out[task] = bug == "order_of_threads" ? worker : 0;
    // The bytes are right, whichever task comes last.
    if (bug == "race_of_tasks") out[7] = 0;
  });
  static int64_t calls = 0;
  if (bug == "race_of_calls") ++calls;
  if (bug == "written_operand") operand.typed_data()[7] = calls + 1;
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Planted, PlantedImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<std::string_view>("bug"));

namespace thread_sanitizer {

Call PlantedCall(const std::string& bug) {
  const Buffer zeros = {XLA_FFI_DataType_S32, {kTasks}, std::string(kTasks * sizeof(int32_t), 0)};
  return {kPlanted,
          {{"bug", XLA_FFI_AttrType_STRING, XLA_FFI_DataType_INVALID, bug}},
          {zeros},
          {zeros}};
}

}  // namespace thread_sanitizer
