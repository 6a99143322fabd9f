// What every handler starts from: XLA's FFI, errors that say what is wrong, dispatch over dtypes.
//
// Python has checked all shapes at trace time. A handler re-checks only what keeps memory safe.

#pragma once

#include <cstdint>
#include <sstream>
#include <utility>

#include "xla/ffi/api/ffi.h"
#include "xla_kernels/common/float16.h"

namespace ilajax {

namespace ffi = ::xla::ffi;

// An error from streamable parts: `return InvalidArgument("pool: window ", w, " exceeds ", size)`.
template <typename... Parts>
ffi::Error InvalidArgument(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  return ffi::Error::InvalidArgument(message.str());
}

// Calls `f.template operator()<T>()` with the C++ type of a floating-point storage dtype, so
//   DispatchFloat(values.element_type(), [&]<typename T>() -> ffi::Error { ... })
template <typename F>
ffi::Error DispatchFloat(ffi::DataType dtype, F&& f) {
  switch (dtype) {
    case ffi::DataType::F32:
      return std::forward<F>(f).template operator()<float>();
    case ffi::DataType::BF16:
      return std::forward<F>(f).template operator()<BFloat16>();
    case ffi::DataType::F16:
      return std::forward<F>(f).template operator()<Float16>();
    default:
      return InvalidArgument("values have XLA dtype ", static_cast<int>(dtype),
                             ", expected float32, bfloat16 or float16");
  }
}

// The elements of a buffer as T, whose size DispatchFloat or the handler's signature vouches for.
template <typename T, typename AnyBuffer>
T* Data(const AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace ilajax

// Returns from the enclosing handler if `expr`, an ffi::Error, is a failure.
#define ILAJAX_RETURN_IF_ERROR(expr)                            \
  do {                                                          \
    if (::xla::ffi::Error e_ = (expr); e_.failure()) return e_; \
  } while (false)
