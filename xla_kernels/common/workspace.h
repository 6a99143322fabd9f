// A workspace is an extra result of the custom call, carved up in order.

#ifndef ILAJAX_XLA_KERNELS_COMMON_WORKSPACE_H_
#define ILAJAX_XLA_KERNELS_COMMON_WORKSPACE_H_

#include <cstdint>

#include "xla_kernels/common/ffi.h"

namespace ilajax {

constexpr int64_t kWorkspaceAlignment = 64;  // as in ilajax/ops/_plans.py

inline int64_t AlignUp(int64_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

// Hands out aligned arrays, one behind the other. With base == nullptr it only adds up sizes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* Take(int64_t count) {
    const int64_t begin = used_;
    used_ += AlignUp(count * static_cast<int64_t>(sizeof(T)));
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Equal slices of a workspace, one for each worker, behind what `carver` has handed out.
class WorkerSlices {
 public:
  template <typename Carve>
  WorkerSlices(const Carver& carver, const ffi::Buffer<ffi::U8>& workspace, int64_t workers,
               Carve&& carve)
      : base_(static_cast<char*>(workspace.untyped_data())),
        begin_(carver.used()),
        workers_(workers) {
    Carver own(nullptr);
    carve(own);
    bytes_ = own.used();
  }

  int64_t end() const { return begin_ + workers_ * bytes_; }

  // A copy of `layout` whose arrays are those of a worker.
  template <typename Worker, typename... Shapes>
  Worker Take(int64_t worker, Worker layout, const Shapes&... shapes) const {
    Carver own(base_ + begin_ + worker * bytes_);
    layout.Carve(own, shapes...);
    return layout;
  }

 private:
  char* base_;
  int64_t begin_, workers_, bytes_ = 0;
};

// Checks that Python, which planned the workspace, made it large enough.
inline ffi::Error CheckWorkspace(std::string_view op, const ffi::Buffer<ffi::U8>& workspace,
                                 int64_t bytes) {
  if (bytes <= static_cast<int64_t>(workspace.size_bytes())) return ffi::Error::Success();
  return InvalidArgument(op, ": the workspace has ", workspace.size_bytes(), " bytes, but needs ",
                         bytes);
}

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_WORKSPACE_H_
