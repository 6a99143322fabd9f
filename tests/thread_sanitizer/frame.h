// A recorded call as XLA makes it.

#ifndef ILAJAX_TESTS_THREAD_SANITIZER_FRAME_H_
#define ILAJAX_TESTS_THREAD_SANITIZER_FRAME_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "calls.h"

namespace thread_sanitizer {

inline bool IsNan(XLA_FFI_DataType dtype, const char* element) {
  const auto above = [element]<typename Bits>(Bits infinity) {
    Bits bits;
    std::memcpy(&bits, element, sizeof(bits));
    return (bits & static_cast<Bits>(-1) >> 1) > infinity;
  };
  return (dtype == XLA_FFI_DataType_F32 && above(uint32_t{0x7f800000})) ||
         (dtype == XLA_FFI_DataType_BF16 && above(uint16_t{0x7f80})) ||
         (dtype == XLA_FFI_DataType_F16 && above(uint16_t{0x7c00}));
}

// Buffers, each in memory of its own and of just its size, aligned as XLA's.
class Memory {
 public:
  explicit Memory(std::vector<Buffer>& buffers) : recorded_(buffers) {
    for (Buffer& buffer : buffers) {
      void* data = nullptr;
      if (posix_memalign(&data, 64, buffer.Size()) != 0) std::abort();
      owned_.emplace_back(data);
      ffi_.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, buffer.dtype, data,
                      static_cast<int64_t>(buffer.dims.size()), buffer.dims.data()});
    }
    for (XLA_FFI_Buffer& buffer : ffi_) pointers_.push_back(&buffer);
  }

  void Fill() {
    for (size_t i = 0; i < ffi_.size(); ++i) {
      std::memcpy(ffi_[i].data, recorded_[i].bytes.data(), recorded_[i].bytes.size());
    }
  }

  void FillWith(int rubbish) {
    for (size_t i = 0; i < ffi_.size(); ++i) {
      std::memset(ffi_[i].data, rubbish, recorded_[i].Size());
    }
  }

  // The number of the first buffer that does not hold what was recorded, or -1. With `any_nan` a
  // NaN may be another one.
  int Differs(bool any_nan) const {
    for (size_t i = 0; i < ffi_.size(); ++i) {
      const auto& [dtype, dims, want] = recorded_[i];
      const char* got = static_cast<char*>(ffi_[i].data);
      const size_t width = ByteWidth(dtype);
      for (size_t at = 0; at < want.size(); at += width) {
        if (std::memcmp(got + at, &want[at], width) == 0) continue;
        if (!any_nan || !IsNan(dtype, got + at) || !IsNan(dtype, &want[at])) return i;
      }
    }
    return -1;
  }

  // Takes what the buffers hold for what was recorded.
  void Keep() {
    for (size_t i = 0; i < ffi_.size(); ++i) {
      std::memcpy(recorded_[i].bytes.data(), ffi_[i].data, recorded_[i].bytes.size());
    }
  }

  int64_t size() const { return ffi_.size(); }
  void** pointers() { return pointers_.data(); }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };

  std::vector<Buffer>& recorded_;
  std::vector<std::unique_ptr<void, Free>> owned_;
  std::vector<XLA_FFI_Buffer> ffi_;
  std::vector<void*> pointers_;
};

class Attributes {
 public:
  explicit Attributes(std::vector<Attribute>& attributes) : ffi_(attributes.size()) {
    for (size_t i = 0; i < attributes.size(); ++i) {
      auto& [name, type, dtype, bytes] = attributes[i];
      ffi_[i].name = {name.data(), name.size()};
      names_.push_back(&ffi_[i].name);
      types_.push_back(type);
      if (type == XLA_FFI_AttrType_STRING) {
        ffi_[i].text = {bytes.data(), bytes.size()};
        pointers_.push_back(&ffi_[i].text);
      } else if (type == XLA_FFI_AttrType_SCALAR) {
        ffi_[i].scalar = {dtype, bytes.data()};
        pointers_.push_back(&ffi_[i].scalar);
      } else {
        ffi_[i].array = {dtype, bytes.size() / ByteWidth(dtype), bytes.data()};
        pointers_.push_back(&ffi_[i].array);
      }
    }
  }

  int64_t size() const { return ffi_.size(); }
  XLA_FFI_AttrType* types() { return types_.data(); }
  XLA_FFI_ByteSpan** names() { return names_.data(); }
  void** pointers() { return pointers_.data(); }

 private:
  struct Ffi {
    XLA_FFI_ByteSpan name, text;
    XLA_FFI_Scalar scalar;
    XLA_FFI_Array array;
  };

  std::vector<Ffi> ffi_;
  std::vector<XLA_FFI_AttrType> types_;
  std::vector<XLA_FFI_ByteSpan*> names_;
  std::vector<void*> pointers_;
};

// The call frame that a handler gets. Its results hold `rubbish`.
class Frame {
 public:
  Frame(Call& call, const XLA_FFI_Api& api, XLA_FFI_ExecutionContext& context, int rubbish)
      : operands(call.operands),
        results(call.results),
        attributes_(call.attributes),
        arg_types_(operands.size(), XLA_FFI_ArgType_BUFFER),
        ret_types_(results.size(), XLA_FFI_RetType_BUFFER) {
    operands.Fill();
    results.FillWith(rubbish);
    ffi.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    ffi.api = &api;
    ffi.ctx = &context;
    ffi.stage = XLA_FFI_ExecutionStage_EXECUTE;
    ffi.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, operands.size(), arg_types_.data(),
                operands.pointers()};
    ffi.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, results.size(), ret_types_.data(),
                results.pointers()};
    ffi.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,
                 attributes_.size(),        attributes_.types(),
                 attributes_.names(),       attributes_.pointers()};
  }

  XLA_FFI_CallFrame ffi = {};
  Memory operands, results;

 private:
  Attributes attributes_;
  std::vector<XLA_FFI_ArgType> arg_types_;
  std::vector<XLA_FFI_RetType> ret_types_;
};

}  // namespace thread_sanitizer

#endif  // ILAJAX_TESTS_THREAD_SANITIZER_FRAME_H_
