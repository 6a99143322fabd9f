// Writes a call that a handler has answered, what went in and what came out, into a file of its own.

#ifndef ILAJAX_TESTS_THREAD_SANITIZER_RECORD_H_
#define ILAJAX_TESTS_THREAD_SANITIZER_RECORD_H_

#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "calls.h"

namespace thread_sanitizer {

// Of all buffers, the workspace too. A larger call would take longer to replay than all the others.
constexpr size_t kMaxBytes = size_t{4} << 20;

inline std::string Bytes(const void* data, size_t size) {
  return std::string(static_cast<const char*>(data), size);
}

inline size_t Size(const void* buffer) {
  const auto& of = *static_cast<const XLA_FFI_Buffer*>(buffer);
  return Buffer{of.dtype, {of.dims, of.dims + of.rank}, {}}.Size();
}

inline Buffer Copy(const void* buffer) {
  const auto& from = *static_cast<const XLA_FFI_Buffer*>(buffer);
  Buffer to = {from.dtype, {from.dims, from.dims + from.rank}, {}};
  to.bytes = Bytes(from.data, to.Size());
  return to;
}

inline Attribute Copy(const XLA_FFI_ByteSpan& name, XLA_FFI_AttrType type, const void* attribute) {
  Attribute to = {Bytes(name.ptr, name.len), type, XLA_FFI_DataType_INVALID, {}};
  if (type == XLA_FFI_AttrType_STRING) {
    const auto& text = *static_cast<const XLA_FFI_ByteSpan*>(attribute);
    to.bytes = Bytes(text.ptr, text.len);
  } else if (type == XLA_FFI_AttrType_SCALAR) {
    const auto& scalar = *static_cast<const XLA_FFI_Scalar*>(attribute);
    to.dtype = scalar.dtype;
    to.bytes = Bytes(scalar.value, ByteWidth(scalar.dtype));
  } else if (type == XLA_FFI_AttrType_ARRAY) {
    const auto& array = *static_cast<const XLA_FFI_Array*>(attribute);
    to.dtype = array.dtype;
    to.bytes = Bytes(array.data, array.size * ByteWidth(array.dtype));
  }
  return to;
}

// Named by a hash of what went in, so that a call that is made again is not written again.
inline void Write(const std::filesystem::path& folder, Call& call) {
  Writer whole, input;
  whole(call);
  call.results.clear();
  input(call);
  const size_t hash = std::hash<std::string>()(input.bytes);
  const auto path = folder / (call.target + "-" + std::to_string(hash));
  static std::atomic<int> parts = 0;  // XLA may make several calls at once
  const auto part = folder / ("part-" + std::to_string(++parts));
  std::ofstream(part, std::ios::binary) << whole.bytes;
  std::filesystem::rename(part, path);
}

inline void Record(const std::filesystem::path& folder, const char* target,
                   const XLA_FFI_CallFrame* frame) {
  size_t size = 0;
  for (int64_t i = 0; i < frame->args.size; ++i) size += Size(frame->args.args[i]);
  for (int64_t i = 0; i < frame->rets.size; ++i) size += Size(frame->rets.rets[i]);
  if (size > kMaxBytes) return;
  Call call;
  call.target = target;
  for (int64_t i = 0; i < frame->attrs.size; ++i) {
    call.attributes.push_back(
        Copy(*frame->attrs.names[i], frame->attrs.types[i], frame->attrs.attrs[i]));
  }
  for (int64_t i = 0; i < frame->args.size; ++i) {
    call.operands.push_back(Copy(frame->args.args[i]));
  }
  for (int64_t i = 0; i < frame->rets.size; ++i) {
    Buffer& result = call.results.emplace_back(Copy(frame->rets.rets[i]));
    // Only a workspace is a result of bytes.
    if (result.dtype == XLA_FFI_DataType_U8) result.bytes.clear();
  }
  Write(folder, call);
}

}  // namespace thread_sanitizer

#endif  // ILAJAX_TESTS_THREAD_SANITIZER_RECORD_H_
