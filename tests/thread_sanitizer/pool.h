// What XLA gives to a handler: threads, and errors.

#ifndef ILAJAX_TESTS_THREAD_SANITIZER_POOL_H_
#define ILAJAX_TESTS_THREAD_SANITIZER_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

// These two are opaque to a handler.

struct XLA_FFI_Error {
  std::string message;
};

struct XLA_FFI_ExecutionContext {
 public:
  explicit XLA_FFI_ExecutionContext(int size) {
    for (int i = 0; i < size; ++i) threads_.emplace_back([this] { Work(); });
  }

  ~XLA_FFI_ExecutionContext() {
    for (int64_t i = 0; i < size(); ++i) Schedule(nullptr, nullptr);
    for (std::thread& thread : threads_) thread.join();
  }

  int64_t size() const { return threads_.size(); }

  void Schedule(XLA_FFI_Task* task, void* data) {
    std::lock_guard lock(mutex_);
    tasks_.emplace_back(task, data);
    wake_.notify_one();
  }

 private:
  void Work() {
    while (true) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return !tasks_.empty(); });
      const auto [task, data] = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      if (task == nullptr) return;
      task(data);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks_;
  std::vector<std::thread> threads_;
};

namespace thread_sanitizer {

// Whether the call that this thread makes has asked other threads for help.
inline thread_local bool asked_for_help = false;

// The part of XLA's interface that handlers of ilajax use; the rest is null.
inline const XLA_FFI_Api kApi = [] {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
    return new XLA_FFI_Error{args->message};
  };
  api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* args) {
    args->message = args->error->message.c_str();
  };
  api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) { delete args->error; };
  api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
    asked_for_help = true;
    args->ctx->Schedule(args->task, args->data);
    return nullptr;
  };
  api.XLA_FFI_ThreadPool_NumThreads =
      [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
    *args->num_threads = args->ctx->size();
    return nullptr;
  };
  return api;
}();

}  // namespace thread_sanitizer

#endif  // ILAJAX_TESTS_THREAD_SANITIZER_POOL_H_
