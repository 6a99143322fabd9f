// One call of an FFI handler, what goes in and what came out, and how it lies in a file.

#ifndef ILAJAX_TESTS_THREAD_SANITIZER_CALLS_H_
#define ILAJAX_TESTS_THREAD_SANITIZER_CALLS_H_

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace thread_sanitizer {

inline size_t ByteWidth(XLA_FFI_DataType dtype) {
  return xla::ffi::ByteWidth(static_cast<xla::ffi::DataType>(dtype));
}

// Each `Fields` lists a structure's members for Writer and Reader alike.

struct Buffer {
  XLA_FFI_DataType dtype;
  std::vector<int64_t> dims;
  std::string bytes;  // none in a workspace, where a call leaves rubbish

  void Fields(auto& each) { each(dtype), each(dims), each(bytes); }

  size_t Size() const {
    size_t size = ByteWidth(dtype);
    for (const int64_t dim : dims) size *= dim;
    return size;
  }
};

struct Attribute {
  std::string name;
  XLA_FFI_AttrType type;   // a string, a scalar or an array
  XLA_FFI_DataType dtype;  // of the latter two
  std::string bytes;

  void Fields(auto& each) { each(name), each(type), each(dtype), each(bytes); }
};

struct Call {
  std::string target;
  std::vector<Attribute> attributes;  // in XLA's order, by name
  std::vector<Buffer> operands;
  std::vector<Buffer> results;

  void Fields(auto& each) { each(target), each(attributes), each(operands), each(results); }
};

class Writer {
 public:
  template <typename T>
  void operator()(T& value) {
    if constexpr (requires { value.Fields(*this); }) {
      value.Fields(*this);
    } else if constexpr (requires { value.size(); }) {
      int64_t size = value.size();
      (*this)(size);
      for (auto& element : value) (*this)(element);
    } else {
      static_assert(std::is_trivially_copyable_v<T>);
      bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
    }
  }

  std::string bytes;
};

class Reader {
 public:
  explicit Reader(const std::string& bytes) : next_(bytes.data()) {}

  template <typename T>
  void operator()(T& value) {
    if constexpr (requires { value.Fields(*this); }) {
      value.Fields(*this);
    } else if constexpr (requires { value.resize(0); }) {
      int64_t size;
      (*this)(size);
      value.resize(size);
      for (auto& element : value) (*this)(element);
    } else {
      std::memcpy(&value, next_, sizeof(value));
      next_ += sizeof(value);
    }
  }

 private:
  const char* next_;
};

}  // namespace thread_sanitizer

#endif  // ILAJAX_TESTS_THREAD_SANITIZER_CALLS_H_
